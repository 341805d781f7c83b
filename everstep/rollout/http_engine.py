"""A server as a run of C3PO++ sees it: /rollouts, its token budgets and its weights, through
`AsyncClient`."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from ..clients.async_client import AsyncClient
from ..clients.patience import FIRST_CONTACT_S
from ..engine.checkpoint.manifest import Version
from ..engine.errors import (
    ConfigError,
    EngineUnavailable,
    EverstepError,
    IllegalState,
    JournalFull,
    Overloaded,
    StaleVersion,
    UnknownRollout,
    WeightsRefused,
)
from ..engine.journal.ops import Budget as EngineBudget
from ..engine.journal.ops import BudgetState
from ..engine.messages import Flipped, KVPolicy, Priority
from ..engine.rollout import Rollout, RolloutState
from ..server.rollouts.wire import RolloutSummary
from ..trainer_bridge.run.engine import Budget, Facts, Prompt, Seen, Work
from ..trainer_bridge.run.hosts import Prepared
from .http_calls import Endings, Together

UNBOUNDED = 2**53
PAUSE_S = 0.25
# a look at the lengths of who runs is a list of them; once in so many seconds
LOOK_EVERY_S = 2.0


# a server that is started again between stage and flip has lost what it staged
_FLIPS = 5


class _Ready(Struct):
    """As GET /ready says it; with `waits_for` it is there, and its rollouts stand still."""

    version: int
    digest: str
    numerics: str
    ready: bool = True
    waits_for: str | None = None


NO_ROOM = (JournalFull, Overloaded)


class _Client(AsyncClient):
    """Whoever runs the engine waits for room, and says so."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._calls.not_borne = NO_ROOM


