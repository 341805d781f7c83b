"""Engines of a run: a front over the network, with the patience of the clients that are shipped, and
what a run asks of any engine, written down for the checker.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from everstep.clients.client_flows import Patience, error_from
from everstep.engine.errors import EngineUnavailable, EverstepError, UnknownRollout
from everstep.engine.messages import KVPolicy
from everstep.engine.rollout import Rollout
from everstep.engine.trajectory import decode, unpack
from everstep.trainer_bridge.rollout_engine import Budget, Engine, Facts, Prompt, Seen, Work

from .front import snapshot
from .history import History
from .loop import Process, SimLoop
from .network import Network, NoAnswer, Refused

T = TypeVar("T")
POLL_S = 0.25
TIMEOUT_S = 0.3
EACH_S = 0.05
"""More for each id that the slowest disk has to look up."""
UNBOUNDED = 2**53


class ServingEngine(Engine, Protocol):
    """An engine that a trainer's versions go to."""

    async def serve(self, version: int, path: str, kv: KVPolicy) -> str: ...


class NetworkEngine:
    """A front that is reached over the network, as `HttpEngine` reaches a server.

    wait_s  how long it is waited for when it is away
    """

    def __init__(
        self, name: str, loop: SimLoop, network: Network, process: Process, wait_s: float
    ) -> None:
        self.name = name
        self._loop, self._network, self._process = loop, network, process
        self._wait_s = wait_s

    async def _call(self, method: str, longer_s: float = 0.0, **values: Any) -> Any:
        patience = Patience(self.name, self._wait_s, has_answered=True, clock=self._loop.time)
        while True:
            try:
                return await self._network.call(
                    self._process, self.name, method, TIMEOUT_S + longer_s, **values
                )
            except NoAnswer as silence:
                trouble: EverstepError = EngineUnavailable(f"no answer: {silence}")
            except Refused as refusal:
                if refusal.code == "connection":
                    trouble = EngineUnavailable(f"no answer from {self.name}")
                else:
                    trouble = error_from(refusal.code, str(refusal), None)
            await asyncio.sleep(patience.pause_after(trouble))

    async def start(self) -> Facts:
        return Facts(*await self._call("ready"))

    async def prepare(self, prompt: Prompt) -> Prompt:
        return prompt

    async def submit(self, work: Work) -> str:
        rollout_id: str = await self._call("work", work=work)
        return rollout_id

    async def ended(self, rollout_id: str) -> Rollout:
        while True:
            found = await self._rollout(rollout_id, POLL_S)
            if found.state.is_ended:
                return found

    async def read(self, rollout_id: str) -> Rollout:
        return await self._rollout(rollout_id, 0.0)

    async def _rollout(self, rollout_id: str, wait_s: float) -> Rollout:
        return unpack(decode(await self._call("rollout", wait_s, id=rollout_id, wait_s=wait_s)))

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        await self._call("cancel", EACH_S * len(rollout_ids), ids=list(rollout_ids))

    async def acknowledge(self, rollout_ids: Sequence[str]) -> None:
        await self._call("acknowledge", EACH_S * len(rollout_ids), ids=list(rollout_ids))

    async def known(self, pool: str) -> list[Seen]:
        return [Seen(*one) for one in await self._call("known", pool=pool)]

    async def open_budget(
        self, pool: str, tokens: int | None, key: str, places: int | None = None
    ) -> Budget:
        wanted = {"tokens": UNBOUNDED if tokens is None else tokens, "places": places}
        return _budget(await self._call("open_budget", pool=pool, key=key, **wanted))

    async def budget(self, budget_id: str, wait_s: float) -> Budget:
        until_s = self._loop.time() + wait_s
        while True:
            rest_s = max(0.0, min(POLL_S, until_s - self._loop.time()))
            found = _budget(await self._call("budget", rest_s, id=budget_id, wait_s=rest_s))
            if not found.is_open or self._loop.time() >= until_s:
                return found

    async def budgets(self, pool: str) -> list[Budget]:
        return [_budget(one) for one in await self._call("budgets", pool=pool)]

    async def close_budget(self, budget_id: str) -> None:
        await self._call("close_budget", id=budget_id)

    async def lengths(self, pool: str, rollout_ids: Sequence[str]) -> list[int]:
        return []

    async def serve(self, version: int, path: str, kv: KVPolicy) -> str:
        return f"{await self._call('update', version=version)} serves"

    async def close(self) -> None:
        return None


def _budget(found: dict[str, Any]) -> Budget:
    return Budget(found["id"], found["used"], found["state"] == "open")


class WatchedEngine:
    """An engine, with what goes through it noted.

    on_rollout  called with the id of what was submitted
    """

    def __init__(
        self, engine: ServingEngine, history: History, on_rollout: Callable[[str, str], None]
    ) -> None:
        self.name = engine.name
        self._engine, self._history, self._on_rollout = engine, history, on_rollout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _note(self, kind: str, **fields: Any) -> None:
        self._history.note("driver", kind, front=self.name, **fields)

    async def submit(self, work: Work) -> str:
        rollout_id = await self._engine.submit(work)
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
        await self._engine.cancel(rollout_ids)

    async def acknowledge(self, rollout_ids: Sequence[str]) -> None:
        for rollout_id in rollout_ids:
            # from here on it may be forgotten, whether this is heard of or not
            self._note("acked", id=rollout_id)
        await self._engine.acknowledge(rollout_ids)

    async def open_budget(
        self, pool: str, tokens: int | None, key: str, places: int | None = None
    ) -> Budget:
        budget = await self._engine.open_budget(pool, tokens, key, places)
        self._note("opened", key=key, id=budget.id, tokens=tokens, places=places)
        return budget


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
