"""Tables and the plot of benchmarks/mismatch.py, from the files of its runs."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from everstep.demo.progress import TrainerLine, read_progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHODS = ("none", "tis", "icepop", "kpop", "equal")
RESULT = "result.json"
LAGS = ("lag0", "lag1", "lag2", "lag3+")
# of the iterations, the last that "at the end" is about
LAST = 5
# a share of right answers below which a run has lost what it had
LOST = 0.3


class Asked(Struct, frozen=True):
    """Held-out questions under one version: share right, mean length in tokens."""

    version: int
    right: float
    length: float


class Result(Struct, frozen=True, kw_only=True):
    """A finished run. load: before and after."""

    seed: int
    method: str
    lr: float
    asked: list[Asked]
    learned_s: float
    load: tuple[float, float]


class Learned(Struct, frozen=True):
    """A finished run, and its trainer's lines."""

    result: Result
    lines: list[TrainerLine]

    def mean(self, name: str) -> float:
        """Of a metric, over the tokens of all iterations."""
        return self._mean(name, "tokens")

    def mean_of_lag(self, name: str, lag: str) -> float:
        """The same, of the tokens of one lag."""
        return self._mean(f"{name}/{lag}", f"tokens/{lag}")

    def largest(self, name: str) -> float:
        return max(self.series(name), default=math.nan)

    def series(self, name: str) -> list[float]:
        """By iteration; an iteration in which no group taught anything has 0."""
        return [_number(line.metrics.get(name, 0.0)) for line in self.lines]

    @property
    def rewards(self) -> list[float]:
        return [line.reward or 0.0 for line in self.lines]

    @property
    def reward(self) -> float:
        """At the end."""
        return mean(self.rewards[-LAST:])

    @property
    def final(self) -> float:
        return self.result.asked[-1].right

    def _mean(self, name: str, weight: str) -> float:
        pairs = [
            (_number(line.metrics[name]), _number(line.metrics[weight]))
            for line in self.lines
            if name in line.metrics
        ]
        total = sum(count for _, count in pairs)
        return sum(value * count for value, count in pairs) / total if total else math.nan


def _number(value: float | None) -> float:
    """What was not finite has no number in JSON."""
    return math.nan if value is None else value


Runs = dict[str, list[Learned]]
"""At one learning rate, by method, over the seeds that are finished."""
Table = list[list[str]]


def read_runs(out: Path) -> dict[float, Runs]:
    """Everything that is finished, by learning rate."""
    found: dict[float, Runs] = {}
    for path in sorted(out.glob(f"seed-*/lr-*/*/{RESULT}")):
        result = msgspec.json.decode(path.read_bytes(), type=Result)
        runs = found.setdefault(result.lr, {method: [] for method in METHODS})
        runs[result.method].append(Learned(result, read_progress(path.parent / "rl").trained))
    return {
        lr: {method: runs for method, runs in found[lr].items() if runs} for lr in sorted(found)
    }


def report(out: Path, plots: Path | None) -> None:
    found = read_runs(out)
    for lr, runs in found.items():
        each = [learned for own in runs.values() for learned in own]
        seconds = [one.result.learned_s for one in each]
        loads = [load for one in each for load in one.result.load]
        print(
            f"\n### Learning rate {lr:g}\n\n{len(each)} runs of {len(each[0].lines)} iterations, "
            f"{min(seconds):.0f} to {max(seconds):.0f} s each, load {min(loads):.1f} to "
            f"{max(loads):.1f}"
        )
        for title, table in (
            ("What is learned", table_learned(runs)),
            ("Held out by version, seed by seed", table_seeds(runs)),
            ("Engine against trainer", table_mismatch(runs)),
            ("By age of the token", table_lags(runs)),
        ):
            print(f"\n#### {title}\n\n{markdown(table)}")
    if plots is not None and found:
        plot(found, plots / "mismatch.svg")


def table_learned(runs: Runs) -> Table:
    """Mean over seeds ± their standard deviation."""
    rows = [["", "seeds", "held out, before", "at the end", "reward at the end", "lost"]]
    for method, own in runs.items():
        columns: list[Callable[[Learned], float]] = [
            lambda one: one.result.asked[0].right,
            lambda one: one.final,
            lambda one: one.reward,
        ]
        shown = [spread([column(one) for one in own]) for column in columns]
        lost = sum(one.final < LOST for one in own)
        rows.append([method, str(len(own)), *shown, f"{lost} of {len(own)}"])
    return rows


