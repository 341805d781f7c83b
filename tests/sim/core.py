"""A core as a process of the simulation, and the backend through which a front speaks with it.

Loop, scheduler and KV books are the real ones. Between the two run pipes that keep the order, as
ZeroMQ over a socket of the system does; what a core had said when it died arrives in part.
"""

import asyncio
import random
import traceback
from collections.abc import Callable, Sequence

from msgspec import Struct

from everstep.engine.checkpoint.manifest import Version
from everstep.engine.config import BatchConfig, ResolvedKV
from everstep.engine.core.core import STATS_EVERY_S, Core
from everstep.engine.errors import EngineDied
from everstep.engine.messages import (
    Died,
    FromCore,
    Ready,
    ToCore,
    decode_from_core,
    decode_to_core,
    encode,
)

from .language import WeightSettings, make_core
from .loop import Process, current

PIPE_S = 0.0005
NOTICED_S = 0.2


class CoreSettings(Struct, frozen=True):
    """step_s: of a step; start_s: from nothing to ready; unlucky: share of starts that fail."""

    kv: ResolvedKV
    batch: BatchConfig
    step_s: float
    start_s: float
    unlucky: float
    weights: WeightSettings


class Pipe:
    """Carries bytes to whoever takes them, in order, each a moment later."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._until_s = 0.0
        self._arrived: list[bytes] = []
        self._news = asyncio.Event()

    def put(self, data: bytes, receiver: Process) -> None:
        now_s = receiver.loop.time()
        self._until_s = max(self._until_s + 1e-9, now_s + self._rng.expovariate(1.0) * PIPE_S)
        receiver.call_later(self._until_s - now_s, self._arrive, data)

    def _arrive(self, data: bytes) -> None:
        self._arrived.append(data)
        self._news.set()

    def take(self) -> list[bytes]:
        found, self._arrived = self._arrived, []
        self._news.clear()
        return found

    async def wait(self, timeout_s: float | None = None) -> None:
        """Return when something has arrived, or the time is up."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            pass


class SimBackend:
    """A front's end of it."""

    def __init__(
        self,
        name: str,
        settings: CoreSettings,
        rng: random.Random,
        on_fault: Callable[[str], None],
    ) -> None:
        self._name, self._settings, self._rng = name, settings, rng
        self._on_fault = on_fault
        self.starts = 0
        self.core: Core | None = None
        self.process: Process | None = None
        self._front = current()
        self._to_core = self._from_core = Pipe(rng)

    async def start(self, weights: Version | None = None, /) -> Ready:
        await self.close()
        await asyncio.sleep(self._settings.start_s * (0.5 + self._rng.random()))
        if self._rng.random() < self._settings.unlucky:
            raise EngineDied("no memory for a core")
        self.starts += 1
        name = f"{self._name}-{self.starts}"
        self._to_core, self._from_core = Pipe(self._rng), Pipe(self._rng)
        settings, loop = self._settings, self._front.loop
        self.core, ready = make_core(
            settings.kv, settings.batch, name, weights, settings.weights, loop.time, self._rng
        )
        self.process = Process(loop, name, parent=self._front)
        self.process.spawn(self._live(self.core, self.process, self._to_core, self._from_core))
        return ready

    async def _live(self, core: Core, process: Process, inbox: Pipe, outbox: Pipe) -> None:
        try:
            await self._run(core, inbox, outbox)
        except Exception:
            self._on_fault(f"I4: {process.name}: {traceback.format_exc()}")
            process.kill()

    async def _run(self, core: Core, inbox: Pipe, outbox: Pipe) -> None:
        def send(messages: list[FromCore]) -> None:
            outbox.put(encode(messages), self._front)

        while True:
            messages: list[ToCore] = []
            for data in inbox.take():
                messages += decode_to_core(data)
            if core.turn(messages, send):
                await inbox.wait(STATS_EVERY_S)
            else:
                await asyncio.sleep(self._settings.step_s * (0.5 + self._rng.random()))

    def send(self, messages: Sequence[ToCore]) -> None:
        if self.process is not None and not self.process.is_dead:
            self._to_core.put(encode(list(messages)), self.process)

    async def receive(self) -> list[FromCore]:
        while True:
            arrived = self._from_core.take()
            if arrived:
                return [message for data in arrived for message in decode_from_core(data)]
            if self.process is None or self.process.is_dead:
                return [Died("the engine's core ended with code -9")]
            await self._from_core.wait(NOTICED_S)

    async def close(self) -> None:
        if self.process is not None:
            self.process.kill()
        self.core = self.process = None
