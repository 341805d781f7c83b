"""Engines of a run: a front over the network, with the patience of the clients that are shipped, and
what a run asks of any engine, written down for the checker.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

from everstep.clients.patience import Patience, error_from
from everstep.engine.errors import EngineUnavailable, EverstepError, JournalFull, UnknownRollout
from everstep.engine.journal.ops import BudgetState, Query
from everstep.engine.messages import KVPolicy, Priority
from everstep.engine.rollout import Found, Rollout, RolloutState
from everstep.engine.trajectory import decode, unpack
from everstep.rollout.http_engine import NO_ROOM, HttpEngine
from everstep.trainer_bridge.run.engine import Budget, Engine, Work
from everstep.trainer_bridge.run.hosts import Host

from .front import snapshot
from .history import History
from .loop import Process, SimLoop
from .network import Network, NoAnswer, Refused

T = TypeVar("T")
POLL_S = 0.25
TIMEOUT_S = 0.3
EACH_S = 0.05
"""More for each id that the slowest disk has to look up."""
WEIGHTS_S = 0.5


class ServingEngine(Engine, Host, Protocol):
    """An engine that a trainer's versions go to."""


class SimServer(HttpEngine):
    """A front that is reached over the network: all but what is below it is the shipped engine.

    wait_s  how long it is waited for when it is away
    """

    def __init__(
        self,
        name: str,
        loop: SimLoop,
        network: Network,
        process: Process,
        wait_s: float,
        *,
        is_trained: bool,
    ) -> None:
        self.name, self._is_trained = name, is_trained
        self._priority: Priority = "background"
        self._wait_s = self._first_s = wait_s
        self._begin()
        self._sim = SimClient(name, loop, network, process, wait_s)
        self._client: Any = self._sim

    async def _ready(self) -> Any:
        version, digest, numerics, waits_for = await self._sim.call("ready")
        if waits_for is not None and not self._is_trained:
            raise EngineUnavailable(f"{self.name} is not ready: {waits_for}")
        return SimpleNamespace(version=version, digest=digest, numerics=numerics)

    async def close(self) -> None:
        return None


class SimClient:
    """What `AsyncClient` is to the shipped engine, with its patience, over the simulated network."""

    def __init__(
        self, name: str, loop: SimLoop, network: Network, process: Process, wait_s: float
    ) -> None:
        self._name, self._loop, self._network = name, loop, network
        self._process, self._wait_s = process, wait_s

    async def call(self, method: str, longer_s: float = 0.0, **values: Any) -> Any:
        """Its answer, asked for again while that may help."""
        patience = Patience(
            self._name,
            self._wait_s,
            has_answered=True,
            not_borne=NO_ROOM,
            clock=self._loop.time,
        )
        while True:
            try:
                return await self._network.call(
                    self._process, self._name, method, TIMEOUT_S + longer_s, **values
                )
            except NoAnswer as silence:
                trouble: EverstepError = EngineUnavailable(f"no answer: {silence}")
            except Refused as refusal:
                if refusal.code == "connection":
                    trouble = EngineUnavailable(f"no answer from {self._name}")
                else:
                    trouble = error_from(refusal.code, str(refusal), None)
            await asyncio.sleep(patience.pause_after(trouble))

    async def submit_many(self, submissions: Sequence[dict[str, Any]]) -> list[Any]:
        found = await self.call("works", EACH_S * len(submissions), works=list(submissions))
        return [
            SimpleNamespace(rollout_ids=one) if isinstance(one, list) else error_from(*one, None)
            for one in found
        ]

    async def wait_any(self, ids: Sequence[str]) -> Found:
        while True:
            found = await self._rollouts(ids, POLL_S)
            if found.rollouts or found.unknown:
                return found

    async def get_many(self, ids: Sequence[str]) -> Found:
        return await self._rollouts(ids, None)

    async def _rollouts(self, ids: Sequence[str], wait_s: float | None) -> Found:
        longer_s = EACH_S * len(ids) + (wait_s or 0.0)
        packed, unknown = await self.call("rollouts", longer_s, ids=list(ids), wait_s=wait_s)
        return Found([unpack(decode(one)) for one in packed], unknown)

    async def cancel(self, ids: Sequence[str]) -> None:
        await self.call("cancel", EACH_S * len(ids), ids=list(ids))

    async def ack(self, ids: Sequence[str]) -> None:
        await self.call("acknowledge", EACH_S * len(ids), ids=list(ids))

    async def list(self, *, pool: str, state: RolloutState | None = None) -> AsyncIterator[Any]:
        for summary in await self.call("summaries", query=Query(pool=pool, state=state)):
            yield summary

    async def open_budget(
        self, pool: str, tokens: int, *, places: int | None, idempotency_key: str
    ) -> Any:
        found = await self.call(
            "open_budget", pool=pool, tokens=tokens, places=places, key=idempotency_key
        )
        return _budget(found)

    async def wait_budget(self, budget_id: str, *, timeout_s: float) -> Any:
        until_s = self._loop.time() + timeout_s
        while True:
            rest_s = max(0.0, min(POLL_S, until_s - self._loop.time()))
            found = _budget(await self.call("budget", rest_s, id=budget_id, wait_s=rest_s))
            if found.state is not BudgetState.OPEN or self._loop.time() >= until_s:
                return found

    async def budgets(self, pool: str) -> Any:
        return [_budget(one) for one in await self.call("budgets", pool=pool)]

    async def close_budget(self, budget_id: str) -> None:
        await self.call("close_budget", id=budget_id)

    async def weights(self) -> Any:
        current, waiting_for = await self.call("weights")
        return SimpleNamespace(current=current, waiting_for=waiting_for)

    async def stage_weights(
        self, path: str, *, priority: Priority, rollback: int | None = None
    ) -> Any:
        return await self.call("stage", WEIGHTS_S, path=path, priority=priority, rollback=rollback)

    async def flip_weights(self, version: int, *, kv: KVPolicy) -> Any:
        flipped = await self.call("flip", WEIGHTS_S, version=version, kv=kv)
        return SimpleNamespace(flipped=flipped)

    async def unstage_weights(self) -> None:
        await self.call("unstage")