def table_seeds(runs: Runs) -> Table:
    seeds = sorted({one.result.seed for own in runs.values() for one in own})
    rows = [["", *(f"seed {seed}" for seed in seeds)]]
    for method, own in runs.items():
        by_seed = {one.result.seed: one.result.asked for one in own}
        cells = [
            ", ".join(f"{100 * asked.right:.1f}" for asked in by_seed.get(seed, [])) + " %"
            for seed in seeds
        ]
        rows.append([method, *(cell if len(cell) > 2 else "–" for cell in cells)])
    return rows


def table_mismatch(runs: Runs) -> Table:
    """Over the tokens of all iterations, mean over seeds; largest: of all."""
    names = {
        "abs(Δlp), mean": "log_ratio_abs_mean",
        "p99": "log_ratio_abs_p99",
        "KL k1": "kl_k1",
        "k3": "kl_k3",
        "beyond 2×": "ratio_beyond_2",
        "masked": "mask_fraction",
        "ESS": "ess",
        "entropy": "entropy",
        "of masked": "entropy_masked",
    }
    rows = [["", *names, "largest Δlp", "largest p−q"]]
    for method, own in runs.items():
        cells = []
        for title, name in names.items():
            value = mean([v for one in own if not math.isnan(v := one.mean(name))])
            is_share = title in ("beyond 2×", "masked")
            cells.append(percent(value) if is_share else figure(value))
        largest = [
            figure(max(one.largest(name) for one in own))
            for name in ("log_ratio_abs_max", "prob_diff_max")
        ]
        rows.append([method, *cells, *largest])
    return rows


def table_lags(runs: Runs) -> Table:
    """abs(Δlp) and masked share of tokens whose weights were 0, 1, … versions old."""
    shown = [lag for lag in LAGS if any(not math.isnan(v) for v in _of_lag(runs, "tokens", lag))]
    rows = [["", *(f"{what}, {lag}" for what in ("abs(Δlp)", "masked") for lag in shown)]]
    for method, own in runs.items():
        gaps = [figure(mean(_of_lag({method: own}, "log_ratio_abs_mean", lag))) for lag in shown]
        masked = [mean(_of_lag({method: own}, "mask_fraction", lag)) for lag in shown]
        rows.append([method, *gaps, *map(percent, masked)])
    return rows


def _of_lag(runs: Runs, name: str, lag: str) -> list[float]:
    values = (one.mean_of_lag(name, lag) for own in runs.values() for one in own)
    return [value for value in values if not math.isnan(value)]


def markdown(table: Table) -> str:
    header, *rows = table
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


PANELS = (
    ("log_ratio_abs_mean", "|Δ logprob|, mean"),
    ("kl_k3", "KL(engine ‖ trainer), k3, nats a token"),
    ("mask_fraction", "masked share of tokens"),
)


def plot(found: dict[float, Runs], path: Path) -> bool:
    """A row of panels for each learning rate, as SVG: mean over seeds, and the band from the least
    to the most. False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(len(found), 4, figsize=(14, 3.6 * len(found)), squeeze=False)
    for (lr, runs), (reward, *others) in zip(found.items(), rows, strict=True):
        for method, own in runs.items():
            color = f"C{METHODS.index(method)}"
            style: dict[str, Any] = {
                "color": color,
                "linestyle": ":" if method == "equal" else "-",
            }
            _band(reward, [one.rewards for one in own], style, method)
            for one in own:
                asked = one.result.asked[1:]
                steps = [each.version for each in asked]
                reward.plot(steps, [each.right for each in asked], "o", color=color, ms=3)
            for axis, (name, _) in zip(others, PANELS, strict=True):
                _band(axis, [one.series(name) for one in own], style, method)
        reward.set(title=f"lr {lr:g}: reward; dots: held out", ylim=(0, 1))
        reward.legend(fontsize="small", loc="lower left")
        for axis, (name, title) in zip(others, PANELS, strict=True):
            axis.set(title=title)
            if name != "mask_fraction":
                axis.set_yscale("symlog", linthresh=1e-3)
            axis.set_ylim(bottom=0)
        for axis in (reward, *others):
            axis.grid(alpha=0.3)
            axis.set_xlabel("iteration")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True


def _band(
    axis: "Axes", series: Sequence[Sequence[float]], style: dict[str, Any], label: str
) -> None:
    columns = list(zip(*series, strict=False))
    steps = range(1, len(columns) + 1)
    axis.plot(steps, [mean(column) for column in columns], label=label, **style)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def spread(values: Sequence[float]) -> str:
    """In percent: the mean, ± the standard deviation where there is more than one."""
    said = f"{100 * mean(values):.1f}"
    return f"{said} ± {100 * statistics.stdev(values):.1f} %" if len(values) > 1 else f"{said} %"


def figure(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:.2g}" if 0.001 <= abs(value) < 1000 else f"{value:.1e}"


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f} %"
