"""The simulated part of benchmarks/c3po.py: tables and a plot.

Lengths: lognormal, capped where 1 % of all samples reach the cap (cap = k × median; k = 1: equal
lengths). Prompts without end, lengths independent of each other. A step of the engine takes
1 + r · rows / Ω units, a prefilled token 0.001; r = 1 where not said.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from everstep.engine.rollout import derive_seed
from everstep.trainer_bridge.c3po.comparison import (
    BASELINES,
    Figures,
    Setting,
    retention_without_purges,
    run_baseline,
    run_c3po,
    step_speed_up,
)
from everstep.trainer_bridge.c3po.length_model import CappedLognormal
from everstep.trainer_bridge.c3po.simulator import Fate, Fates, StepCost
from everstep.trainer_bridge.c3po.words import Sample

MEDIAN = 1024
BATCH, GROUP = 16, 8
SAMPLES = BATCH * GROUP
PROMPT = 256
WARM_UP, MEASURED = 30, 60
RATIOS = (1, 2, 4, 8, 16, 32, 64)
RATIO = 16
# what the paper's two figures, 2.5× rollouts and 1.5× end to end, imply (Amdahl)
TRAINING_SHARE = 4 / 9
KILLED = 4000
KILLS = (0.0, 0.05, 0.1, 0.2, 0.3)

Table = list[list[str]]


class Point(NamedTuple):
    """C3PO++ and the baselines at one setting."""

    lengths: CappedLognormal
    retention: int
    ours: Figures
    theirs: dict[str, Figures]

    def rollout(self, baseline: str) -> float:
        return self.theirs[baseline].seconds_per_token / self.ours.seconds_per_token

    def step(self, baseline: str) -> float:
        """Training costs the same for each token, whoever sampled it."""
        synchronous = self.theirs["synchronous"].seconds_per_token
        training = synchronous * TRAINING_SHARE / (1 - TRAINING_SHARE)
        theirs = self.theirs[baseline].seconds_per_token
        return step_speed_up(theirs / self.ours.seconds_per_token, training / (training + theirs))

    @property
    def bias(self) -> float:
        """Mean trained length over the mean of the distribution."""
        return self.ours.mean_length / self.lengths.mean


def setting(*, capacity: int | None = None, r: float = 1.0) -> Setting:
    """capacity: Ω; default: a batch's samples."""
    capacity = capacity or SAMPLES
    cost = StepCost(fixed_s=1.0, row_s=r / capacity, prefill_token_s=0.001)
    return Setting(
        batch=BATCH,
        group=GROUP,
        capacity=capacity,
        cost=cost,
        prompt_tokens=PROMPT,
        warm_up=WARM_UP,
        measured=MEASURED,
    )


def budget_of(lengths: CappedLognormal) -> int:
    """Φ: on average the tokens of a synchronous batch."""
    return round(SAMPLES * lengths.mean)


def point(
    ratio: float = RATIO,
    retention: int | None = None,
    *,
    baselines: dict[str, Figures] | None = None,
    recomputes_kv: bool = False,
    **values: Any,
) -> Point:
    """retention None: the least that purges nothing."""
    lengths = CappedLognormal(median=MEDIAN, ratio=ratio)
    where = setting(**values)
    budget = budget_of(lengths)
    if retention is None:
        retention = retention_without_purges(lengths.cap, budget=budget, capacity=where.capacity)
    ours = run_c3po(where, lengths, budget=budget, retention=retention, recomputes_kv=recomputes_kv)
    if baselines is None:
        baselines = {which: run_baseline(which, where, lengths) for which in BASELINES}
    return Point(lengths, retention, ours, baselines)


def sweep_caps() -> tuple[list[Point], list[Point]]:
    """Without purges, and at σ = 3."""
    free = [point(ratio) for ratio in RATIOS]
    short = [point(p.lengths.ratio, 3, baselines=p.theirs) for p in free]
    return free, short


