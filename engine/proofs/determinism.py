"""`everstep doctor --determinism`: the promise of exactness, checked on this machine.

The same rollouts are generated alone, and then under every schedule that could disturb them;
each token and each logprob is compared to the bit. Where something differs, every operation is
tried by itself, alone against in a batch, to name the culprit.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from ..config import BatchConfig, ModelConfig, ResolvedKV
from ..messages import Add, Cancel, FromCore, Pause, Resume, Stats, Tokens
from ..rollout import SamplingParams, derive_seed

if TYPE_CHECKING:
    from ..core.core import Core
    from ..model.weights import Weights

Progress = Callable[[str, int, int], None]
NUM_ROLLOUTS = 10
NUM_TOKENS = 20
BLOCK = 16


class Outcome(Struct):
    """What is compared: ids and, as float32 bits in Python floats, their logprobs."""

    ids: list[int] = []
    lp_sampled: list[float] = []
    lp_temp: list[float] = []
    kept_mass: list[float] = []

    def first_difference(self, other: "Outcome") -> int | None:
        """Index of the first token that differs in any list; None if all are equal."""
        mine = list(zip(self.ids, self.lp_sampled, self.lp_temp, self.kept_mass, strict=True))
        theirs = list(zip(other.ids, other.lp_sampled, other.lp_temp, other.kept_mass, strict=True))
        if mine == theirs:
            return None
        pairs = zip(mine, theirs, strict=False)
        shorter = min(len(mine), len(theirs))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


@dataclass
class ScheduleResult:
    """One schedule: what it put the rollouts through, and what became of them."""

    name: str
    tokens: int = 0
    differing_tokens: int = 0
    first: str = ""
    disturbance: str = ""
    """What the schedule really did (preemptions, cached tokens …), so that a run which disturbed
    nothing cannot pass for a proof."""


@dataclass
class Report:
    """The outcome of `check`."""

    numerics: str
    results: list[ScheduleResult] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    """Operations that are not row-invariant here; filled only if something differed."""

    @property
    def is_exact(self) -> bool:
        return not any(result.differing_tokens for result in self.results)

    def lines(self) -> list[str]:
        """For people: one line per schedule, then the verdict."""
        out = [f"numerics {self.numerics}"]
        for r in self.results:
            verdict = (
                "0 differing bits"
                if not r.differing_tokens
                else (f"{r.differing_tokens} tokens differ, first: {r.first}")
            )
            out.append(f"{r.name:<10} {r.tokens:>5} tokens  {verdict}  ({r.disturbance})")
        if self.is_exact:
            out.append("exact: every token and logprob equals, to the bit, the rollout alone")
        else:
            names = ", ".join(self.operations) or "none by itself: the scheduler or the KV cache"
            out.append(f"NOT exact; operations that are not row-invariant: {names}")
        return out


class Trial:
    """Drives a core by hand, one step at a time, and keeps what it says."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.outcomes: dict[str, Outcome] = {}
        self.ended: set[str] = set()
        self.cached_tokens = 0

    def add(self, *adds: Add) -> None:
        for add in adds:
            self.outcomes.setdefault(add.rollout_id, Outcome())
            self._take(self.core.handle(add))

    def step(self) -> bool:
        """False once there is nothing to do."""
        events = self.core.step()
        self._take(events or [])
        return events is not None

    def run(self) -> None:
        while self.step():
            pass

    def _take(self, messages: Sequence[FromCore]) -> None:
        for message in messages:
            if not isinstance(message, Tokens):
                continue
            for tokens in message.each():
                outcome = self.outcomes[tokens.rollout_id]
                outcome.ids += tokens.ids
                outcome.lp_sampled += tokens.lp_sampled
                outcome.lp_temp += tokens.lp_temp
                outcome.kept_mass += tokens.kept_mass
                self.cached_tokens += tokens.num_cached_tokens or 0
                if tokens.finish is not None:
                    self.ended.add(tokens.rollout_id)

    def stats(self) -> Stats:
        return self.core.scheduler.stats()


