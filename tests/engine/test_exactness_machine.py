"""The promise of exactness over random schedules, with the real runner on a tiny Ring model.

Each rollout that ends is compared, token by token and logprob by logprob, to the bit, with the
same rollout generated alone by a fresh core without a cache.
"""

from functools import cache
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from everstep import kernels
from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.config import ModelConfig
from everstep.engine.messages import Add, Cancel, Pause, Resume
from everstep.engine.model import model
from everstep.engine.model.weights import Weights, load_weights
from everstep.engine.proofs import invariance
from everstep.engine.proofs.determinism import BLOCK, Laboratory, Outcome, Trial, check_weights
from everstep.engine.rollout import SamplingParams

from ..levels import EMULATED, LEVELS, REAL, quick, use_level

MAX_LEN = 96
MAX_TOKENS = 14

SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.7, repetition_penalty=1.2),
    SamplingParams(top_k=7, presence_penalty=0.5, frequency_penalty=0.4),
    SamplingParams(min_p=0.1, temperature=1.5, min_tokens=5, logit_bias={1: 3.0, 9: -4.0}),
]
PREFIX = [(7 * i * i + 3 * i) % 250 for i in range(60)]


@cache
def weights_of(folder: Path, dtype: str, level: str = REAL[0]) -> Weights:
    config = msgspec.convert({"dtype": dtype}, ModelConfig)
    with use_level(level):
        return load_weights(Checkpoint.open(folder), config, on_progress=lambda *_: None)


class ExactnessMachine(RuleBasedStateMachine):
    """Arrivals, chunk sizes, cache hits, preemptions, pauses, cancels, priorities, new cores."""

    weights: ClassVar[Weights]
    alone: ClassVar[dict[bytes, Outcome]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.adds: dict[str, Add] = {}
        self.cancelled: set[str] = set()

    @initialize(
        chunk=st.sampled_from([3, 8, 64]),
        blocks=st.sampled_from([MAX_LEN // BLOCK, MAX_LEN // BLOCK + 2, 30]),
        parking=st.sampled_from([0, 4, 40]),
        seqs=st.sampled_from([2, 3, 8]),
        cache=st.booleans(),
    )
    def start(self, chunk: int, blocks: int, parking: int, seqs: int, cache: bool) -> None:
        self.lab = Laboratory(self.weights, max_len=MAX_LEN)
        self.kind = {"chunk": chunk, "blocks": blocks, "parking": parking, "seqs": seqs}
        self.cache = cache
        self.trial = self.lab.trial(**self.kind, cache=cache)

    @rule(
        shared=st.integers(0, 60),
        tail=st.lists(st.integers(0, 250), max_size=20),
        sampling=st.sampled_from(SAMPLINGS),
        seed=st.integers(0, 3),
        max_tokens=st.integers(1, MAX_TOKENS),
        priority=st.integers(0, 2),
        samples=st.integers(1, 3),
        paused=st.booleans(),
    )
    def add(self, shared, tail, sampling, seed, max_tokens, priority, samples, paused) -> None:
        prompt = PREFIX[:shared] + tail or [5]
        for sample in range(samples):
            add = Add(
                rollout_id=f"r{len(self.adds)}",
                prompt_ids=prompt,
                sampling=sampling,
                seed=seed * 1000 + sample,
                max_tokens=max(max_tokens, sampling.min_tokens),
                stop_ids=[250, 251],
                banned_ids=[250, 251],
                priority=priority,
                client=f"c{seed}",
                start_paused=paused,
            )
            self.adds[add.rollout_id] = add
            self.trial.add(add)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.trial.step()

    @precondition(lambda self: self.adds)
    @rule(data=st.data(), what=st.sampled_from([Pause, Resume, Cancel]))
    def control(self, data: st.DataObject, what: type) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.adds)), min_size=1, max_size=3))
        if what is Cancel:
            ids = ids[:1]
            self.cancelled |= {i for i in ids if i not in self.trial.ended}
        self.trial.core.handle(what(ids))

    @rule()
    def pause_or_resume_all(self) -> None:
        self.trial.core.handle(Pause(None))
        self.trial.step()
        self.trial.core.handle(Resume(None))

    @rule(chunk=st.sampled_from([3, 64]))
    def new_core(self, chunk: int) -> None:
        """As after kill -9: the next core gets prompts and tokens, and nothing else."""
        old, self.kind = self.trial, self.kind | {"chunk": chunk}
        self.trial = self.lab.trial(**self.kind, cache=self.cache)
        self.trial.outcomes, self.trial.ended = old.outcomes, old.ended
        for rollout_id, add in self.adds.items():
            if rollout_id not in old.ended | self.cancelled:
                tokens = list(old.outcomes[rollout_id].ids)
                self.trial.add(msgspec.structs.replace(add, output_ids=tokens, start_paused=False))

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "trial"):
            self.trial.core.scheduler.check_invariants()
            for outcome in self.trial.outcomes.values():
                assert len(outcome.ids) == len(outcome.lp_sampled) == len(outcome.kept_mass)

    def teardown(self) -> None:
        if not hasattr(self, "trial"):
            return
        self.trial.core.handle(Resume(None))
        self.trial.run()
        assert self.trial.ended | self.cancelled >= self.adds.keys(), "a rollout never ended"
        for rollout_id, add in self.adds.items():
            found, expected = self.trial.outcomes[rollout_id], self._alone(add)
            if rollout_id in self.cancelled:
                count = len(found.ids)
                assert found.ids == expected.ids[:count]
                assert found.lp_sampled == expected.lp_sampled[:count]
            else:
                assert found.first_difference(expected) is None, rollout_id

    def _alone(self, add: Add) -> Outcome:
        plain = msgspec.structs.replace(
            add, rollout_id="alone", priority=0, client="", start_paused=False
        )
        key = msgspec.msgpack.encode(plain)
        if key not in self.alone:
            trial: Trial = self.lab.trial(cache=False)
            trial.add(plain)
            trial.run()
            self.alone[key] = trial.outcomes["alone"]
        return self.alone[key]


