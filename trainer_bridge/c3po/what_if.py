"""What C3PO++ would gain on lengths that were seen: a trace in, Φ, σ and Ω out. Pure.

The trace is played again and again through the simulator (simulator.py), prompts in an order
drawn by seed. A sample takes the length of its own position in a recorded group, another attempt
that of a sibling. What had not ended when the trace was taken is completed with the length of one
that went further, so that cutting the record does not cut the tail.
"""

import bisect
import statistics
from collections.abc import Sequence

from msgspec import Struct, structs

from ...engine.errors import ConfigError
from ...engine.rollout import derive_seed
from .comparison import Figures, Setting, run_baseline, run_c3po, step_speed_up
from .simulator import StepCost
from .words import Sample

# more samples a step are simulated by so many, for a simulation costs their square
MOST_SAMPLES = 128
_CAPACITIES = (0.125, 0.25, 0.5, 1.0, 2.0)
_RETENTIONS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
_MEASURED = 30
# a candidate that is not faster by more than this is not worth its staleness
_WORTH = 1.05


class Trace(Struct, kw_only=True):
    """Output lengths in tokens, by prompt.

    finished    of samples that ended well
    unfinished  of those that had not: at least so long
    cost        of an engine's step, if known
    """

    finished: list[list[int]]
    unfinished: list[list[int]] = []
    prompt_tokens: int = 0
    cost: StepCost | None = None


class Question(Struct, kw_only=True, frozen=True):
    """What is fixed, and what is asked. None: to be recommended.

    batch       prompts of a training step; with `budget` given it follows from it
    group       samples of a prompt
    max_purged  purged share of the sampled tokens that is put up with
    max_lag     the oldest token that is put up with, in versions
    """

    group: int
    batch: int | None = None
    budget: int | None = None
    capacity: int | None = None
    retention: int | None = None
    max_purged: float = 0.01
    max_lag: int = 8
    training_share: float = 4 / 9
    seed: int = 0


class Candidate(Struct, kw_only=True, frozen=True):
    """Φ, Ω, σ and what the simulation says of them. speed-ups: over synchronous rollouts."""

    budget: int
    capacity: int
    retention: int
    rollout_speed_up: float
    step_speed_up: float
    purged: float
    length_bias: float
    """Mean trained length / mean length."""
    mean_lag: float
    max_lag: int

    def is_fit(self, question: Question) -> bool:
        return self.purged <= question.max_purged and self.max_lag <= question.max_lag


class Answer(Struct, kw_only=True, frozen=True):
    """candidates: all that were tried. best: the recommended one; unfit if none is fit.

    scale  how many real samples one simulated sample stands for
    """

    candidates: tuple[Candidate, ...]
    best: Candidate
    is_fit: bool
    mean_length: float
    longest: int
    scale: float


def what_if(trace: Trace, question: Question) -> Answer:
    """Raises ConfigError for a trace without a finished sample and for values out of range."""
    _check(trace, question)
    lengths = _Replay(trace, question)
    samples = (question.batch or 0) * question.group
    if question.budget is not None:
        samples = max(question.group, round(question.budget / lengths.mean))
    scale = max(1.0, samples / MOST_SAMPLES)
    batch = max(1, round(samples / scale / question.group))
    tried: list[Candidate] = []
    given = question.capacity
    capacities = [given] if given else [max(1, round(samples * k)) for k in _CAPACITIES]
    budget = question.budget or round(samples * lengths.mean)
    for capacity in capacities:
        setting = Setting(
            batch=batch,
            group=question.group,
            capacity=max(1, round(capacity / scale)),
            cost=_scaled(trace.cost or StepCost(), scale),
            prompt_tokens=trace.prompt_tokens,
            measured=_MEASURED,
        )
        synchronous = run_baseline("synchronous", setting, lengths)
        for retention in _retentions(question, lengths, budget / capacity):
            figures = run_c3po(
                structs.replace(setting, warm_up=10 + 2 * retention),
                lengths,
                budget=max(1, round(budget / scale)),
                retention=retention,
            )
            tried.append(
                _candidate(
                    (budget, capacity, retention), figures, synchronous, lengths.mean, question
                )
            )
            if tried[-1].is_fit(question):
                break
    fit = [candidate for candidate in tried if candidate.is_fit(question)]
    best = _fastest(fit) if fit else min(tried, key=lambda c: (c.purged, c.max_lag))
    return Answer(
        candidates=tuple(tried),
        best=best,
        is_fit=bool(fit),
        mean_length=lengths.mean,
        longest=lengths.longest,
        scale=scale,
    )