def table_caps(points: Sequence[Point]) -> Table:
    header = ["cap / median", "mean / median", "σ"]
    header += [f"rollouts: × {which}" for which in BASELINES]
    header += [f"step: × {which}" for which in BASELINES]
    header += ["purged", "trained / true length", "lag mean, max"]
    return [
        header,
        *(
            [
                f"{p.lengths.ratio:g}",
                f"{p.lengths.mean / MEDIAN:.2f}",
                str(p.retention),
                *(f"{p.rollout(which):.2f}" for which in BASELINES),
                *(f"{p.step(which):.2f}" for which in BASELINES),
                f"{100 * p.ours.purged:.1f} %",
                f"{p.bias:.2f}",
                f"{p.ours.mean_lag:.2f}, {p.ours.max_lag}",
            ]
            for p in points
        ),
    ]


def table_baselines(points: Sequence[Point]) -> Table:
    header = ["cap / median", "restart: thrown away", "restart: trained / true length"]
    return [
        header,
        *(
            [
                f"{p.lengths.ratio:g}",
                f"{100 * p.theirs['restart'].wasted:.0f} %",
                f"{p.theirs['restart'].mean_length / p.lengths.mean:.2f}",
            ]
            for p in points
        ),
    ]


def table_costs() -> Table:
    rows = [["step of the engine", *(f"rollouts: × {which}" for which in BASELINES)]]
    models = {
        "weights only (r = 0)": 0.0,
        "half of a full step is per row (r = 1)": 1.0,
        "r = 4": 4.0,
        "2 cores, Zen 3, above (r = 38)": 38.0,
    }
    for name, r in models.items():
        p = point(r=r)
        rows.append([name, *(f"{p.rollout(which):.2f}" for which in BASELINES)])
    p = point(recomputes_kv=True)
    rows.append(
        ["r = 1, carried KV recomputed", *(f"{p.rollout(which):.2f}" for which in BASELINES)]
    )
    return rows