class Laboratory:
    """Makes fresh cores over one set of weights."""

    def __init__(self, weights: "Weights", *, max_len: int) -> None:
        self.weights = weights
        self._max_len = max_len

    def trial(
        self,
        *,
        blocks: int = 0,
        parking: int = 0,
        chunk: int = 512,
        seqs: int = 64,
        cache: bool = True,
    ) -> Trial:
        """A core with nothing in it. blocks 0: room for everything."""
        from ..core.core import Core
        from ..core.scheduler import Scheduler
        from ..model.runner import ModelRunner

        one = -(-self._max_len // BLOCK)
        kv = ResolvedKV(
            block_size=BLOCK,
            num_blocks=1 + (blocks or one * 2 * NUM_ROLLOUTS),
            max_model_len=self._max_len,
            prefix_caching=cache,
            num_parking_blocks=parking,
        )
        batch = BatchConfig(max_num_seqs=seqs, max_num_batched_tokens=chunk)
        scheduler = Scheduler(kv, batch)
        scheduler.set_version(self.weights.digest)
        return Trial(Core(scheduler, ModelRunner(self.weights, kv, ModelConfig())))

    @property
    def one_rollout_blocks(self) -> int:
        return -(-self._max_len // BLOCK)


def draw_rollouts(vocab_size: int, count: int, *, seed: int) -> list[Add]:
    """Prompts of mixed lengths, some sharing a prefix, under every kind of sampling."""
    rng = random.Random(seed)
    shared = [rng.randrange(vocab_size) for _ in range(2 * BLOCK + 5)]
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_p=0.8, repetition_penalty=1.05),
        SamplingParams(top_k=20, min_p=0.05, frequency_penalty=0.5, presence_penalty=0.3),
        SamplingParams(temperature=1.3, logit_bias={3: 2.0, 5: -3.0}, min_tokens=4),
    ]
    adds = []
    for index in range(count):
        tail = [rng.randrange(vocab_size) for _ in range(rng.choice([1, 2, 7, 16, 33, 50]))]
        prompt = (shared[: rng.choice([16, 20, 37])] + tail) if index % 2 else tail
        adds.append(
            Add(
                rollout_id=f"r{index}",
                prompt_ids=prompt,
                sampling=kinds[index % len(kinds)],
                seed=derive_seed("determinism", seed, index),
                max_tokens=NUM_TOKENS - index % 5,
                client=f"client-{index % 3}",
            )
        )
    return adds


def check(model: str = "default", *, dtype: str = "auto", on_progress: Progress) -> Report:
    """Generate alone, then under every schedule; compare to the bit.

    Raises CheckpointError as any start does.
    """
    import msgspec
    import torch

    from ..checkpoint.checkpoint import Checkpoint
    from ..checkpoint.hub import resolve
    from ..core.core import num_free_cores
    from ..model.weights import load_weights

    torch.set_num_threads(num_free_cores())
    config = msgspec.convert({"path": model, "dtype": dtype}, ModelConfig)
    checkpoint = Checkpoint.open(resolve(model, on_progress))
    weights = load_weights(checkpoint, config, on_progress=on_progress)
    return check_weights(weights, on_progress=on_progress)


def check_weights(weights: "Weights", *, on_progress: Progress) -> Report:
    """`check` over weights in memory."""
    from ..model.runner import ModelRunner

    adds = draw_rollouts(weights.config.vocab_size, NUM_ROLLOUTS, seed=1)
    longest = max(len(add.prompt_ids) + add.max_tokens for add in adds)
    lab = Laboratory(weights, max_len=longest + 1)
    alone: dict[str, Outcome] = {}
    for index, add in enumerate(adds):
        on_progress("alone", index, len(adds))
        trial = lab.trial(cache=False)
        trial.add(add)
        trial.run()
        alone |= trial.outcomes
    runner = lab.trial().core.runner
    assert isinstance(runner, ModelRunner)
    report = Report(runner.numerics)
    schedules = list(SCHEDULES.items())
    for index, (name, schedule) in enumerate(schedules):
        on_progress("schedules", index, len(schedules))
        result = ScheduleResult(name)
        for trial in schedule(lab, adds, result):
            _compare(result, trial, alone)
        report.results.append(result)
    on_progress("schedules", len(schedules), len(schedules))
    if not report.is_exact:
        from .invariance import failing_operations

        report.operations = failing_operations(weights)
    return report


def _compare(result: ScheduleResult, trial: Trial, alone: dict[str, Outcome]) -> None:
    for rollout_id in sorted(trial.ended):
        found, expected = trial.outcomes[rollout_id], alone[rollout_id]
        result.tokens += len(expected.ids)
        at = found.first_difference(expected)
        if at is not None:
            result.differing_tokens += len(expected.ids) - at
            result.first = result.first or f"rollout {rollout_id}, token {at}"