def machine_of(folder: Path, dtype: str, level: str) -> type[ExactnessMachine]:
    held = {"weights": weights_of(folder, dtype, level), "alone": {}}
    return type("Machine", (ExactnessMachine,), held)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", quick(LEVELS))
def test_every_schedule_gives_the_bits_of_the_rollout_alone(tiny_checkpoint, level, dtype) -> None:
    machine = machine_of(tiny_checkpoint, dtype, level)
    machine.TestCase.settings = settings(
        max_examples=5 if level in EMULATED else 15,
        stateful_step_count=12,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    with use_level(level):
        machine.TestCase().runTest()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", LEVELS)
def test_thousands_of_schedules_give_the_bits_of_the_rollout_alone(
    tiny_checkpoint, level, dtype
) -> None:
    machine = machine_of(tiny_checkpoint, dtype, level)
    machine.TestCase.settings = settings(
        max_examples=400,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    with use_level(level):
        machine.TestCase().runTest()


def test_one_and_two_threads_give_equal_bits(tiny_checkpoint) -> None:
    weights = weights_of(tiny_checkpoint, "bfloat16")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            trial = Laboratory(weights, max_len=MAX_LEN).trial()
            trial.add(
                Add(rollout_id="a", prompt_ids=PREFIX, sampling=SAMPLINGS[0], seed=1, max_tokens=12)
            )
            trial.run()
            found.append(trial.outcomes["a"])
    finally:
        torch.set_num_threads(before)
    assert found[0].first_difference(found[1]) is None


def test_the_user_check_disturbs_what_it_compares_and_finds_no_difference(tiny_checkpoint) -> None:
    report = check_weights(weights_of(tiny_checkpoint, "bfloat16"), on_progress=lambda *_: None)
    assert report.is_exact, "\n".join(report.lines())
    said = {result.name: result.disturbance for result in report.results}
    assert "0 prompt tokens" not in said["cached"]
    assert not said["preempted"].startswith("0 ")
    assert all(result.tokens for result in report.results)


def test_the_user_check_names_an_operation_that_sees_its_neighbours(
    tiny_checkpoint, monkeypatch
) -> None:
    def leaky(x: torch.Tensor, weights: kernels.GateUp) -> torch.Tensor:
        return kernels.gate_up(x, weights) * (1.0 + 1e-2 * (x.shape[0] > 1))

    monkeypatch.setattr(model.KernelOperations, "gate_up", lambda _, *given: leaky(*given))
    monkeypatch.setattr(invariance, "gate_up", leaky)
    # operation by operation: the C++ step does not come back to Python in between
    monkeypatch.setattr("everstep.engine.model.step.compile_step", lambda *_: None)
    report = check_weights(weights_of(tiny_checkpoint, "float32"), on_progress=lambda *_: None)
    assert not report.is_exact
    assert report.operations == ["gate_up"]
    assert "NOT exact" in report.lines()[-1]
