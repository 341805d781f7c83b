"""One seed, one history: the parts put together, run, and judged."""

import asyncio
import random
import traceback
from typing import Any

import msgspec
from msgspec import Struct

from everstep.engine.config import JournalConfig

from .c3po_checker import C3poChecker
from .checker import Checker
from .client import FRONTS, Client
from .clocks import Wall, virtual
from .controller import Controller
from .disk import FastDisk, SimDisk, SqliteDisk
from .front import FrontHost
from .history import History
from .loop import SimLoop, Stuck
from .nemesis import Nemesis
from .network import Network
from .profile import Profile
from .trainer import Trainer

PATIENCE_S = 20.0
"""After the last fault everything that was accepted must end within this."""
SQLITE_SHARE = 0.1


class Outcome(Struct):
    """faults: what the checker has against it; [] is good."""

    seed: int
    faults: list[str]
    reached: dict[str, int]
    digest: str
    num_events: int
    num_turns: int
    lasted_s: float
    is_sqlite: bool


def run(seed: int, *, is_printing: bool = False, sqlite_share: float = SQLITE_SHARE) -> Outcome:
    """The history of this seed."""
    world = _World(seed, is_printing=is_printing, sqlite_share=sqlite_share)
    with virtual(world.loop.time, world.wall, world.rng("ids"), world.on_log):
        faults = world.live()
    faults += Checker().judge(world.history.events)
    if (c3po := world.profile.c3po) is not None:
        checker = C3poChecker(msgspec.structs.asdict(c3po.config), c3po.num_prompts)
        faults += checker.judge(world.history.events)
    return Outcome(
        seed=seed,
        faults=list(dict.fromkeys(faults)),
        reached=dict(world.history.reached),
        digest=world.history.digest(),
        num_events=len(world.history.events),
        num_turns=world.loop.num_turns,
        lasted_s=world.loop.time(),
        is_sqlite=world.profile.is_sqlite,
    )


class _World:
    def __init__(self, seed: int, *, is_printing: bool, sqlite_share: float) -> None:
        self._seed = seed
        self.profile = profile = Profile.draw(self.rng("profile"), sqlite_share=sqlite_share)
        self.loop = SimLoop(self.rng("order"), reorder=profile.reorder, told_s=profile.told_s)
        self.loop.set_exception_handler(self._on_exception)
        self.wall = Wall(self.loop.time)
        self.history = History(self.loop.time)
        self.history.is_printing = is_printing
        self._faults: list[str] = []
        self.network = Network(self.loop, self.rng("network"), profile.quality)
        self.fronts = [self._front(name) for name in FRONTS]
        parts: Any = (self.loop, self.network, self.history, profile)
        self.client = Client(*parts, self.rng("client"))
        self.trainer = Trainer(*parts, self.rng("trainer"), FRONTS)
        self.controller = None
        if profile.c3po is not None:
            self.controller = Controller(
                self.loop, self.network, self.history, profile.c3po, self.rng("c3po")
            )

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{self._seed}/{name}")

    def _front(self, name: str) -> FrontHost:
        make: Any = SqliteDisk if self.profile.is_sqlite else FastDisk
        config = JournalConfig(durability=self.profile.durability, retain_acked_s=5.0)
        disk: SimDisk = make(config, self.wall, self.rng(f"disk-{name}"))
        return FrontHost(
            name,
            self.loop,
            self.network,
            self.history,
            disk,
            self.profile.front,
            self.rng(f"front-{name}"),
        )

    def on_log(self, name: str, *, level: str = "info", **fields: Any) -> None:
        """The log of the code under test. A manager never fails by itself."""
        self.history.note("log", name, **{k: v for k, v in fields.items() if k != "traceback"})
        if name in ("manager.failed", "journal.failed"):
            self._faults.append(f"{name}: {fields.get('traceback') or fields}")

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        text = "".join(traceback.format_exception(error)) if error else ""
        self._faults.append(f"unhandled: {context.get('message')} {text}")

    def live(self) -> list[str]:
        """Run it to its end; returns what went wrong on the way."""
        try:
            self.loop.run_until_complete(self._story())
        except Stuck as stuck:
            self._faults.append(f"I1: not all is done: {stuck}")
        except AssertionError:
            self._faults.append(f"assertion: {traceback.format_exc()}")
        finally:
            for error in self.loop.unheard():
                text = "".join(traceback.format_exception(error))
                self._faults.append(f"unhandled: {text}")
            self.loop.bury()
        return self._faults

    async def _story(self) -> None:
        for host in (*self.fronts, self.trainer, self.client, self.controller):
            if host is not None:
                host.start()
        nemesis = Nemesis(
            self.loop,
            self.profile,
            self.history,
            self.rng("nemesis"),
            self.network,
            self.fronts,
            self.client,
            self.trainer,
            self.controller,
            self.wall,
        )
        await nemesis.run()
        until_s = self.loop.time() + PATIENCE_S
        while not self._is_over and self.loop.time() < until_s:
            await asyncio.sleep(0.1)
        if not self.client.is_done:
            waiting = [job.key for job in self.client.jobs.values() if not job.is_done]
            self._faults.append(
                f"I1: after {PATIENCE_S:.0f} s without faults these wait: {waiting}"
            )
        await self._close()

    @property
    def _is_done(self) -> bool:
        return self.client.is_done and (self.controller is None or self.controller.is_done)

    @property
    def _is_over(self) -> bool:
        return self._is_done and all(front.is_ready for front in self.fronts)

    async def _close(self) -> None:
        """End politely; nothing may be left, and the files must be sound."""
        for front in self.fronts:
            if not front.is_ready:
                self._faults.append(f"I1: front {front.name} is not there at the end")
                continue
            assert front.manager is not None
            assert front.process is not None
            await front.manager.close()
            front.process.kill()
            front.disk.crash(is_power=False, in_commit=False)
            store = front.disk.open()
            self._faults += [f"I10: {front.name}: {line}" for line in store.check()]
            left = store.recover().live
            if left and self._is_done:
                self._faults.append(f"I1: {front.name} still has {[r.id for r in left]}")
            store.close()