def _budget(found: dict[str, Any]) -> Any:
    return SimpleNamespace(id=found["id"], used=found["used"], state=BudgetState(found["state"]))


class Room(Protocol):
    """Of an engine's disk, as the driver meets it."""

    has_full_engines: bool


class WatchedEngine:
    """An engine, with what goes through it noted.

    on_rollout  called with the id of what was submitted
    host        says whether there is room
    """

    def __init__(
        self,
        engine: ServingEngine,
        history: History,
        on_rollout: Callable[[str, str], None],
        host: Room,
    ) -> None:
        self.name = engine.name
        self._engine, self._history, self._on_rollout = engine, history, on_rollout
        self._host = host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _note(self, kind: str, **fields: Any) -> None:
        self._history.note("driver", kind, front=self.name, **fields)

    async def _take(self, verb: str, call: Callable[[], Awaitable[T]]) -> T:
        """What an engine may have no room for."""
        try:
            if self._host.has_full_engines:
                raise JournalFull(f"{self.name}: the disk is full")
            return await call()
        except JournalFull:
            self._history.sometimes(f"disk full during {verb} of the driver")
            raise

    async def submit(self, work: Work) -> str:
        rollout_id = await self._take("submit", lambda: self._engine.submit(work))
        key, prompt = f"c3po/{work.key}", work.prompt
        request = {
            "prompt": tuple(prompt.prompt_ids or ()),
            "max_tokens": prompt.sampling.max_tokens,
            "seed": work.seed,
            "samples": 1,
        }
        self._note("asks", key=key, method="submit", request=request)
        self._note("accepted", key=key, group=work.group_id, ids=(rollout_id,), replay=False)
        self._on_rollout(self.name, rollout_id)
        return rollout_id

    async def ended(self, rollout_id: str) -> Rollout:
        return await self._seen(rollout_id, self._engine.ended(rollout_id))

    async def read(self, rollout_id: str) -> Rollout:
        return await self._seen(rollout_id, self._engine.read(rollout_id))

    async def _seen(self, rollout_id: str, reading: Awaitable[Rollout]) -> Rollout:
        try:
            rollout = await reading
        except UnknownRollout as error:
            self._note("lost", id=rollout_id, why=str(error))
            raise
        self._note("seen", **snapshot(rollout))
        if rollout.state.is_ended:
            self._history.look(snapshot(rollout))
        return rollout

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        for rollout_id in rollout_ids:
            self._note("cancels", id=rollout_id)
        await self._take("cancel", lambda: self._engine.cancel(rollout_ids))

    async def acknowledge(self, rollout_ids: Sequence[str]) -> None:
        for rollout_id in rollout_ids:
            # from here on it may be forgotten, whether this is heard of or not
            self._note("acked", id=rollout_id)
        await self._take("acknowledge", lambda: self._engine.acknowledge(rollout_ids))

    async def open_budget(
        self, pool: str, tokens: int | None, key: str, places: int | None = None
    ) -> Budget:
        budget = await self._take(
            "open_budget", lambda: self._engine.open_budget(pool, tokens, key, places)
        )
        self._note("opened", key=key, id=budget.id, tokens=tokens, places=places)
        return budget

    async def close_budget(self, budget_id: str) -> None:
        await self._take("close_budget", lambda: self._engine.close_budget(budget_id))


class Meddler:
    """Somebody who pauses and cancels rollouts of the run if is_bad, and lets all go on in the end,
    also what others have paused."""

    def __init__(
        self, loop: SimLoop, network: Network, history: History, rng: random.Random, *, is_bad: bool
    ) -> None:
        self._is_bad = is_bad
        self._process = Process(loop, "meddler")
        self._network, self._history, self._rng = network, history, rng
        self.known: list[tuple[str, str]] = []
        """(front, id) of what was submitted lately."""
        self.is_calm = self.is_over = False

    def start(self, fronts: Sequence[str]) -> None:
        self._process.spawn(self._meddle(fronts))

    async def _meddle(self, fronts: Sequence[str]) -> None:
        rng = self._rng
        while not self.is_calm:
            await asyncio.sleep(rng.expovariate(1.0) * 0.2)
            if not self.known or self.is_calm or not self._is_bad:
                continue
            front, rollout_id = rng.choice(self.known[-8:])
            verb = rng.choice(["pause", "resume", "resume", "cancel", "export"])
            if verb == "export":
                await self._try(front, verb, id=rollout_id)
                continue
            if verb == "cancel":
                self._history.note("meddler", "cancels", front=front, id=rollout_id)
            await self._try(front, verb, ids=[rollout_id])
        while not self.is_over:
            await asyncio.sleep(0.3)
            for front in fronts:
                await self._try(front, "resume", ids=None)

    async def _try(self, front: str, method: str, **values: Any) -> None:
        try:
            await self._network.call(self._process, front, method, 0.5, **values)
        except (NoAnswer, Refused) as error:
            self._history.note("meddler", "in vain", method=method, why=str(error))