Schedule = Callable[[Laboratory, Sequence[Add], ScheduleResult], Iterator[Trial]]


def _batched(lab: Laboratory, adds: Sequence[Add], result: ScheduleResult) -> Iterator[Trial]:
    trial = lab.trial(cache=False)
    trial.add(*adds)
    trial.run()
    result.disturbance = f"{len(adds)} at once"
    yield trial


def _chunked(lab: Laboratory, adds: Sequence[Add], result: ScheduleResult) -> Iterator[Trial]:
    trial = lab.trial(chunk=7, cache=False)
    trial.add(*adds)
    trial.run()
    result.disturbance = f"7 tokens a step, {trial.stats().steps_total} steps"
    yield trial


def _cached(lab: Laboratory, adds: Sequence[Add], result: ScheduleResult) -> Iterator[Trial]:
    trial = lab.trial()
    trial.add(*adds)
    trial.run()
    # the same again: now every prompt is in the cache
    trial.outcomes = {}
    trial.ended = set()
    trial.add(*adds)
    trial.run()
    result.disturbance = f"{trial.cached_tokens} prompt tokens from the cache"
    yield trial


def _preempted(lab: Laboratory, adds: Sequence[Add], result: ScheduleResult) -> Iterator[Trial]:
    for parking in (0, 4 * lab.one_rollout_blocks):
        trial = lab.trial(blocks=lab.one_rollout_blocks + 2, parking=parking)
        for index, add in enumerate(adds):
            trial.add(replace(add, priority=index // 2))
            for _ in range(4):
                trial.step()
        trial.run()
        stats = trial.stats()
        result.disturbance += (
            f"{', ' if result.disturbance else ''}{stats.preemptions_total} preemptions "
            f"{'parked' if parking else 'recomputed'}"
        )
        yield trial


def _paused(lab: Laboratory, adds: Sequence[Add], result: ScheduleResult) -> Iterator[Trial]:
    rng = random.Random(2)
    trial = lab.trial(blocks=lab.one_rollout_blocks * 4, parking=lab.one_rollout_blocks * 2)
    trial.add(*adds)
    pauses = 0
    ids = [add.rollout_id for add in adds]
    while trial.step() or len(trial.ended) < len(adds):
        some = rng.sample(ids, 3)
        trial.core.handle(Pause(some))
        pauses += len(some)
        trial.step()
        trial.core.handle(Resume(rng.sample(ids, 5)))
        if not trial.step():
            trial.core.handle(Resume(None))
    result.disturbance = f"{pauses} pauses"
    yield trial


def _resumed(lab: Laboratory, adds: Sequence[Add], result: ScheduleResult) -> Iterator[Trial]:
    first = lab.trial(chunk=64)
    first.add(*adds)
    for _ in range(NUM_TOKENS // 2):
        first.step()
    # a new core, as after a kill: it gets the tokens and nothing else
    second = lab.trial(chunk=64)
    moved = 0
    for add in adds:
        if add.rollout_id in first.ended:
            continue
        outcome = first.outcomes[add.rollout_id]
        second.outcomes[add.rollout_id] = outcome
        moved += len(outcome.ids)
        second.add(
            Add(
                rollout_id=add.rollout_id,
                prompt_ids=add.prompt_ids,
                output_ids=list(outcome.ids),
                sampling=add.sampling,
                seed=add.seed,
                max_tokens=add.max_tokens,
                client=add.client,
            )
        )
    first.core.handle(Cancel([add.rollout_id for add in adds]))
    second.run()
    second.ended |= first.ended
    second.outcomes |= {i: first.outcomes[i] for i in first.ended}
    result.disturbance = f"new core after {moved} tokens, nothing kept but tokens"
    yield second


def _displaced(lab: Laboratory, adds: Sequence[Add], result: ScheduleResult) -> Iterator[Trial]:
    trial = lab.trial(seqs=3)
    for index, add in enumerate(adds):
        trial.add(replace(add, priority=index))
        trial.step()
    trial.run()
    result.disturbance = (
        f"rising priorities over 3 slots, {trial.stats().preemptions_total} displaced"
    )
    yield trial


SCHEDULES: dict[str, Schedule] = {
    "batched": _batched,
    "chunked": _chunked,
    "cached": _cached,
    "preempted": _preempted,
    "paused": _paused,
    "resumed": _resumed,
    "displaced": _displaced,
}
