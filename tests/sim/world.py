"""One seed, one history: the parts put together, run, and judged."""

import asyncio
import random
import traceback
from typing import Any

import msgspec
from msgspec import Struct

from everstep.engine.config import JournalConfig
from everstep.engine.errors import EverstepError
from everstep.engine.journal.ops import JournalStore, Query, Recovered

from .c3po_checker import C3poChecker
from .checker import Checker
from .client import FRONTS, Client
from .clocks import Wall, virtual
from .controller import Controller
from .disk import FastDisk, SimDisk, SqliteDisk
from .driver import DriverHost
from .driver_checker import DriverChecker
from .front import FrontHost, budget_of
from .history import History
from .loop import SimLoop, Stuck
from .nemesis import Nemesis
from .network import Network
from .profile import Profile
from .trainer import Trainer

PATIENCE_S = 20.0
"""After the last fault everything that was accepted must end within this; a run, go on."""
SQLITE_SHARE = 0.1
POOLS = "rollout-"
"""How the pools of driven runs begin."""


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
        lived = world.live()
    faults = Checker().judge(world.history.events)
    if (c3po := world.profile.c3po) is not None:
        checker = C3poChecker(msgspec.structs.asdict(c3po.config), c3po.num_prompts)
        faults += checker.judge(world.history.events)
    if (driver := world.profile.driver) is not None:
        config = msgspec.structs.asdict(driver.config)
        books = DriverChecker(config, driver.num_prompts, driver.epochs)
        faults += books.judge(world.history.events)
    return Outcome(
        seed=seed,
        # that somebody waits is the least that can be said
        faults=list(dict.fromkeys([*faults, *lived])),
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
        own = self._fronts_of_run()
        others = tuple(name for name in FRONTS if name not in own)
        self.trainer = Trainer(*parts, self.rng("trainer"), others, own)
        self.controller = None
        if profile.c3po is not None:
            self.controller = Controller(
                self.loop, self.network, self.history, profile.c3po, self.rng("c3po")
            )
        self.driver = None
        if profile.driver is not None:
            self.driver = DriverHost(
                *parts[:3],
                profile.driver,
                self.rng("driver"),
                {front.name: front for front in self.fronts},
            )

    def _fronts_of_run(self) -> tuple[str, ...]:
        """Those whose weights are a run's business: its learner serves them, or nobody does."""
        return () if self.profile.driver is None else self.profile.driver.engines

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{self._seed}/{name}")

    def _front(self, name: str) -> FrontHost:
        make: Any = SqliteDisk if self.profile.is_sqlite else FastDisk
        profile = self.profile
        config = JournalConfig(durability=profile.durability, retain_acked_s=profile.retain_acked_s)
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
        is_task = isinstance(context.get("future"), asyncio.Task)
        if isinstance(error, EverstepError) and not is_task and self._has_kills:
            # who waited, for one that others waited for too, was killed before he came to look
            return
        text = "".join(traceback.format_exception(error)) if error else ""
        self._faults.append(f"unhandled: {context.get('message')} {text}")

    def live(self) -> list[str]:
        """Run it to its end; returns what went wrong on the way."""
        self._has_kills = False
        try:
            self.loop.run_until_complete(self._story())
        except Stuck as stuck:
            self._faults.append(f"I1: not all is done: {stuck}")
        except AssertionError:
            self._faults.append(f"assertion: {traceback.format_exc()}")
        finally:
            self._has_kills = any(process.is_dead for process in self.loop.processes)
            for error in self.loop.unheard():
                text = "".join(traceback.format_exception(error))
                self._faults.append(f"unhandled: {text}")
            self.loop.bury()
        return self._faults

    async def _story(self) -> None:
        for host in (*self.fronts, self.trainer, self.client, self.controller, self.driver):
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
            self.driver,
            self.wall,
        )
        await nemesis.run()
        await self._wait()
        if not self.client.is_done:
            waiting = [job.key for job in self.client.jobs.values() if not job.is_done]
            self._faults.append(
                f"I1: after {PATIENCE_S:.0f} s without faults these wait: {waiting}"
            )
        for name, run in (("controller", self.controller), ("driver", self.driver)):
            if run is not None and not run.is_done:
                self._faults.append(f"I1: after {PATIENCE_S:.0f} s without faults the {name} runs")
        await self._close()

    async def _wait(self) -> None:
        """Until all is over, or nothing goes on for so long."""
        until_s, iteration = self.loop.time() + PATIENCE_S, 0
        while not self._is_over and self.loop.time() < until_s:
            await asyncio.sleep(0.1)
            # a run whose samples are purged again and again takes its time
            if self.driver is not None and self.driver.watch.iteration != iteration:
                until_s, iteration = self.loop.time() + PATIENCE_S, self.driver.watch.iteration

    @property
    def _is_done(self) -> bool:
        runs = [one for one in (self.controller, self.driver) if one is not None]
        return self.client.is_done and all(run.is_done for run in runs)

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
            recovered = store.recover()
            left = [r for r in recovered.live if not r.pool.startswith(POOLS)]
            self._audit(front.name, store, recovered)
            if left and self._is_done:
                self._faults.append(f"I1: {front.name} still has {[r.id for r in left]}")
            store.close()

    def _audit(self, front: str, store: JournalStore, recovered: Recovered) -> None:
        """Note what a journal holds of a driven run."""
        keys = {name: key.key for key, names in recovered.keys for name in names}
        self.history.note(
            "audit",
            "journal",
            front=front,
            budgets=[
                (keys[one.id], budget_of(one))
                for one in recovered.budgets
                if one.pool.startswith(POOLS)
            ],
            rollouts=[
                (one.id, one.num_output_tokens, one.state.is_ended, one.is_acked)
                for one in store.list(Query(limit=10**6))
                if one.pool.startswith(POOLS)
            ],
            is_whole=self.profile.retain_acked_s > 1e6,
        )
