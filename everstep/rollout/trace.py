"""A journal as a trace of lengths: what `everstep rollout what-if` goes by."""

import bisect
import itertools
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from msgspec import Struct

from ..engine.errors import ConfigError, JournalDamaged
from ..engine.journal.journal import Journal
from ..engine.journal.ops import Query, Summary
from ..engine.rollout import Rollout, RolloutState
from ..journal import opened
from ..trainer_bridge.c3po.simulator import StepCost
from ..trainer_bridge.c3po.what_if import Trace

_ALL = Query(limit=sys.maxsize)
# read whole, for prompts and times; the lengths of all others are in the journal's memory
MOST_READ = 2000
# fewer say nothing about what a row costs
_LEAST_TIMED = 20
_MOST_ERROR = 0.5


class Span(Struct, frozen=True):
    """When a rollout decoded, and its tokens after the first."""

    began_s: float
    ended_s: float
    num_tokens: int


class Timing(Struct, frozen=True, kw_only=True):
    """A step's cost as times tell it. error: of the tokens that it gives for each rollout, root
    mean square; fewest, most: rollouts at once, in the mean over a rollout's time."""

    cost: StepCost
    error: float
    num_rollouts: int
    fewest: float
    most: float


class Reading(Struct, kw_only=True):
    """A trace, and what of the journal it stands on.

    num_acked   of the finished: acknowledged, so only their lengths are known
    num_failed  left out: they say nothing about lengths
    group       samples of a prompt, as most prompts have
    """

    trace: Trace
    num_finished: int
    num_unfinished: int
    num_acked: int
    num_failed: int
    timing: Timing | None
    group: int
    pools: dict[str, int]


def read_trace(path: Path, pool: str | None = None) -> Reading:
    """Raises ConfigError where there is nothing to go by, JournalError for a file in use."""
    with opened(path) as journal:
        summaries = journal.list(_ALL)
        pools = Counter(s.pool for s in summaries if s.state is RolloutState.FINISHED)
        chosen = [s for s in summaries if pool in (None, s.pool)]
        finished = [s for s in chosen if s.state is RolloutState.FINISHED]
        if not finished:
            known = ", ".join(f"{name!r} ({count})" for name, count in pools.items())
            raise ConfigError(
                f"{path}: no finished rollout"
                + (f" in pool {pool!r}; accepted: {known or 'none'}" if pool is not None else "")
            )
        rollouts = _read(journal, [s for s in finished if not s.is_acked][-MOST_READ:])
    # a purge aborts: such a rollout was at least so long, as was one that is under way
    cut = [
        s
        for s in chosen
        if s.num_output_tokens and (s.state is RolloutState.ABORTED or not s.state.is_ended)
    ]
    spans = [span for rollout in rollouts if (span := _span(rollout)) is not None]
    # of those whose times are gone nobody knows whom they slowed down
    timing = step_timing(spans) if len(rollouts) >= 0.9 * len(finished) else None
    prompts = [len(rollout.prompt_ids) for rollout in rollouts]
    by_group = _by_group(finished)
    cut_by_group = _by_group(cut)
    names = [*by_group, *(name for name in cut_by_group if name not in by_group)]
    return Reading(
        trace=Trace(
            finished=[[s.num_output_tokens for s in by_group.get(name, ())] for name in names],
            unfinished=[
                [s.num_output_tokens for s in cut_by_group.get(name, ())] for name in names
            ],
            prompt_tokens=round(statistics.fmean(prompts)) if prompts else 0,
            cost=None if timing is None else timing.cost,
        ),
        num_finished=len(finished),
        num_unfinished=len(cut),
        num_acked=sum(s.is_acked for s in finished),
        num_failed=sum(s.state is RolloutState.FAILED for s in chosen),
        timing=timing,
        group=_group_size(by_group.values()),
        pools=dict(pools),
    )


def step_timing(spans: Sequence[Span]) -> Timing | None:
    """What a step costs, from when rollouts decoded and how many did meanwhile.

    With n rows a step takes f + r·n, so a rollout draws ∫ dt / (f + r·n(t)) tokens: for a given
    r / f linear in 1 / f, which least squares give. None where that says nothing: too few
    rollouts, hardly a difference between emptiest and fullest, or times that do not fit it
    (rollouts that were paused, say).
    """
    if len(spans) < _LEAST_TIMED:
        return None
    together = _integrals(spans, float)
    means = [n / (span.ended_s - span.began_s) for n, span in zip(together, spans, strict=True)]
    if max(means) < 1.5 * min(means):
        return None
    tokens = [span.num_tokens for span in spans]
    error, ratio, fixed_s = min(_fit(spans, tokens, 10 ** (k / 20)) for k in range(-80, 41))
    if error > _MOST_ERROR:
        return None
    return Timing(
        cost=StepCost(fixed_s=fixed_s, row_s=ratio * fixed_s),
        error=error,
        num_rollouts=len(spans),
        fewest=min(means),
        most=max(means),
    )


def _fit(spans: Sequence[Span], tokens: Sequence[int], ratio: float) -> tuple[float, float, float]:
    """Relative error, r / f as it was given, f."""
    steps = _integrals(spans, lambda rows: 1 / (1 + ratio * rows))
    per_s = sum(x * n for x, n in zip(steps, tokens, strict=True)) / sum(x * x for x in steps)
    missed = sum((per_s * x - n) ** 2 for x, n in zip(steps, tokens, strict=True))
    return math.sqrt(missed / sum(n * n for n in tokens)), ratio, 1 / per_s


def _integrals(spans: Sequence[Span], weight: Callable[[int], float]) -> list[float]:
    """For each span ∫ weight(number of spans that run) dt."""
    changes = sorted(
        itertools.chain(((s.began_s, 1) for s in spans), ((s.ended_s, -1) for s in spans))
    )
    times, integral, counts = [changes[0][0]], [0.0], [0]
    for time_s, change in changes:
        integral.append(integral[-1] + weight(counts[-1]) * (time_s - times[-1]))
        times.append(time_s)
        counts.append(counts[-1] + change)

    def until(time_s: float) -> float:
        # the last change of that instant: nothing passes between them
        return integral[bisect.bisect_right(times, time_s) - 1]

    return [until(span.ended_s) - until(span.began_s) for span in spans]


def _read(journal: Journal, summaries: Sequence[Summary]) -> list[Rollout]:
    rollouts = []
    for summary in summaries:
        try:
            rollout = journal.read(summary.id)
        except JournalDamaged as error:
            sys.stderr.write(f"warning: {error}\n")
            continue
        if rollout is not None:
            rollouts.append(rollout)
    return rollouts


def _span(rollout: Rollout) -> Span | None:
    began_s, ended_s = rollout.first_token_s, rollout.ended_s
    num_tokens = len(rollout.output_ids) - 1
    if began_s is None or ended_s is None or num_tokens < 1 or ended_s <= began_s:
        return None
    return Span(began_s, ended_s, num_tokens)


def _by_group(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    groups: defaultdict[str, list[Summary]] = defaultdict(list)
    for summary in sorted(summaries, key=lambda s: (s.index, s.number)):
        groups[summary.group_id].append(summary)
    return groups


def _group_size(groups: Iterable[Sequence[Summary]]) -> int:
    """As most prompts have: each sample ends well once, however often it was tried."""
    sizes = Counter(map(len, groups))
    return max(sizes, key=lambda size: (sizes[size], size))
