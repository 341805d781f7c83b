"""The scheduler against its model: every rollout ends with the tokens it has when it runs alone."""

import random
from typing import get_args

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from everstep.engine.config import BatchConfig, ResolvedKV
from everstep.engine.messages import Add, KVPolicy
from everstep.engine.rollout import SamplingParams

from ..fakes import FakeFront
from ..strategies import MAX_MODEL_LEN, POOLS, TEXTS, VOCAB_SIZE, arrivals, batches, caches
from .arena import Arena, make_batch, make_kv

POLICIES: tuple[KVPolicy, ...] = get_args(KVPolicy)


def with_tokens(add: Add, share: float) -> Add:
    """The same rollout after the death of another core: it has some of its tokens already."""
    front = FakeFront()
    front.add(add)
    alone = front.alone(add.rollout_id, VOCAB_SIZE)
    return msgspec.structs.replace(add, output_ids=alone[: int(share * len(alone))][:-1])


class SchedulerMachine(RuleBasedStateMachine):
    """Everything that a front may ask for, in any order, over memory that is checked at each read."""

    @initialize(kv=caches(), batch=batches)
    def start(self, kv: ResolvedKV, batch: BatchConfig) -> None:
        self.arena = Arena(kv, batch)

    def some(self, share: float) -> list[str]:
        """One or two of the live rollouts."""
        live = self.arena.live
        return live[int(share * len(live)) :][:2]

    @rule(group=arrivals(), is_paused=st.integers(0, 5))
    def arrive(self, group: list[Add], is_paused: int) -> None:
        for add in group:
            self.arena.add(msgspec.structs.replace(add, start_paused=is_paused == 5))

    @rule(group=arrivals(), share=st.floats(0, 1))
    def arrive_with_tokens(self, group: list[Add], share: float) -> None:
        for add in group:
            self.arena.add(with_tokens(add, share))

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        self.arena.step(count)

    @rule(share=st.floats(0, 1), is_end=st.booleans())
    def step_with_a_call_in_flight(self, share: float, is_end: bool) -> None:
        some = self.some(share)
        call = self.arena.cancel if is_end else self.arena.scheduler.pause
        self.arena.step(in_flight=lambda: call(some))

    @rule(share=st.floats(0, 1))
    def cancel(self, share: float) -> None:
        self.arena.cancel(self.some(share))

    @rule(share=st.floats(0, 1))
    def pause(self, share: float) -> None:
        self.arena.scheduler.pause([*self.some(share), "unknown"])

    @rule(share=st.floats(0, 1))
    def resume(self, share: float) -> None:
        self.arena.scheduler.resume([*self.some(share), "unknown"])

    @rule(is_short=st.booleans())
    def pause_all(self, is_short: bool) -> None:
        self.arena.scheduler.pause()
        if is_short:
            self.arena.scheduler.resume()

    @rule()
    def resume_all(self) -> None:
        self.arena.scheduler.resume()

    @rule(version=st.integers(1, 3), policy=st.sampled_from(POLICIES))
    def flip(self, version: int, policy: KVPolicy) -> None:
        """Forward, back, or to the same weights."""
        self.arena.flip(version, policy)

    @rule(
        pool=st.sampled_from(POOLS[1:]),
        more=st.none() | st.integers(-2, 12),
        is_anew=st.booleans(),
        places=st.none() | st.integers(1, 3),
    )
    def meter(self, pool: str, more: int | None, is_anew: bool, places: int | None) -> None:
        """A limit of what was drawn and some more, or of some more than it was; or none."""
        drawn, limit = self.arena.drawn.get(pool, 0), self.arena.limits.get(pool)
        base = drawn if is_anew or limit is None else limit
        self.arena.meter(pool, None if more is None else base + more, places)

    @rule(share=st.floats(0, 1))
    def poison(self, share: float) -> None:
        self.arena.runner.nonfinite.update(self.some(share)[:1])

    def teardown(self) -> None:
        """Nobody is lost."""
        if hasattr(self, "arena"):
            self.arena.finish()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)


