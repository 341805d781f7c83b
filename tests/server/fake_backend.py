"""A core that says what it is told to, one token per rollout and step, under the real manager."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from everstep.engine.checkpoint.manifest import Version
from everstep.engine.messages import (
    Add,
    Cancel,
    Died,
    FromCore,
    Meter,
    Metered,
    Pause,
    Ready,
    Rejected,
    Resume,
    RolloutTokens,
    StateChanged,
    Stats,
    ToCore,
    Tokens,
)
from everstep.engine.rollout import FinishReason

VOCAB = 512
Reply = Callable[[Add, int], int]
"""(what is asked, index of the output token) → token id."""


def lp_of(token_id: int) -> float:
    """A logprob that tells its token."""
    return -token_id / 128


class FakeBackend:
    """`reply` decides the tokens; steps are made while `gate` is set.

    paused       ids of rollouts that stand still
    step_s       how long a step takes
    cancelled    ids of rollouts that the manager cancelled
    adds         what was submitted, in order
    fail_at      (output index, detail): the rollout fails there
    """

    def __init__(self, reply: Reply, *, max_model_len: int = 512) -> None:
        self.reply = reply
        self.ready = Ready(
            core_id="core-0",
            vocab_size=VOCAB,
            max_model_len=max_model_len,
            num_blocks=100,
            block_size=16,
            max_num_seqs=8,
            version=7,
            digest="0123456789abcdef",
            numerics="fake",
            num_moe_layers=2,
            num_experts=8,
            num_experts_per_tok=2,
            eos_ids=[1],
        )
        self.gate = asyncio.Event()
        self.gate.set()
        self.adds: list[Add] = []
        self.cancelled: list[str] = []
        self.fail_at: tuple[int, str] | None = None
        self.lp = lp_of
        self.reject: str | None = None
        self.paused: set[str] = set()
        self.is_paused = False
        self.step_s = 0.0
        self.drawn: dict[str, int] = {}
        self._limits: dict[str, int] = {}
        self._held: set[str] = set()
        self._inbox: list[FromCore] = []
        self._live: dict[str, tuple[Add, int]] = {}
        self._news = asyncio.Event()

    async def start(self, _: Version | None = None, /) -> Ready:
        return self.ready

    def send(self, messages: Sequence[ToCore]) -> None:
        for message in messages:
            match message:
                case Add():
                    self.adds.append(message)
                    if self.reject is None:
                        self._live[message.rollout_id] = (message, len(message.output_ids))
                        if message.start_paused or self.is_paused:
                            self._move([message.rollout_id], "paused")
                    else:
                        self._inbox.append(Rejected(message.rollout_id, self.reject))
                case Cancel(rollout_ids=ids):
                    self.cancelled += ids
                    for rollout_id in ids:
                        self._live.pop(rollout_id, None)
                        self.paused.discard(rollout_id)
                case Pause(rollout_ids=ids):
                    self.is_paused |= ids is None
                    self._move(self._live if ids is None else ids, "paused")
                case Meter(pool=pool, limit=limit):
                    self.drawn.setdefault(pool, 0)
                    self._limits.pop(pool, None)
                    if limit is not None:
                        self._limits[pool] = limit
                    self._inbox.append(Metered(pool, self.drawn[pool]))
                case Resume(rollout_ids=ids):
                    self.is_paused &= ids is not None
                    self._move(list(self.paused) if ids is None else ids, "running")
        self._hold()
        self._news.set()

    def _room(self, pool: str) -> bool:
        limit = self._limits.get(pool)
        return limit is None or self.drawn[pool] < limit

    def _hold(self) -> None:
        """Rollouts of pools at their limit stand as paused ones do."""
        for one, (add, _) in self._live.items():
            if one not in self.paused and (one in self._held) == self._room(add.pool):
                self._held ^= {one}
                self._inbox.append(
                    StateChanged([(one, "paused" if one in self._held else "queued")])
                )

    def _move(self, rollout_ids: Iterable[str], state: Literal["paused", "running"]) -> None:
        moved = [one for one in rollout_ids if one in self._live]
        self.paused.update(moved) if state == "paused" else self.paused.difference_update(moved)
        self._inbox.append(StateChanged([(one, state) for one in moved]))

    @property
    def _running(self) -> dict[str, tuple[Add, int]]:
        still = self.paused | self._held
        return {one: work for one, work in self._live.items() if one not in still}

    def die(self) -> None:
        self._inbox.append(Died("killed by the test"))
        self._news.set()

    def say(self, stats: Stats) -> None:
        self._inbox.append(stats)
        self._news.set()

    async def receive(self) -> list[FromCore]:
        while True:
            if self._inbox:
                messages, self._inbox = self._inbox, []
                return messages
            if self._running and self.gate.is_set():
                await asyncio.sleep(self.step_s)
                if self._running and not self._inbox:
                    return [self._step()]
            elif self._running:
                gate = asyncio.create_task(self.gate.wait())
                news = asyncio.create_task(self._news.wait())
                await asyncio.wait({gate, news}, return_when=asyncio.FIRST_COMPLETED)
                gate.cancel()
                news.cancel()
            else:
                await self._news.wait()
            self._news.clear()

    async def close(self) -> None:
        self._live.clear()

    def _step(self) -> Tokens:
        rollouts, drawn = [], {}
        for rollout_id, (add, index) in list(self._running.items()):
            if not self._room(add.pool):
                continue
            tokens = self._token(add, index)
            if add.pool in self._limits:
                self.drawn[add.pool] += len(tokens.ids)
                drawn[add.pool] = self.drawn[add.pool]
            rollouts.append(tokens)
            self._live[rollout_id] = (add, index + 1)
            if tokens.finish is not None:
                del self._live[rollout_id]
        self._hold()
        return Tokens(7, self.ready.digest, rollouts, drawn=drawn)

    def _token(self, add: Add, index: int) -> RolloutTokens:
        sampling = add.sampling
        if self.fail_at is not None and self.fail_at[0] == index:
            finish = FinishReason("error", detail=self.fail_at[1])
            return RolloutTokens(rollout_id=add.rollout_id, start=index, finish=finish)
        token_id = self.reply(add, index)
        value = self.lp(token_id)
        finish = None
        if token_id in add.stop_ids:
            finish = FinishReason("stop", token_id)
        elif index + 1 >= add.max_tokens:
            finish = FinishReason("length")
        tokens = RolloutTokens(
            rollout_id=add.rollout_id,
            start=index,
            ids=[token_id],
            lp_sampled=[value / 4],
            lp_temp=[value / 2],
            kept_mass=[1.0],
            flags=[1],
            finish=finish,
        )
        if "lp_raw" in sampling.record:
            tokens.lp_raw = [value]
        if "entropy" in sampling.record:
            tokens.entropy = [0.5]
        if "kept_ids" in sampling.record:
            tokens.kept_ids = [[token_id]]
        if sampling.top_logprobs:
            tokens.top = [[(i, self.lp(i)) for i in range(2, 2 + sampling.top_logprobs)]]
        if index == 0:
            self._add_prompt(tokens, add)
        return tokens

    def _add_prompt(self, tokens: RolloutTokens, add: Add) -> None:
        tokens.num_cached_tokens = len(add.prompt_ids) // 2
        wanted = add.sampling.prompt_logprobs
        if wanted is not None:
            tokens.prompt_start = 1
            tokens.prompt_lp = [self.lp(i) for i in add.prompt_ids[1:]]
            tokens.prompt_top = [
                [(i, self.lp(i)) for i in range(2, 2 + wanted)] for _ in add.prompt_ids[1:]
            ]
        if "routing" in add.sampling.record:
            rows = len(add.prompt_ids)
            tokens.routing_ids = bytes(range(4)) * rows
            tokens.routing_weights = b"\0\0\x80?" * 4 * rows