class HttpEngine:
    """An `Engine` over one server, and a `Host`.

    wait_s      how long it is waited for when it is away
    is_known    whether the run has rollouts there: then it is waited for at the start too
    admin_key   for its weights; None: that of the environment, if there is one
    is_trained  whether it is given weights: one whose own are missing will do
    priority    of staging a version, beside steps of generation
    """

    def __init__(
        self,
        url: str,
        *,
        wait_s: float,
        is_known: bool,
        admin_key: str | None = None,
        is_trained: bool = False,
        priority: Priority = "background",
    ) -> None:
        self.name = url
        self._is_trained, self._priority = is_trained, priority
        self._wait_s = wait_s
        self._first_s = wait_s if is_known else min(wait_s, FIRST_CONTACT_S)
        self._http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None))
        self._client = _Client(url, admin_key=admin_key, retry_s=wait_s, http=self._http)
        self._begin()

    def _begin(self) -> None:
        self._looked_s = 0.0
        self._lengths: list[int] = []
        self._submits = Together(self._submit_all)
        self._reads = Together(self._read_all)
        self._endings = Endings(lambda ids: self._client.wait_any(ids))

    async def start(self) -> Facts:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._first_s
        while True:
            try:
                found = await self._ready()
            except EngineUnavailable:
                if loop.time() + PAUSE_S > until_s:
                    raise
                await asyncio.sleep(PAUSE_S)
            else:
                self._first_s = self._wait_s
                return Facts(found.version, found.digest, found.numerics)

    async def _ready(self) -> _Ready:
        """Raises EngineUnavailable: no answer, or the reason that the server gives."""
        try:
            response = await self._http.get(f"{self.name}/ready", timeout=10.0)
        except httpx.TransportError as error:
            words = str(error) or type(error).__name__
            raise EngineUnavailable(f"no answer from {self.name}: {words}") from None
        is_unready = response.status_code == httpx.codes.SERVICE_UNAVAILABLE
        try:
            found = msgspec.json.decode(response.content, type=_Ready)
            if not is_unready or (self._is_trained and found.waits_for == "weights"):
                return found
        except msgspec.MsgspecError:
            if not is_unready:
                raise self._stranger(response) from None
        raise EngineUnavailable(f"{self.name} is not ready: {response.text[:200]}")

    def _stranger(self, response: httpx.Response) -> EverstepError:
        return EverstepError(
            f"{self.name}/ready answered {response.status_code} and no engine's facts: is it "
            "an Everstep server?"
        )

    async def prepare(self, prompt: Prompt) -> Prompt:
        """As it is: the server encodes it, and says no when it is submitted."""
        return prompt

    async def submit(self, work: Work) -> str:
        return await self._submits(work)

    async def _submit_all(self, works: Sequence[Work]) -> Sequence[str | EverstepError]:
        found = await self._client.submit_many([_submission(work) for work in works])
        return [one if isinstance(one, EverstepError) else one.rollout_ids[0] for one in found]

    async def ended(self, rollout_id: str) -> Rollout:
        return await self._endings(rollout_id)

    async def read(self, rollout_id: str) -> Rollout:
        return await self._reads(rollout_id)

    async def _read_all(self, ids: Sequence[str]) -> Sequence[Rollout | EverstepError]:
        found = await self._client.get_many(ids)
        by_id = {rollout.id: rollout for rollout in found.rollouts}
        return [by_id.get(name) or UnknownRollout(found.unknown[name]) for name in ids]

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        await self._client.cancel(rollout_ids)

    async def acknowledge(self, rollout_ids: Sequence[str]) -> None:
        await self._client.ack(rollout_ids)

    async def known(self, pool: str) -> list[Seen]:
        return [
            Seen(
                one.id,
                one.state in (RolloutState.FINISHED, RolloutState.ABORTED, RolloutState.FAILED),
                one.state is RolloutState.ABORTED,
                one.is_acked,
            )
            async for one in self._client.list(pool=pool)
        ]

    async def open_budget(
        self, pool: str, tokens: int | None, key: str, places: int | None = None
    ) -> Budget:
        tokens = UNBOUNDED if tokens is None else tokens
        return _seen(
            await self._client.open_budget(pool, tokens, places=places, idempotency_key=key)
        )

    async def budget(self, budget_id: str, wait_s: float) -> Budget:
        return _seen(await self._client.wait_budget(budget_id, timeout_s=wait_s))

    async def budgets(self, pool: str) -> list[Budget]:
        return [_seen(budget) for budget in await self._client.budgets(pool)]

    async def close_budget(self, budget_id: str) -> None:
        await self._client.close_budget(budget_id)

    async def lengths(self, pool: str, rollout_ids: Sequence[str]) -> list[int]:
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._looked_s + LOOK_EVERY_S:
            self._looked_s = now_s
            found: list[RolloutSummary] = []
            for state in (RolloutState.RUNNING, RolloutState.PAUSED):
                found += [one async for one in self._client.list(pool=pool, state=state)]
            wanted = set(rollout_ids)
            self._lengths = [one.num_output_tokens for one in found if one.id in wanted]
        return self._lengths

    # as `hosts.Host`

    async def serves(self, version: Version) -> bool:
        try:
            found = await self._client.weights()
        except EverstepError as error:
            if error.code != "invalid_admin_key":
                raise
            raise ConfigError(f"{self.name}: {error}") from None
        current = found.current
        return (current.number, current.digest) == (version.number, version.digest) and (
            found.waiting_for is None
        )

    async def stage(self, version: Version) -> Prepared:
        try:
            staged = await self._client.stage_weights(version.folder, priority=self._priority)
        except StaleVersion:
            staged = await self._client.stage_weights(
                version.folder, priority=self._priority, rollback=version.number
            )
            return Prepared(staged.report, is_back=True)
        return Prepared(staged.report, is_back=False)

    async def flip(self, version: Version, kv: KVPolicy) -> Flipped:
        for left in reversed(range(_FLIPS)):
            try:
                flipped = (await self._client.flip_weights(version.number, kv=kv)).flipped
                if flipped.digest == version.digest:
                    return flipped
            except (IllegalState, WeightsRefused):
                # not staged in this life of it
                if not left:
                    raise
            await self.stage(version)
        raise IllegalState(f"version {version.number} was never served: others change it too")

    async def unstage(self) -> None:
        await self._client.unstage_weights()

    async def close(self) -> None:
        for calls in (self._submits, self._reads, self._endings):
            calls.close()
        await self._http.aclose()


def _submission(work: Work) -> dict[str, Any]:
    """Arguments of `AsyncClient.submit`."""
    prompt = work.prompt
    return {
        "prompt": prompt.prompt,
        "prompt_ids": prompt.prompt_ids,
        "messages": prompt.messages,
        "sampling": work.sampling,
        "group_id": work.group_id,
        "pool": work.pool,
        "attempt": work.attempt,
        "metadata": prompt.metadata,
        "idempotency_key": work.key,
        **prompt.options,
    }


def _seen(budget: EngineBudget) -> Budget:
    return Budget(budget.id, budget.used, budget.state is BudgetState.OPEN)