def table_capacities() -> Table:
    rows = [
        ["Ω / samples of a batch", "σ", *(f"rollouts: × {which}" for which in BASELINES), "lag"]
    ]
    for capacity in (SAMPLES // 8, SAMPLES // 4, SAMPLES // 2, SAMPLES, 2 * SAMPLES):
        p = point(capacity=capacity, r=capacity / SAMPLES)
        rows.append(
            [
                f"{capacity / SAMPLES:g}",
                str(p.retention),
                *(f"{p.rollout(which):.2f}" for which in BASELINES),
                f"{p.ours.mean_lag:.2f}, {p.ours.max_lag}",
            ]
        )
    return rows


def sweep_retentions(reference: Point) -> list[Point]:
    retentions = (0, 1, 2, 3, 4, 6, 8, reference.retention)
    return [point(RATIO, retention, baselines=reference.theirs) for retention in retentions]


def table_retentions(points: Sequence[Point]) -> Table:
    header = ["σ", "rollouts: × synchronous", "purged", "trained / true length", "lag mean, max"]
    return [
        header,
        *(
            [
                str(p.retention),
                f"{p.rollout('synchronous'):.2f}",
                f"{100 * p.ours.purged:.1f} %",
                f"{p.bias:.2f}",
                f"{p.ours.mean_lag:.2f}, {p.ours.max_lag}",
            ]
            for p in points
        ),
    ]


def table_modes(reference: Point) -> Table:
    lengths = reference.lengths
    completed = run_c3po(
        setting(),
        lengths,
        budget=budget_of(lengths),
        retention=reference.retention,
        mode="completed",
    )
    sides = {
        "synchronous": reference.theirs["synchronous"],
        "C3PO++, generated": reference.ours,
        "C3PO++, completed": completed,
    }
    return [
        ["", "trained tokens per iteration, standard deviation / mean"],
        *([name, f"{100 * figures.variation:.0f} %"] for name, figures in sides.items()),
    ]


def killed(rate: float, what: Literal["error", "lost"]) -> Fates:
    """A kill at each token with probability rate / MEDIAN: by inversion, one draw per try."""
    if not rate:
        return lambda _sample, _losses: None

    def fate(sample: Sample, losses: int) -> Fate:
        # never 0 and never 1
        uniform = (derive_seed("kill", sample, losses) + 0.5) / 2**63
        survived = math.log(uniform) / math.log(1 - rate / MEDIAN)
        return Fate(1 + int(survived), what)

    return fate


def kills(ratio: float = RATIO) -> dict[str, list[tuple[float, float, float]]]:
    """By policy: (rate, mean trained length / that without kills, sampled / trained tokens).

    Every prompt of a finite set is trained in the end, so nothing is left out by the clock.
    """
    lengths = CappedLognormal(median=MEDIAN, ratio=ratio)
    where = Setting(batch=1, group=1, capacity=32, warm_up=0, measured=10**6)
    names = [str(number) for number in range(KILLED)]
    found: dict[str, list[tuple[float, float, float]]] = {}
    true = sum(lengths(Sample(name, 0)) for name in names) / len(names)
    policies: dict[str, Callable[[float], Fates | None]] = {
        "drawn anew": lambda rate: killed(rate, "error"),
        "same draw again": lambda rate: killed(rate, "lost"),
        # a kill costs time, and no token
        "resumed": lambda _rate: None,
    }
    for policy, fates in policies.items():
        found[policy] = []
        for rate in KILLS:
            ours = run_c3po(
                where,
                lengths,
                budget=10**9,
                retention=0,
                fates=fates(rate),
                prompts=lambda: iter(names),
            )
            assert ours.num_samples == len(names)
            found[policy].append((rate, ours.mean_length / true, ours.sampled / ours.delivered))
    return found


def table_kills(found: dict[str, list[tuple[float, float, float]]]) -> Table:
    header = [f"kills per {MEDIAN:,} tokens"]
    header += [f"{policy}: trained / true length" for policy in found]
    header += [f"{policy}: sampled / trained tokens" for policy in found]
    rows = [header]
    for index, rate in enumerate(KILLS):
        rows.append(
            [
                f"{rate:g}",
                *(f"{points[index][1]:.2f}" for points in found.values()),
                *(f"{points[index][2]:.2f}" for points in found.values()),
            ]
        )
    return rows


def troubled(losses: float) -> Fates:
    """2 % of attempts fail and 1 % are cancelled, somewhere on their way; and losses."""
    lost = killed(losses, "lost")

    def fate(sample: Sample, times: int) -> Fate | None:
        uniform = derive_seed("trouble", sample) / 2**63
        after = 1 + derive_seed("when", sample) % (2 * MEDIAN)
        if uniform < 0.02:
            return Fate(after, "error")
        if uniform < 0.03:
            return Fate(after, "abort")
        return lost(sample, times)

    return fate


def wastes(reference: Point) -> dict[str, Figures]:
    """Waste by account: what each of them is."""
    lengths = reference.lengths

    def run(retention: int, fates: Fates | None = None) -> Figures:
        return run_c3po(
            setting(), lengths, budget=budget_of(lengths), retention=retention, fates=fates
        )

    return {
        f"σ = {reference.retention}": reference.ours,
        "σ = 3": run(3),
        "σ = 3, trouble": run(3, troubled(0.0)),
        f"σ = {reference.retention}, trouble": run(reference.retention, troubled(0.0)),
        f"σ = {reference.retention}, trouble, 0.05 losses": run(
            reference.retention, troubled(0.05)
        ),
    }


def table_wastes(found: dict[str, Figures]) -> Table:
    accounts: dict[str, Callable[[Figures], float]] = {
        "purged": lambda figures: figures.purged,
        "regenerated": lambda figures: figures.regenerated,
        "cancelled": lambda figures: figures.cancelled,
    }
    return [
        ["of the sampled tokens", *accounts],
        *(
            [name, *(f"{100 * share(figures):.1f} %" for share in accounts.values())]
            for name, figures in found.items()
        ),
    ]


def markdown(table: Table) -> str:
    header, *rows = table
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def plot(
    free: Sequence[Point],
    short: Sequence[Point],
    retentions: Sequence[Point],
    killed_by: dict[str, list[tuple[float, float, float]]],
    waste: dict[str, Figures],
    path: Path,
) -> bool:
    """Four panels, as SVG. False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, ((speed, ages), (bias, share)) = plt.subplots(2, 2, figsize=(10, 7.2))
    for index, which in enumerate(BASELINES):
        for points, style, label in ((free, "o-", "no purges"), (short, "x:", "σ = 3")):
            speed.plot(
                [p.lengths.ratio for p in points],
                [p.rollout(which) for p in points],
                style,
                color=f"C{index}",
                label=f"over {which}, {label}",
            )
    speed.set(xscale="log", yscale="log", title="speed-up of the rollout phase")
    speed.set(xlabel="cap / median length")
    speed.set_xticks(RATIOS, [str(ratio) for ratio in RATIOS])
    # room for the legend above the curves
    speed.set_ylim(0.6, 60)
    speed.set_yticks((1, 2, 4, 8), ("1", "2", "4", "8"))
    speed.minorticks_off()
    ages.plot([p.retention for p in retentions], [p.bias for p in retentions], "o-", color="C0")
    ages.plot(
        [p.retention for p in retentions], [p.ours.purged for p in retentions], "o-", color="C3"
    )
    ages.legend(["trained / true length", "purged share"], fontsize="small")
    ages.set(title=f"σ, at cap {RATIO} × median", xlabel="σ", ylim=(0, 1.1))
    for policy, found in killed_by.items():
        # two of them are one line
        style = "o--" if policy == "resumed" else "o-"
        bias.plot([p[0] for p in found], [p[1] for p in found], style, label=policy)
    bias.set(title="length bias of restarting what was killed", ylim=(0, 1.1))
    bias.set(xlabel=f"kills per {MEDIAN:,} tokens", ylabel="trained / true length")
    bottom = [0.0] * len(waste)
    for name, colour in (("purged", "C3"), ("regenerated", "C1"), ("cancelled", "C7")):
        values = [100 * getattr(figures, name) for figures in waste.values()]
        share.barh(list(waste), values, left=bottom, color=colour, label=name)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    share.invert_yaxis()
    share.set(title="waste by account", xlabel="% of sampled tokens")
    for axis in (speed, bias, share):
        axis.legend(fontsize="small")
    for axis in (speed, ages, bias, share):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True


def run(args: argparse.Namespace) -> None:
    free, short = sweep_caps()
    reference = free[RATIOS.index(RATIO)]
    retentions = sweep_retentions(reference)
    killed_by = kills()
    waste = wastes(reference)
    print(
        f"Median {MEDIAN} tokens, prompts of {PROMPT}, {BATCH} × {GROUP} samples a batch, "
        f"Ω = {SAMPLES} where not said, Φ = a batch's mean; "
        f"{MEASURED} iterations after {WARM_UP}."
    )
    for title, table in (
        ("By cap, σ so that nothing is purged", table_caps(free)),
        ("By cap, σ = 3", table_caps(short)),
        ("What restarting costs the baseline", table_baselines(free)),
        (f"Cap {RATIO} ×, by cost of a step", table_costs()),
        (f"Cap {RATIO} ×, by Ω", table_capacities()),
        (f"Cap {RATIO} ×, by σ", table_retentions(retentions)),
        (f"Cap {RATIO} ×, by mode", table_modes(reference)),
        (f"Cap {RATIO} ×, rollouts killed", table_kills(killed_by)),
        (f"Cap {RATIO} ×, waste by account", table_wastes(waste)),
    ):
        print(f"\n#### {title}\n\n{markdown(table)}")
    if args.plots is not None:
        picture = args.plots / "c3po_sim.svg"
        if not plot(free, short, retentions, killed_by, waste, picture):
            print("no plot: pip install 'everstep[bench]' (matplotlib)", file=sys.stderr)


def add_command(commands: Any) -> None:
    parser = commands.add_parser("sim", help="simulated, over drawn lengths")
    parser.add_argument("--plots", type=Path, help="folder for c3po_sim.svg")
    parser.set_defaults(run=run)
