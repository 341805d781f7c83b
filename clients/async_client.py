"""The client of a running server's rollouts for an event loop; `client.py` says what it does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from ..engine.errors import EverstepError
from ..engine.journal.ops import Budget
from ..engine.messages import KVPolicy, Priority, Staged
from ..engine.rollout import Record, Rollout, RolloutState
from ..engine.trajectory import Trajectory
from ..server.rollouts.wire import (
    BudgetRequest,
    ForkRequest,
    RolloutSummary,
    StreamEvent,
    Submitted,
)
from ..server.weights.wire import (
    FlipRequest,
    RollbackRequest,
    StageRequest,
    Updated,
    UpdateRequest,
    WeightsAnswer,
)
from . import client_flows as flows
from .client_base import PAGE, BaseClient, Messages, Sampling
from .client_flows import Flow, Pause, Reply, Step
from .client_stream import StreamReader

T = TypeVar("T")


class AsyncClient(BaseClient):
    """`Client` for an event loop: the same calls, to be awaited, and async iterators."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        retry_s: float = 120.0,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        super().__init__(base_url, api_key, admin_key, retry_s)
        self._owns_http = http is None
        self._http = http or httpx.AsyncClient(limits=httpx.Limits(max_connections=None))

    async def submit(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        samples: int = 1,
        sampling: Sampling | None = None,
        record: Sequence[Record] = (),
        priority: int = 0,
        group_id: str | None = None,
        pool: str | None = None,
        attempt: int | None = None,
        metadata: Any = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Submitted:
        """As `Client.submit`."""
        fields = flows.submission_fields(
            sampling,
            record,
            prompt=prompt,
            prompt_ids=prompt_ids,
            messages=messages,
            samples=samples,
            priority=priority,
            group_id=group_id,
            pool=pool,
            attempt=attempt,
            metadata=metadata,
            **options,
        )
        return await self._run(flows.submit(fields, idempotency_key, self._patience()))

    async def get(self, rollout_id: str) -> Rollout:
        """As `Client.get`."""
        return await self._run(flows.get(rollout_id, self._patience()))

    async def wait(self, rollout_id: str, *, timeout_s: float | None = None) -> Rollout:
        """As `Client.wait`."""
        return await self._run(flows.wait(rollout_id, timeout_s, self._patience()))

    async def stream(self, rollout_id: str, *, after: int = 0) -> AsyncIterator[StreamEvent]:
        """As `Client.stream`."""
        reader = StreamReader(rollout_id, after, self._patience())
        while not reader.has_ended:
            trouble: httpx.Response | httpx.TransportError | EverstepError
            try:
                request = self._request(self._http, reader.call())
                response = await self._http.send(request, stream=True)
                async with contextlib.aclosing(response):
                    self._has_answered = True
                    if response.status_code == 200:
                        async for data in response.aiter_raw():
                            for event in reader.take(data):
                                yield event
                        trouble = httpx.RemoteProtocolError("the stream ended early")
                    else:
                        await response.aread()
                        trouble = response
            except (httpx.TransportError, EverstepError) as error:
                trouble = error
            if not reader.has_ended:
                await asyncio.sleep(reader.pause_after(trouble))

    async def list(
        self,
        *,
        state: RolloutState | str | None = None,
        group: str | None = None,
        pool: str | None = None,
    ) -> AsyncIterator[RolloutSummary]:
        """As `Client.list`."""
        query = flows.query_of(state, group, pool, PAGE)
        while True:
            page = await self._run(flows.page(query, self._patience()))
            for summary in page.data:
                yield summary
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor

    async def pause(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Sequence[str]:
        """As `Client.pause`."""
        return await self._control("pause", rollouts, group, all)

    async def resume(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Sequence[str]:
        """As `Client.resume`."""
        return await self._control("resume", rollouts, group, all)

    async def cancel(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Sequence[str]:
        """As `Client.cancel`."""
        return await self._control("cancel", rollouts, group, all)

    async def ack(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Sequence[str]:
        """As `Client.ack`."""
        return await self._control("ack", rollouts, group, all)

    async def fork(
        self,
        rollout_id: str,
        at: int,
        *,
        samples: int = 1,
        seed: int | None = None,
        idempotency_key: str | None = None,
    ) -> Submitted:
        """As `Client.fork`."""
        request = ForkRequest(at=at, samples=samples, seed=seed)
        return await self._run(flows.fork(rollout_id, request, idempotency_key, self._patience()))

    async def export(self, rollout_id: str) -> bytes:
        """As `Client.export`."""
        return await self._run(flows.export(rollout_id, self._patience()))

    async def import_(
        self,
        export: bytes | Trajectory,
        *,
        allow_other_weights: bool = False,
        idempotency_key: str | None = None,
    ) -> Submitted:
        """As `Client.import_`."""
        return await self._run(
            flows.import_(export, allow_other_weights, idempotency_key, self._patience())
        )

    async def open_budget(
        self,
        pool: str,
        tokens: int,
        *,
        places: int | None = None,
        idempotency_key: str | None = None,
    ) -> Budget:
        """As `Client.open_budget`."""
        request = BudgetRequest(pool=pool, tokens=tokens, places=places)
        return await self._run(flows.open_budget(request, idempotency_key, self._patience()))

    async def wait_budget(self, budget_id: str, *, timeout_s: float | None = None) -> Budget:
        """As `Client.wait_budget`."""
        return await self._run(flows.wait_budget(budget_id, timeout_s, self._patience()))

    async def close_budget(self, budget_id: str) -> Budget:
        """As `Client.close_budget`."""
        return await self._run(flows.close_budget(budget_id, self._patience()))

    async def budgets(self, pool: str | None = None) -> Sequence[Budget]:
        """As `Client.budgets`."""
        return await self._run(flows.budgets(pool, self._patience()))

    async def weights(self) -> WeightsAnswer:
        """As `Client.weights`."""
        return await self._run(flows.weights(self._admin_key, self._patience()))

    async def stage_weights(
        self, path: str, *, priority: Priority = "background", rollback: int | None = None
    ) -> Staged:
        """As `Client.stage_weights`."""
        request = StageRequest(path=path, priority=priority, rollback=rollback)
        return await self._run(flows.stage_weights(request, self._admin_key, self._patience()))

    async def unstage_weights(self) -> WeightsAnswer:
        """As `Client.unstage_weights`."""
        return await self._run(flows.unstage_weights(self._admin_key, self._patience()))

    async def flip_weights(self, version: int, *, kv: KVPolicy = "keep") -> Updated:
        """As `Client.flip_weights`."""
        request = FlipRequest(version=version, kv=kv)
        return await self._run(
            flows.change_weights("flip", request, self._admin_key, self._patience())
        )

    async def update_weights(
        self, path: str, *, kv: KVPolicy = "keep", priority: Priority = "background"
    ) -> Updated:
        """As `Client.update_weights`."""
        request = UpdateRequest(path=path, kv=kv, priority=priority)
        return await self._run(
            flows.change_weights("update", request, self._admin_key, self._patience())
        )

    async def rollback_weights(
        self,
        version: int,
        *,
        path: str | None = None,
        kv: KVPolicy = "keep",
        priority: Priority = "background",
    ) -> Updated:
        """As `Client.rollback_weights`."""
        request = RollbackRequest(version=version, path=path, kv=kv, priority=priority)
        return await self._run(
            flows.change_weights("rollback", request, self._admin_key, self._patience())
        )

    async def close(self) -> None:
        """End the connections. Idempotent."""
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _control(
        self, verb: str, rollouts: str | Sequence[str] | None, group: str | None, every: bool
    ) -> Sequence[str]:
        selection = flows.selection_of(rollouts, group, every)
        return await self._run(flows.control(verb, selection, self._patience()))

    async def _run(self, flow: Flow[T]) -> T:
        reply: Reply = None
        while True:
            try:
                step: Step = flow.send(reply)
            except StopIteration as done:
                result: T = done.value
                return result
            reply = None
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                continue
            try:
                reply = await self._http.send(self._request(self._http, step))
                self._has_answered = True
            except httpx.TransportError as error:
                reply = error
