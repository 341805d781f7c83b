"""The client of a running server's rollouts for an event loop; `client.py` says what it does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from ..engine.errors import EverstepError
from ..engine.rollout import RolloutState
from ..server.rollouts.wire import RolloutSummary, StreamEvent
from . import flows
from .calls import Calls, as_method
from .event_stream import StreamReader
from .flows import Flow, Pause, Reply, Step

T = TypeVar("T")
P = ParamSpec("P")


def awaited(
    call: Callable[Concatenate[Calls, P], Flow[T]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    """The call as a method that is awaited for what its flow returns."""

    async def method(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await client._run(call(client._calls, *args, **kwargs))

    return as_method(method, call)


class AsyncClient:
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
        self._calls = Calls(base_url, api_key, admin_key, retry_s)
        self._owns_http = http is None
        self._http = http or httpx.AsyncClient(limits=httpx.Limits(max_connections=None))

    @property
    def base_url(self) -> str:
        return self._calls.address.url

    submit = awaited(Calls.submit)
    submit_many = awaited(Calls.submit_many)
    get = awaited(Calls.get)
    get_many = awaited(Calls.get_many)
    wait = awaited(Calls.wait)
    wait_any = awaited(Calls.wait_any)
    pause = awaited(Calls.pause)
    resume = awaited(Calls.resume)
    cancel = awaited(Calls.cancel)
    ack = awaited(Calls.ack)
    fork = awaited(Calls.fork)
    export = awaited(Calls.export)
    import_ = awaited(Calls.import_)
    open_budget = awaited(Calls.open_budget)
    wait_budget = awaited(Calls.wait_budget)
    close_budget = awaited(Calls.close_budget)
    budgets = awaited(Calls.budgets)
    weights = awaited(Calls.weights)
    stage_weights = awaited(Calls.stage_weights)
    unstage_weights = awaited(Calls.unstage_weights)
    flip_weights = awaited(Calls.flip_weights)
    update_weights = awaited(Calls.update_weights)
    rollback_weights = awaited(Calls.rollback_weights)

    async def stream(self, rollout_id: str, *, after: int = 0) -> AsyncIterator[StreamEvent]:
        """As `Client.stream`."""
        reader = StreamReader(rollout_id, after, self._calls.patience())
        while not reader.has_ended:
            trouble: httpx.Response | httpx.TransportError | EverstepError
            try:
                request = self._calls.request(self._http, reader.call())
                response = await self._http.send(request, stream=True)
                async with contextlib.aclosing(response):
                    self._calls.has_answered = True
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
        query = flows.query_of(state, group, pool, flows.PAGE)
        while True:
            page = await self._run(flows.page(query, self._calls.patience()))
            for summary in page.data:
                yield summary
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor

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
                reply = await self._http.send(self._calls.request(self._http, step))
                self._calls.has_answered = True
            except httpx.TransportError as error:
                reply = error
