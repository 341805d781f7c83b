"""Tables and the plot of benchmarks/mismatch.py, from the files of its runs."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from everstep.demo_progress import TrainerLine, read_progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHODS = ("none", "tis", "icepop", "kpop", "equal")
RESULT = "result.json"
LAGS = ("lag0", "lag1", "lag2", "lag3+")
# of the iterations, the last that "at the end" is about
LAST = 5


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

    def mean(self, name: str, last: int | None = None) -> float:
        """Of a metric over the iterations, or the last of them; NaN where no iteration has it."""
        lines = self.lines if last is None else self.lines[-last:]
        return mean([line.metrics[name] for line in lines if name in line.metrics])

    def weighted(self, name: str, suffix: str) -> float:
        """Of a metric of the tokens of one lag, over all of them."""
        pairs = [
            (line.metrics[f"{name}/{suffix}"], line.metrics[f"tokens/{suffix}"])
            for line in self.lines
            if f"{name}/{suffix}" in line.metrics
        ]
        total = sum(count for _, count in pairs)
        return sum(value * count for value, count in pairs) / total if total else math.nan

    @property
    def reward(self) -> float:
        return mean([line.reward or 0.0 for line in self.lines[-LAST:]])

    @property
    def area(self) -> float:
        """Mean of what was asked after version 0: how fast and how high."""
        return mean([asked.right for asked in self.result.asked[1:]])


Runs = dict[str, list[Learned]]
"""By method, over the seeds that are finished."""
Table = list[list[str]]


def read_runs(out: Path) -> Runs:
    """Everything that is finished."""
    found: Runs = {method: [] for method in METHODS}
    for path in sorted(out.glob(f"seed-*/*/{RESULT}")):
        result = msgspec.json.decode(path.read_bytes(), type=Result)
        lines = read_progress(path.parent / "rl").trained
        found[result.method].append(Learned(result, lines))
    return {method: runs for method, runs in found.items() if runs}


def report(out: Path, plots: Path | None) -> None:
    runs = read_runs(out)
    if not runs:
        print("nothing is finished")
        return
    each = [learned for found in runs.values() for learned in found]
    seconds = [one.result.learned_s for one in each]
    loads = [load for one in each for load in one.result.load]
    print(
        f"{len(each)} runs of {len(each[0].lines)} iterations, lr {each[0].result.lr:g}, "
        f"{min(seconds):.0f} to {max(seconds):.0f} s each, load {min(loads):.1f} to {max(loads):.1f}"
    )
    for title, table in (
        ("What is learned", table_learned(runs)),
        ("Held out, seed by seed", table_seeds(runs)),
        ("Engine against trainer", table_mismatch(runs)),
        ("By age of the token", table_lags(runs)),
    ):
        print(f"\n#### {title}\n\n{markdown(table)}")
    if plots is not None:
        plot(runs, plots / "mismatch.svg")


def table_learned(runs: Runs) -> Table:
    """Mean over seeds ± their standard deviation."""
    rows = [["", "seeds", "held out, before", "at the end", "mean on the way", "reward at the end"]]
    for method, found in runs.items():
        columns: list[Callable[[Learned], float]] = [
            lambda one: one.result.asked[0].right,
            lambda one: one.result.asked[-1].right,
            lambda one: one.area,
            lambda one: one.reward,
        ]
        shown = [spread([column(one) for one in found]) for column in columns]
        rows.append([method, str(len(found)), *shown])
    return rows


def table_seeds(runs: Runs) -> Table:
    seeds = sorted({one.result.seed for found in runs.values() for one in found})
    rows = [["", *(f"seed {seed}" for seed in seeds)]]
    for method, found in runs.items():
        by_seed = {one.result.seed: one.result.asked for one in found}
        cells = [
            ", ".join(f"{100 * asked.right:.0f}" for asked in by_seed.get(seed, []))
            for seed in seeds
        ]
        rows.append([method, *cells])
    return rows


def table_mismatch(runs: Runs) -> Table:
    """Means over iterations and seeds; largest: of all."""
    names = {
        "mean": "log_ratio_abs_mean",
        "p99": "log_ratio_abs_p99",
        "KL (k3)": "kl_k3",
        "k1": "kl_k1",
        "beyond 2×": "ratio_beyond_2",
        "masked": "mask_fraction",
        "ESS": "ess",
        "entropy": "entropy",
        "of masked": "entropy_masked",
        "max p−q": "prob_diff_max",
    }
    rows = [["", "|Δlp| " + "mean", "p99", "largest", *list(names)[2:]]]
    for method, found in runs.items():
        values = {title: mean([one.mean(name) for one in found]) for title, name in names.items()}
        largest = max(line.metrics["log_ratio_abs_max"] for one in found for line in one.lines)
        shown = {title: figure(value) for title, value in values.items()}
        for title in ("beyond 2×", "masked"):
            shown[title] = f"{100 * values[title]:.3f} %"
        cells = list(shown.values())
        rows.append([method, *cells[:2], figure(largest), *cells[2:]])
    return rows


def table_lags(runs: Runs) -> Table:
    rows = [["", *(f"{what}, {lag}" for what in ("|Δlp|", "masked") for lag in LAGS)]]
    for method, found in runs.items():
        cells = [
            figure(mean([v for one in found if not math.isnan(v := one.weighted(name, lag))]))
            for name in ("log_ratio_abs_mean", "mask_fraction")
            for lag in LAGS
        ]
        rows.append([method, *cells])
    return rows


def markdown(table: Table) -> str:
    header, *rows = table
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def plot(runs: Runs, path: Path) -> bool:
    """Six panels, as SVG: mean over seeds, and the band from the least to the most."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(13, 7.2))
    (held, reward, masked), (gap, tail, divergence) = panels
    metrics = (
        (masked, "mask_fraction", "masked share of tokens"),
        (gap, "log_ratio_abs_mean", "|Δ logprob|, mean"),
        (tail, "log_ratio_abs_p99", "|Δ logprob|, 99 of 100 tokens are below"),
        (divergence, "kl_k3", "KL(engine ‖ trainer), k3, nats a token"),
    )
    for index, (method, found) in enumerate(runs.items()):
        style: dict[str, Any] = {
            "color": f"C{index}",
            "linestyle": ":" if method == "equal" else "-",
        }
        asked = [[one.right for one in learned.result.asked] for learned in found]
        steps = [one.version for one in found[0].result.asked]
        _band(held, steps, asked, method, style)
        rewards = [[line.reward or 0.0 for line in learned.lines] for learned in found]
        _band(reward, range(1, len(rewards[0]) + 1), rewards, method, style)
        for axis, name, _ in metrics:
            series = [[line.metrics.get(name, 0.0) for line in one.lines] for one in found]
            _band(axis, range(1, len(series[0]) + 1), series, method, style)
    held.set(title="held-out questions answered right, T = 1", ylim=(0, 1))
    reward.set(title="reward in training", ylim=(0, 1))
    for axis, _, title in metrics:
        axis.set(title=title)
        axis.set_yscale("symlog", linthresh=1e-5) if axis is not masked else None
    for axis in panels.flat:
        axis.grid(alpha=0.3)
        axis.set_xlabel("version")
        axis.set_ylim(bottom=0)
    held.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True


def _band(
    axis: "Axes",
    steps: Sequence[int],
    series: Sequence[Sequence[float]],
    label: str,
    style: dict[str, Any],
) -> None:
    columns = list(zip(*series, strict=True))
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
