"""C3PO++ beside its baselines over the same lengths, in figures per delivered token."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args

from msgspec import Struct

from .baselines import Step, stop_at, synchronous
from .config import C3poConfig, Mode
from .simulator import Fates, Iteration, Lengths, Simulator, StepCost

Baseline = Literal["synchronous", "restart", "resume"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)


class Figures(Struct, kw_only=True, frozen=True):
    """One way of running rollouts, over the iterations that were measured.

    seconds        rollout phases, in all
    sampled        tokens; those below are shares of it
    mean_length    of what was trained, in tokens
    mean_lag       versions between sampling and training, over trained tokens
    """

    seconds: float
    sampled: int
    delivered: int
    num_samples: int
    purged: float = 0.0
    regenerated: float = 0.0
    cancelled: float = 0.0
    mean_lag: float = 0.0
    max_lag: int = 0
    tokens_per_iteration: tuple[int, ...] = ()
    """Delivered, by iteration."""

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.delivered if self.delivered else float("inf")

    @property
    def mean_length(self) -> float:
        return self.delivered / self.num_samples if self.num_samples else 0.0

    @property
    def wasted(self) -> float:
        return self.purged + self.regenerated + self.cancelled

    @property
    def variation(self) -> float:
        """Standard deviation of the tokens per iteration, as a share of their mean."""
        counts = self.tokens_per_iteration
        return statistics.pstdev(counts) / statistics.fmean(counts) if sum(counts) else 0.0


def figures_of(iterations: Sequence[Iteration]) -> Figures:
    """Of C3PO++."""
    books = [iteration.books for iteration in iterations]
    sampled = sum(row.sampled for row in books)
    lags = [
        (iteration.number - span.version, span.count)
        for iteration in iterations
        for group in iteration.groups
        for member in group.samples
        for span in member.spans
    ]
    delivered = sum(row.delivered for row in books)
    return Figures(
        seconds=sum(iteration.seconds for iteration in iterations),
        sampled=sampled,
        delivered=delivered,
        num_samples=sum(len(g.samples) for iteration in iterations for g in iteration.groups),
        purged=sum(row.purged for row in books) / max(1, sampled),
        regenerated=sum(row.regenerated for row in books) / max(1, sampled),
        cancelled=sum(row.cancelled for row in books) / max(1, sampled),
        mean_lag=sum(lag * count for lag, count in lags) / max(1, delivered),
        max_lag=max((lag for lag, _ in lags), default=0),
        tokens_per_iteration=tuple(row.delivered for row in books),
    )


def figures_of_steps(steps: Sequence[Step]) -> Figures:
    """Of a baseline."""
    sampled = sum(step.sampled for step in steps)
    counts = tuple(sum(step.lengths) for step in steps)
    return Figures(
        seconds=sum(step.seconds for step in steps),
        sampled=sampled,
        delivered=sum(counts),
        num_samples=sum(len(step.lengths) for step in steps),
        cancelled=sum(step.wasted for step in steps) / max(1, sampled),
        tokens_per_iteration=counts,
    )


class Setting(Struct, kw_only=True, frozen=True):
    """What both sides share. warm_up: iterations that are run and not measured, for a pipeline
    that starts empty delivers late."""

    batch: int
    """Prompts of a synchronous step."""
    group: int
    capacity: int
    cost: StepCost = StepCost()
    prompt_tokens: int = 0
    warm_up: int = 10
    measured: int = 30


def run_c3po(
    setting: Setting,
    lengths: Lengths,
    *,
    budget: int,
    retention: int,
    mode: Mode = "generated",
    fates: Fates | None = None,
    recomputes_kv: bool = False,
    prompts: Callable[[], Iterator[str]] | None = None,
) -> Figures:
    """C3PO++. What fails is tried again for ever, so that no prompt is given up."""
    config = C3poConfig(
        mode=mode,
        budget=budget,
        capacity=setting.capacity,
        retention=retention,
        group=setting.group,
        max_reissues=10**6,
    )
    simulator = Simulator(
        config,
        (prompts or endless)(),
        lengths,
        fates=fates,
        cost=setting.cost,
        prompt_tokens=setting.prompt_tokens,
        recomputes_kv=recomputes_kv,
    )
    return figures_of(simulator.run(setting.warm_up + setting.measured)[setting.warm_up :])


def run_baseline(
    which: Baseline,
    setting: Setting,
    lengths: Lengths,
    *,
    prompts: Callable[[], Iterator[str]] | None = None,
) -> Figures:
    """A baseline; see baselines.py."""
    given = (prompts or endless)()
    steps: Iterable[Step]
    if which == "synchronous":
        steps = synchronous(
            given,
            lengths,
            batch=setting.batch,
            group=setting.group,
            capacity=setting.capacity,
            cost=setting.cost,
            prompt_tokens=setting.prompt_tokens,
        )
    else:
        steps = stop_at(
            given,
            lengths,
            batch=setting.batch,
            group=setting.group,
            capacity=setting.capacity,
            cost=setting.cost,
            resubmission=which,
            prompt_tokens=setting.prompt_tokens,
        )
    found = list(itertools.islice(steps, setting.warm_up + setting.measured))
    return figures_of_steps(found[setting.warm_up :])


def endless() -> Iterator[str]:
    """Names of prompts, without end."""
    return (str(number) for number in itertools.count())


def retention_without_purges(longest: int, *, budget: int, capacity: int) -> int:
    """The least σ under which no rollout of up to `longest` tokens is ever purged.

    Φ tokens over at most Ω rollouts are at least Φ // Ω for each that is there all the time, and
    a rollout lives through σ whole iterations, besides the one that it was admitted in. Where
    Φ < Ω there is no such σ by this count, and the answer is what Φ = Ω would need.
    """
    return -(-longest // max(1, budget // capacity))


def step_speed_up(rollout_speed_up: float, training_share: float) -> float:
    """Of a whole step, where training takes `training_share` of the slower side's step and as
    long on the faster one (Amdahl)."""
    if not rollout_speed_up:
        return 0.0
    return 1.0 / (training_share + (1.0 - training_share) / rollout_speed_up)
