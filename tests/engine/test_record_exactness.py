"""Everything that a rollout may ask for, to the bit, whatever happened to it on the way.

test_exactness_machine.py compares tokens and their logprobs. Here rollouts ask for all records at
once (prompt logprobs and alternatives, routing, kept ids, entropy), on a core whose paused rollouts
keep, park or drop their KV, whose pools have limits and places, and which may be killed; each
record must be told once, and be that of the rollout alone.
"""

import random
from typing import Any

import msgspec
import pytest

from everstep.engine.config import BatchConfig, ModelConfig, ResolvedKV
from everstep.engine.core.core import Core
from everstep.engine.core.scheduler import Scheduler
from everstep.engine.messages import (
    Add,
    Cancel,
    Meter,
    Pause,
    PlainTokens,
    Resume,
    RolloutTokens,
    ToCore,
    Tokens,
)
from everstep.engine.model.runner import ModelRunner
from everstep.engine.model.weights import Weights
from everstep.engine.rollout import SamplingParams

from .test_exactness_machine import PREFIX, weights_of

BLOCK, MAX_LEN = 8, 64
PER_TOKEN = ("ids", "lp_sampled", "lp_temp", "kept_mass", "flags", "lp_raw", "entropy")
LISTS = ("kept_ids", "top")
POOLS = ("", "math", "code")
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(prompt_logprobs=3, record=("routing", "lp_raw", "entropy")),
    SamplingParams(prompt_logprobs=0, temperature=0.0, top_logprobs=4),
    SamplingParams(record=("routing",), min_tokens=4, presence_penalty=0.5),
    SamplingParams(
        top_p=0.6, record=("kept_ids", "entropy"), top_logprobs=2, logprobs_mode="sampled"
    ),
    SamplingParams(top_k=9, record=("lp_raw",), top_logprobs=1, repetition_penalty=1.3),
]


class Told:
    """What a core said of one rollout: records by token, by prompt position, by computed row."""

    def __init__(self) -> None:
        self.tokens: list[dict[str, Any]] = []
        self.prompt: dict[int, tuple[Any, Any]] = {}
        self.routing: dict[int, tuple[bytes, bytes]] = {}
        self.has_ended = False

    def take(self, news: RolloutTokens, num_routed: int) -> None:
        assert not self.has_ended
        assert not news.ids or news.start == len(self.tokens)
        for index in range(len(news.ids)):
            names = [name for name in PER_TOKEN + LISTS if getattr(news, name)]
            self.tokens.append({name: getattr(news, name)[index] for name in names})
        for index, lp in enumerate(news.prompt_lp):
            top = news.prompt_top[index] if news.prompt_top else None
            self._note(self.prompt, news.prompt_start + index, (lp, top))
        count = len(news.routing_ids) // num_routed
        size = len(news.routing_weights) // max(count, 1)
        for index in range(count):
            ids = news.routing_ids[index * num_routed : (index + 1) * num_routed]
            weights = news.routing_weights[index * size : (index + 1) * size]
            self._note(self.routing, news.routing_start + index, (ids, weights))
        self.has_ended = news.finish is not None

    def _note(self, of: dict[int, Any], position: int, record: Any) -> None:
        assert position not in of, f"position {position} is told twice"
        of[position] = record

    def check(self, alone: "Told") -> None:
        """It is the beginning of the rollout alone, or all of it."""
        assert self.tokens == alone.tokens[: len(self.tokens)]
        assert self.prompt.items() <= alone.prompt.items()
        assert self.routing.items() <= alone.routing.items()
        if self.has_ended:
            assert len(self.tokens) == len(alone.tokens)
            assert (self.prompt, self.routing) == (alone.prompt, alone.routing)


class World:
    """Cores one after another over the same weights, and what they told."""

    def __init__(self, weights: Weights, kv: ResolvedKV, batch: BatchConfig) -> None:
        self.weights, self.kv, self.batch = weights, kv, batch
        self.told: dict[str, Told] = {}
        self.adds: dict[str, Add] = {}
        config = weights.config
        self.num_routed = weights.num_moe_layers * config.num_experts_per_tok
        self.core = self._new_core()

    def _new_core(self) -> Core:
        scheduler = Scheduler(self.kv, self.batch)
        scheduler.set_version(self.weights.digest)
        return Core(scheduler, ModelRunner(self.weights, self.kv, ModelConfig()))

    @property
    def live(self) -> list[str]:
        return [name for name in self.adds if not self.told[name].has_ended]

    def say(self, message: ToCore) -> None:
        self._take(self.core.handle(message))

    def add(self, add: Add) -> None:
        self.adds[add.rollout_id] = add
        self.told[add.rollout_id] = Told()
        self.say(add)

    def cancel(self, names: list[str]) -> None:
        self.say(Cancel(names))
        for name in names:
            del self.adds[name]

    def step(self) -> bool:
        events = self.core.step()
        self._take(events or [])
        self.core.scheduler.check_invariants()
        return events is not None

    def kill(self) -> None:
        """The next core gets prompts and tokens; it computes every row again, and tells of them."""
        self.core = self._new_core()
        for name in self.live:
            told, add = self.told[name], self.adds[name]
            told.prompt, told.routing = {}, {}
            ids = [token["ids"] for token in told.tokens]
            self.say(msgspec.structs.replace(add, output_ids=ids, start_paused=False))

    def _take(self, messages: list[Any]) -> None:
        for message in messages:
            if isinstance(message, Tokens):
                for news in message.each():
                    if isinstance(news, RolloutTokens) and news.rollout_id in self.told:
                        self.told[news.rollout_id].take(news, self.num_routed)
            assert not isinstance(message, PlainTokens)


