"""A core that answers at once: tokens are a function of (seed, position) alone.

It carries the manager's messages as a real backend does, in steps of one token for every rollout
it holds, and can be told to die.
"""

import asyncio
import hashlib
from collections.abc import Sequence

from everstep.engine.checkpoint.manifest import Version
from everstep.engine.messages import (
    Add,
    Cancel,
    Died,
    FromCore,
    Ready,
    RolloutTokens,
    Shutdown,
    ToCore,
    Tokens,
)
from everstep.engine.rollout import FinishReason

VOCAB = 256


def token_of(seed: int, position: int) -> int:
    data = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=2).digest()
    return int.from_bytes(data, "little") % VOCAB


class FakeBackend:
    """`steps_to_die`: after so many steps it dies, and every start after that fails too."""

    def __init__(
        self, *, max_model_len: int = 64, digest: str = "f" * 64, steps_to_die: int | None = None
    ) -> None:
        self.max_model_len = max_model_len
        self.digest = digest
        self.steps_left = steps_to_die
        self.most_live = 0
        self.num_steps = 0
        self._live: dict[str, Add] = {}
        self._has_work = asyncio.Event()

    async def start(self, _: Version | None = None, /) -> Ready:
        self._live.clear()
        return Ready(
            core_id="fake",
            vocab_size=VOCAB,
            max_model_len=self.max_model_len,
            num_blocks=64,
            block_size=16,
            max_num_seqs=8,
            version=0,
            digest=self.digest,
            numerics="fake",
            num_moe_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
        )

    def send(self, messages: Sequence[ToCore]) -> None:
        for message in messages:
            match message:
                case Add():
                    self._live[message.rollout_id] = message
                case Cancel():
                    for rollout_id in message.rollout_ids:
                        self._live.pop(rollout_id, None)
                case Shutdown():
                    self._live.clear()
        self.most_live = max(self.most_live, len(self._live))
        if self._live:
            self._has_work.set()

    async def receive(self) -> list[FromCore]:
        await asyncio.sleep(0)
        if not self._live:
            self._has_work.clear()
        await self._has_work.wait()
        if self.steps_left is not None:
            if self.steps_left <= 0:
                return [Died("the fake core was told to die")]
            self.steps_left -= 1
        self.num_steps += 1
        return [Tokens(0, self.digest, [self._step(add) for add in list(self._live.values())])]

    def _step(self, add: Add) -> RolloutTokens:
        position = len(add.output_ids)
        token = token_of(add.seed, position)
        add.output_ids = [*add.output_ids, token]
        finish = None
        if token in add.stop_ids:
            finish = FinishReason("stop", token)
        elif position + 1 >= add.max_tokens:
            finish = FinishReason("length")
        if finish is not None:
            del self._live[add.rollout_id]
        return RolloutTokens(
            rollout_id=add.rollout_id,
            start=position,
            ids=[token],
            lp_sampled=[-1.0],
            lp_temp=[-1.0],
            kept_mass=[1.0],
            flags=[1],
            lp_raw=[-1.0] if "lp_raw" in add.sampling.record else [],
            finish=finish,
        )

    async def close(self) -> None:
        self._live.clear()
