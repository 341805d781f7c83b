"""A real core (loop, scheduler) over a FakeRunner, on the test's own event loop."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from everstep.engine.checkpoint.manifest import Version
from everstep.engine.config import BatchConfig, ResolvedKV
from everstep.engine.core.core import Core
from everstep.engine.core.scheduler import Scheduler
from everstep.engine.errors import CheckpointError, EngineDied
from everstep.engine.messages import Died, FromCore, Ready, ToCore, Tokens
from tests.fakes import FakeRunner, FakeStager

KV = ResolvedKV(
    block_size=4, num_blocks=200, max_model_len=64, prefix_caching=True, num_parking_blocks=8
)


class InlineBackend:
    """Steps the core whenever somebody waits for news. `die()` is kill -9; `is_held` stops the core,
    `steps_left` (None: no limit) does so after so many with tokens."""

    def __init__(self, vocab_size: int = 300, *, start_failures: int = 0) -> None:
        self.vocab_size = vocab_size
        self.starts = 0
        self.start_failures = start_failures
        self.sent: list[ToCore] = []
        self.core: Core | None = None
        self._queue: list[FromCore] = []
        self._dead: str | None = None
        self._is_busy = False
        self.is_held = False
        self.steps_left: int | None = None

    async def start(self, weights: Version | None = None, /) -> Ready:
        self.starts += 1
        if self.start_failures:
            self.start_failures -= 1
            raise EngineDied("no core today")
        if weights is not None and not Path(weights.folder).is_dir():
            raise CheckpointError(f"no model at {weights.folder}")
        number, digest = (1, "v1") if weights is None else (weights.number, weights.digest)
        scheduler = Scheduler(KV, BatchConfig(max_num_seqs=8, max_num_batched_tokens=16))
        scheduler.set_version(digest)
        runner = FakeRunner(KV, vocab_size=self.vocab_size, version=number, digest=digest)
        self.core = Core(scheduler, runner, FakeStager(runner), stage_share=1.0)
        self._queue, self._dead = [], None
        return Ready(
            core_id=f"core-{self.starts}",
            vocab_size=self.vocab_size,
            max_model_len=KV.max_model_len,
            num_blocks=KV.num_blocks,
            block_size=KV.block_size,
            max_num_seqs=8,
            version=number,
            digest=digest,
            path="base" if weights is None else weights.folder,
            numerics="fake",
            eos_ids=[],
            num_moe_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
        )

    def die(self, message: str = "killed") -> None:
        self._dead = message

    def send(self, messages: Sequence[ToCore]) -> None:
        self.sent += messages
        if self.core is not None and self._dead is None:
            for message in messages:
                self._queue += self.core.handle(message)

    async def receive(self) -> list[FromCore]:
        while True:
            await asyncio.sleep(0 if self._is_busy else 0.002)
            if self._dead is not None:
                return [Died(self._dead)]
            assert self.core is not None
            found, self._queue = self._queue, []
            events = self._step()
            self._is_busy = events is not None
            found += events or []
            if found:
                return found

    def _step(self) -> list[FromCore] | None:
        assert self.core is not None
        if self.is_held or self.steps_left == 0:
            # no rollout grows; weights are staged all the same
            swap = self.core._swap
            if swap is None or not swap.is_busy:
                return None
            swap.nothing_to_run()
            return swap.work()
        events = self.core.step()
        if self.steps_left is not None and any(isinstance(e, Tokens) for e in events or ()):
            self.steps_left -= 1
        return events

    async def close(self) -> None:
        self.core = None
        self._dead = "closed"