ALONE: dict[bytes, Told] = {}


def alone(weights: Weights, add: Add) -> Told:
    """The rollout by itself in a core without a cache, its prompt in one step."""
    plain = msgspec.structs.replace(
        add, rollout_id="alone", priority=0, client="", pool="", start_paused=False
    )
    key = str(weights.dtype).encode() + msgspec.msgpack.encode(plain)
    if key not in ALONE:
        kv = ResolvedKV(
            block_size=16,
            num_blocks=1 + MAX_LEN // 16,
            max_model_len=MAX_LEN,
            prefix_caching=False,
            num_parking_blocks=0,
        )
        world = World(weights, kv, BatchConfig(max_num_seqs=1, max_num_batched_tokens=512))
        world.add(plain)
        while world.step():
            pass
        ALONE[key] = world.told["alone"]
    return ALONE[key]


def draw_world(rng: random.Random, weights: Weights) -> World:
    least = MAX_LEN // BLOCK + 1
    kv = ResolvedKV(
        block_size=BLOCK,
        num_blocks=least + rng.choice([0, 2, 6, 3 * least]),
        max_model_len=MAX_LEN,
        prefix_caching=rng.random() < 0.8,
        num_parking_blocks=rng.choice([0, 3, least, 4 * least]),
        on_pause=rng.choice(["keep", "keep", "park", "drop"]),
    )
    tokens = rng.choice([3, 8, 64])
    return World(
        weights, kv, BatchConfig(max_num_seqs=rng.choice([2, 3, 8]), max_num_batched_tokens=tokens)
    )


def draw_group(rng: random.Random, number: int) -> list[Add]:
    tail = [rng.randrange(250) for _ in range(rng.choice([0, 1, 5, 9]))]
    prompt = PREFIX[: rng.choice([0, 7, 8, 9, 24, 30])] + tail or [5]
    add = Add(
        rollout_id="",
        prompt_ids=prompt,
        sampling=rng.choice(SAMPLINGS),
        seed=rng.randrange(3),
        max_tokens=rng.randint(4, 12),
        stop_ids=[250, 251],
        banned_ids=[250, 251],
        priority=rng.choice([0, 0, 1, 2]),
        client=rng.choice(["", "ann"]),
        pool=rng.choice(POOLS),
        start_paused=rng.random() < 0.1,
    )
    return [
        msgspec.structs.replace(add, rollout_id=f"r{number}.{i}", seed=add.seed + i)
        for i in range(rng.randint(1, 3))
    ]


def storm(seed: int, weights: Weights, num_acts: int = 40) -> None:
    rng = random.Random(seed)
    world = draw_world(rng, weights)
    for number in range(num_acts):
        some = rng.sample(world.live, min(len(world.live), rng.randint(1, 2)))
        match rng.choices(range(7), [25, 45, 4, 8, 8, 8, 2])[0]:
            case 0 if len(world.live) < 9:
                for add in draw_group(rng, number):
                    world.add(add)
            case 1:
                for _ in range(rng.randint(1, 4)):
                    world.step()
            case 2:
                world.cancel(some)
            case 3:
                world.say(Pause(some))
            case 4:
                world.say(Resume(some))
            case 5:
                limit = rng.choice([None, 5, 20, 60])
                world.say(Meter(rng.choice(POOLS[1:]), limit, rng.choice([None, 1, 2])))
            case 6:
                world.kill()
    for pool in POOLS[1:]:
        world.say(Meter(pool, None, None))
    world.say(Resume(None))
    while world.step():
        pass
    assert not world.live, f"never ended: {world.live}"
    for name, add in world.adds.items():
        world.told[name].check(alone(weights, add))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_records_are_those_of_the_rollout_alone(tiny_checkpoint, dtype):
    for seed in range(16):
        storm(seed, weights_of(tiny_checkpoint, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_records_are_those_of_the_rollout_alone_in_many_storms(tiny_checkpoint, dtype):
    for seed in range(1000, 1400):
        storm(seed, weights_of(tiny_checkpoint, dtype))