def draw_arena(rng: random.Random) -> Arena:
    block_size = rng.randint(1, 6)
    least = -(-MAX_MODEL_LEN // block_size) + 1
    kv = make_kv(
        block_size=block_size,
        num_blocks=least + rng.choice([0, 1, 3, least, 3 * least]),
        max_model_len=MAX_MODEL_LEN,
        prefix_caching=rng.random() < 0.9,
        num_parking_blocks=rng.choice([0, 3, least, 4 * least]),
        on_pause=rng.choice(["keep", "keep", "park", "drop"]),
    )
    return Arena(
        kv, make_batch(max_num_seqs=rng.randint(1, 6), max_num_batched_tokens=rng.randint(1, 16))
    )


def draw_group(rng: random.Random) -> list[Add]:
    prompt_ids = rng.choice(TEXTS)[: rng.randint(1, 12)]
    stop_ids = rng.choice([[], [], [5], [4, 5]])
    sampling = rng.choice(
        [
            SamplingParams(),
            SamplingParams(),
            SamplingParams(min_tokens=3),
            SamplingParams(prompt_logprobs=1),
            SamplingParams(record=("routing",)),
        ]
    )
    add = Add(
        rollout_id="",
        prompt_ids=prompt_ids,
        sampling=sampling,
        seed=0,
        max_tokens=rng.randint(1, MAX_MODEL_LEN - len(prompt_ids)),
        stop_ids=stop_ids,
        banned_ids=stop_ids,
        priority=rng.choice([0, 0, 0, 1, 2]),
        client=rng.choice(["", "ann", "bob"]),
        pool=rng.choice(POOLS),
        start_paused=rng.random() < 0.05,
    )
    group = [msgspec.structs.replace(add, seed=rng.randint(0, 1)) for _ in range(rng.randint(1, 5))]
    return [with_tokens(a, rng.random()) if rng.random() < 0.2 else a for a in group]


def storm(seed: int, num_acts: int = 50) -> Arena:
    """A busy scheduler: arrivals and steps, now and then a call."""
    rng = random.Random(seed)
    arena = draw_arena(rng)
    for _ in range(num_acts):
        some = rng.sample(arena.live, min(len(arena.live), rng.randint(1, 3)))
        match rng.choices(range(10), [30, 40, 5, 8, 8, 3, 4, 3, 3, 8])[0]:
            case 0 if len(arena.live) < 12:
                for add in draw_group(rng):
                    arena.add(add)
            case 1:
                arena.step(rng.randint(1, 6))
            case 2:
                arena.cancel(some)
            case 3:
                arena.scheduler.pause(some)
            case 4:
                arena.scheduler.resume(some)
            case 5:
                arena.scheduler.pause()
                arena.step()
                arena.scheduler.resume()
            case 6:
                # sometimes another while prompts are still being written again
                for _ in range(rng.choice([1, 1, 2])):
                    arena.flip(rng.randint(1, 3), rng.choice(POLICIES))
                    if rng.random() < 0.5:
                        arena.step()
            case 7:
                calls = rng.choices(
                    [arena.cancel, arena.scheduler.pause, arena.scheduler.resume], k=2
                )
                arena.step(in_flight=lambda calls=calls, some=some: [call(some) for call in calls])
            case 8:
                arena.runner.nonfinite.update(some[:1])
            case 9:
                pool = rng.choice(POOLS[1:])
                more = rng.choice([None, 0, 1, 3, 8, 20])
                limit = None if more is None else arena.drawn.get(pool, 0) + more
                arena.meter(pool, limit, rng.choice([None, None, 1, 2]))
    arena.finish()
    return arena


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_every_rollout_ends_with_the_tokens_it_has_alone(first_seed):
    for seed in range(first_seed, first_seed + 50):
        storm(seed)
