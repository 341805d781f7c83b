"""Deltas of rollouts → server-sent events, as fast as the reader takes them and no faster.

Nothing queues up here: a delta is read from its rollout when the reader is ready for it. A
silent stream sends comments, and a reader that leaves is noticed at once.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ..engine.errors import EngineDied, EverstepError
from ..engine.manager.manager import Delta, RolloutManager
from ..engine.rollout import FinishReason, Rollout, RolloutState

HEARTBEAT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
ResultT = TypeVar("ResultT")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class RolloutFailed(EverstepError):
    """A rollout ended with an error; `code` is the word before the colon of its detail."""

    def __init__(self, reason: FinishReason | None) -> None:
        detail = (reason.detail if reason else None) or "the rollout failed"
        super().__init__(detail)
        word = detail.partition(":")[0]
        if word.isidentifier():
            self.code = word


def failure(manager: RolloutManager, rollout: Rollout) -> EverstepError:
    """What to answer for a failed rollout: try elsewhere when the engine is gone for good."""
    if manager.is_healthy:
        return RolloutFailed(rollout.finish_reason)
    return EngineDied(str(RolloutFailed(rollout.finish_reason)))


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class EventStream:
    """An ASGI response of server-sent events.

    events       bytes of whole events; an EverstepError ends the stream with an error event
    on_error     the error as the bytes of the last events
    refuse       answers an error that comes before the first event, when a status can be sent
    heartbeat_s  a comment is sent after so long without an event
    on_end       called once, however it ends: the place to cancel what nobody reads any more
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        headers: Mapping[str, str],
        heartbeat_s: float,
        on_end: Callable[[], None],
        on_error: Callable[[EverstepError], bytes],
        refuse: Callable[[EverstepError], Callable[[Scope, Receive, Send], Awaitable[None]]],
    ) -> None:
        self._events = events
        self._headers = headers
        self._heartbeat_s = heartbeat_s
        self._on_end = on_end
        self._on_error = on_error
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(scope, receive, send))
        leaver = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({writer, leaver}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                # a reader that went away while it was written to is no fault of ours
                with contextlib.suppress(OSError):
                    writer.result()
        finally:
            await _end(writer)
            await _end(leaver)
            await self._events.aclose()
            self._on_end()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False
        try:
            async with contextlib.aclosing(
                _with_heartbeats(self._events, self._heartbeat_s)
            ) as events:
                async for data in events:
                    if not has_started:
                        await send(self._head())
                        has_started = True
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except EverstepError as error:
            if not has_started:
                await self._refuse(error)(scope, receive, send)
                return
            body = self._on_error(error)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if not has_started:
            await send(self._head())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _head(self) -> dict[str, object]:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            # proxies that would hold events back are told not to
            "x-accel-buffering": "no",
            **self._headers,
        }
        encoded = [
            (name.encode("latin-1"), text.encode("latin-1")) for name, text in headers.items()
        ]
        return {"type": "http.response.start", "status": 200, "headers": encoded}


async def _with_heartbeats(events: AsyncIterator[bytes], every_s: float) -> AsyncGenerator[bytes]:
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.create_task(_next(events))
            done, _ = await asyncio.wait({pending}, timeout=every_s)
            if not done:
                yield HEARTBEAT
                continue
            try:
                data = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield data
    finally:
        if pending is not None:
            await _end(pending)


async def _next(events: AsyncIterator[ResultT]) -> ResultT:
    return await anext(events)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[ResultT]) -> None:
    """Cancel and wait; whatever it ended with was looked at before, or is of no use now."""
    if not task.done():
        task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def unless_disconnected(request: Request, work: Awaitable[ResultT]) -> ResultT:
    """The result of `work`; raises ClientGone, with `work` cancelled, when the client leaves."""
    worker = asyncio.ensure_future(work)
    leaver = asyncio.create_task(_until_disconnect(request.receive))
    try:
        await asyncio.wait({worker, leaver}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        return worker.result()
    finally:
        await _end(worker)
        await _end(leaver)


async def deltas(
    manager: RolloutManager, rollout_ids: Sequence[str]
) -> AsyncGenerator[tuple[int, Delta]]:
    """(choice, delta) of all rollouts as they come. Raises `failure` when one failed.

    Each rollout waits with its next delta until the last one was taken.
    """
    if len(rollout_ids) == 1:
        async for delta in _deltas_of(manager, rollout_ids[0]):
            yield 0, delta
        return
    # one place: a pump goes on only when the reader has taken what another gave
    queue: asyncio.Queue[tuple[int, Delta | BaseException]] = asyncio.Queue(maxsize=1)

    async def pump(index: int, rollout_id: str) -> None:
        try:
            async for delta in _deltas_of(manager, rollout_id):
                await queue.put((index, delta))
        except EverstepError as error:
            await queue.put((index, error))

    pumps = [asyncio.create_task(pump(i, rollout_id)) for i, rollout_id in enumerate(rollout_ids)]
    num_open = len(pumps)
    try:
        while num_open:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            num_open -= item.is_last
            yield index, item
    finally:
        for task in pumps:
            await _end(task)


async def _deltas_of(manager: RolloutManager, rollout_id: str) -> AsyncGenerator[Delta]:
    num_shown = 0
    async for delta in manager.stream(rollout_id):
        if delta.is_last and delta.rollout.state is RolloutState.FAILED:
            raise failure(manager, delta.rollout)
        # by a cursor of our own: what became final while a reader was busy is not lost
        delta.text = delta.rollout.text[num_shown:]
        num_shown += len(delta.text)
        yield delta