class _Replay:
    """Lengths of drawn prompts of the trace."""

    def __init__(self, trace: Trace, question: Question) -> None:
        known = sorted(length for group in trace.finished for length in group)
        self._seed = question.seed
        self._groups = [[max(1, length) for length in group] for group in trace.finished]
        for number, group in enumerate(trace.unfinished):
            completed = [
                self._complete(length, known, number, index) for index, length in enumerate(group)
            ]
            if number < len(self._groups):
                self._groups[number] += completed
            else:
                self._groups.append(completed)
        self._groups = [group for group in self._groups if group]
        self.all = sorted(length for group in self._groups for length in group)
        self.mean = statistics.fmean(self.all)
        self.longest = self.all[-1]

    def _complete(self, length: int, known: Sequence[int], *name: int) -> int:
        longer = known[bisect.bisect_right(known, length) :]
        if not longer:
            return max(1, length)
        return longer[derive_seed(self._seed, "unfinished", *name) % len(longer)]

    def __call__(self, sample: Sample) -> int:
        drawn = derive_seed(self._seed, "prompt", sample.prompt) % len(self._groups)
        group = self._groups[drawn]
        if sample.attempt == 0 and sample.index < len(group):
            return group[sample.index]
        # one sample says nothing of how far its prompt's lengths vary: then any will do
        among = group if len(group) > 1 else self.all
        return among[derive_seed(self._seed, "sample", *_parts(sample)) % len(among)]


def _parts(sample: Sample) -> tuple[str, int, int]:
    return sample.prompt, sample.index, sample.attempt


def _retentions(question: Question, lengths: _Replay, share: float) -> Sequence[int]:
    """σ to try, least first: those under which one rollout in twenty is too long are not."""
    if question.retention is not None:
        return [question.retention]
    common = lengths.all[int(0.95 * (len(lengths.all) - 1))]
    wanted = [
        retention
        for retention in _RETENTIONS
        if retention <= question.max_lag and (retention + 1) * share >= common
    ]
    return wanted or [min(question.max_lag, _RETENTIONS[-1])]


def _candidate(
    names: tuple[int, int, int],
    ours: Figures,
    synchronous: Figures,
    mean: float,
    question: Question,
) -> Candidate:
    speed_up = synchronous.seconds_per_token / ours.seconds_per_token
    budget, capacity, retention = names
    return Candidate(
        budget=budget,
        capacity=capacity,
        retention=retention,
        rollout_speed_up=speed_up,
        step_speed_up=step_speed_up(speed_up, question.training_share),
        purged=ours.purged,
        length_bias=ours.mean_length / mean,
        mean_lag=ours.mean_lag,
        max_lag=ours.max_lag,
    )


def _fastest(fit: Sequence[Candidate]) -> Candidate:
    """Of those that are nearly as fast as the fastest, the one with the freshest tokens."""
    best = max(candidate.rollout_speed_up for candidate in fit)
    near = [candidate for candidate in fit if candidate.rollout_speed_up * _WORTH >= best]
    return min(near, key=lambda candidate: (candidate.mean_lag, candidate.capacity))


def _scaled(cost: StepCost, scale: float) -> StepCost:
    """A simulated row stands for `scale` rows."""
    return StepCost(
        fixed_s=cost.fixed_s,
        row_s=cost.row_s * scale,
        prefill_token_s=cost.prefill_token_s * scale,
    )


def _check(trace: Trace, question: Question) -> None:
    if not any(trace.finished):
        raise ConfigError(
            "trace: no finished rollout; at least 1 is needed, some hundreds say more"
        )
    for name in ("group", "batch", "budget", "capacity"):
        value = getattr(question, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; accepted: an integer from 1")
    if question.batch is None and question.budget is None:
        raise ConfigError("batch is none; accepted: an integer from 1 (or give budget)")
    for name in ("retention", "max_lag"):
        value = getattr(question, name)
        if value is not None and value < 0:
            raise ConfigError(f"{name} is {value}; accepted: an integer from 0")
    for name, most in (("max_purged", 1.0), ("training_share", 0.99)):
        value = getattr(question, name)
        if not 0 <= value <= most:
            raise ConfigError(f"{name} is {value}; accepted: from 0 to {most:g}")
