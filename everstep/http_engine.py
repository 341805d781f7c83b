"""A server as a run of C3PO++ sees it: /rollouts and its token budgets, through `AsyncClient`."""

import asyncio
from collections.abc import Sequence

import httpx
import msgspec
from msgspec import Struct

from .clients.async_client import AsyncClient
from .clients.client_flows import FIRST_CONTACT_S
from .engine.errors import EngineUnavailable, EverstepError
from .engine.journal_ops import Budget as EngineBudget
from .engine.journal_ops import BudgetState
from .engine.rollout import Rollout, RolloutState
from .server.rollouts_types import RolloutSummary
from .trainer_bridge.rollout_engine import Budget, Facts, Prompt, Seen, Work

UNBOUNDED = 2**53
PAUSE_S = 0.25
# a look at the lengths of who runs is a list of them; once in so many seconds
LOOK_EVERY_S = 2.0


class _Ready(Struct):
    version: int
    digest: str
    numerics: str


class HttpEngine:
    """An `Engine` over one server.

    wait_s    how long it is waited for when it is away
    is_known  whether the run has rollouts there: then it is waited for at the start too
    """

    def __init__(self, url: str, *, wait_s: float, is_known: bool) -> None:
        self.name = url
        self._wait_s = wait_s
        self._first_s = wait_s if is_known else min(wait_s, FIRST_CONTACT_S)
        self._http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None))
        self._client = AsyncClient(url, retry_s=wait_s, http=self._http)
        self._looked_s = 0.0
        self._lengths: list[int] = []

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
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise EngineUnavailable(f"{self.name} is not ready: {response.text[:200]}")
        try:
            return msgspec.json.decode(response.content, type=_Ready)
        except msgspec.MsgspecError:
            raise EverstepError(
                f"{self.name}/ready answered {response.status_code} and no engine's facts: is it "
                "an Everstep server?"
            ) from None

    async def prepare(self, prompt: Prompt) -> Prompt:
        """As it is: the server encodes it, and says no when it is submitted."""
        return prompt

    async def submit(self, work: Work) -> str:
        prompt = work.prompt
        submitted = await self._client.submit(
            prompt.prompt,
            prompt_ids=prompt.prompt_ids,
            messages=prompt.messages,
            sampling=work.sampling,
            group_id=work.group_id,
            pool=work.pool,
            attempt=work.attempt,
            metadata=prompt.metadata,
            idempotency_key=work.key,
            **prompt.options,
        )
        [rollout_id] = submitted.rollout_ids
        return rollout_id

    async def ended(self, rollout_id: str) -> Rollout:
        return await self._client.wait(rollout_id)

    async def read(self, rollout_id: str) -> Rollout:
        return await self._client.get(rollout_id)

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

    async def close(self) -> None:
        await self._http.aclose()


def _seen(budget: EngineBudget) -> Budget:
    return Budget(budget.id, budget.used, budget.state is BudgetState.OPEN)
