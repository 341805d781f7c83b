"""The engine's end of the trajectory bridge: a ROUTER around `Dealer`, on the event loop.

A group is loaded when a rank has credit for it and forgotten when it is sent: what waits for a slow
trainer stays with the source (the journal, say) and not in memory.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from ...engine import log
from ...engine.errors import BridgeError, ConfigError, PeerMissing
from ..curve import Gate, Keys, check_endpoint
from ..protocol import Deliver, Trained, TrajectoryGroup, decode_to_engine, encode
from .dealing import Dealer, Next, Outgoing

# what ranks say is small; a larger frame is not theirs
MAX_RANK_MESSAGE_BYTES = 2**20


class GroupSource(Protocol):
    """Where complete groups are until they are acknowledged."""

    def sizes(self, iteration: int) -> Sequence[int]:
        """Output tokens of each group of the iteration, in their order."""
        ...

    async def load(self, iteration: int, index: int) -> TrajectoryGroup: ...

    async def release(self, through: int) -> None:
        """The trainer holds everything up to this iteration durably. Idempotent."""
        ...


class TrajectorySender:
    """Delivers iterations to the ranks of a trainer, until durably acknowledged.

    acked       the last iteration that an earlier life of this process released
    patience_s  silence after which a rank counts as missing
    """

    def __init__(
        self,
        source: GroupSource,
        *,
        run: str,
        endpoint: str,
        keys: Keys | None = None,
        acked: int = -1,
        heartbeat_s: float = 5.0,
        patience_s: float = 30.0,
    ) -> None:
        """Raises ConfigError for an endpoint that is reached from outside without keys."""
        check_endpoint(endpoint, keys, "--bridge")
        self.dealer = Dealer(run, acked=acked, heartbeat_s=heartbeat_s)
        self.num_refused = 0
        """Messages that were none of this protocol."""
        self._source, self._endpoint, self._keys = source, endpoint, keys
        self._patience_s = patience_s
        self._released = acked
        self._context = zmq.asyncio.Context()
        self._gate: AsyncioAuthenticator | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._news = asyncio.Event()
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: BaseException | None = None
        self._stranger = ""
        self._telling: asyncio.Future[None] | None = None

    async def start(self) -> str:
        """Bind; returns the address as bound. Raises ConfigError where that is not possible."""
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_RANK_MESSAGE_BYTES)
        # what is on its way is bounded by credits, in bytes
        self._socket.setsockopt(zmq.SNDHWM, 0)
        if self._keys is not None:
            self._gate = AsyncioAuthenticator(self._context)
            self._gate.start()
            self._gate.configure_curve_callback("*", Gate(self._keys))
            self._keys.serve(self._socket)
        try:
            self._socket.bind(self._endpoint)
        except zmq.ZMQError as error:
            await self.close()
            raise ConfigError(f"--bridge: {self._endpoint}: {error}") from None
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self._tasks = [asyncio.create_task(self._take()), asyncio.create_task(self._send())]
        for task in self._tasks:
            task.add_done_callback(self._on_end)
        return bound.rstrip(b"\0").decode()

    async def finish(
        self,
        reason: str,
        patience_s: float = 5.0,
        *,
        needs: Sequence[str] = (),
        is_over: bool = False,
    ) -> None:
        """Tell the ranks that no more iterations come, and wait until they have left, or so long.

        needs    folders of versions that engines may start with again
        is_over  nothing of the run is ever asked for again

        They acknowledge what they save until then.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._until(lambda: self.dealer.is_delivered)
                for out in self.dealer.end(reason, needs, is_over=is_over):
                    await self._out(out)
                await self._until(lambda: not self.dealer.num_seated)
        if is_over:
            self.dealer.forget()
            await self._release()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        if self._gate is not None:
            self._gate.stop()
        if self._socket is not None:
            self._socket.close()
        self._context.term()

    def announce(self, iteration: int) -> None:
        """Its groups are complete in the source. Idempotent; raises as `Dealer.announce`."""
        self.dealer.announce(iteration, self._source.sizes(iteration))
        self._news.set()

    async def trained(self, iteration: int, deadline_s: float) -> Trained:
        """What the trainer made of it. Raises PeerMissing naming who is not there."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._until(lambda: iteration in self.dealer.trained)
        except TimeoutError:
            waited = f"iteration {iteration} was not trained within {deadline_s:.0f} s"
            raise PeerMissing(f"{waited}: {self._who_is_missing()}") from None
        return self.dealer.trained[iteration]

    async def changed(self, is_so: Callable[[], bool]) -> None:
        """Return once what the ranks have said makes it so. Raises BridgeError where the bridge
        has failed, ConfigError where a trainer begins with other weights than are served."""
        await self._until(is_so)

    async def all_there(self, deadline_s: float) -> None:
        """Return once every rank has said hello. Raises PeerMissing naming who has not."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._until(lambda: not self._missing())
        except TimeoutError:
            raise PeerMissing(
                f"the trainer is not complete after {deadline_s:.0f} s: {self._who_is_missing()}"
            ) from None

    # inside ---------------------------------------------------------------------------------------

    async def _until(self, is_so: Callable[[], bool]) -> None:
        async with self._changed:
            while not is_so():
                self._check()
                await self._changed.wait()

    def _missing(self) -> list[str]:
        return self.dealer.missing(time.monotonic(), self._patience_s)

    def _who_is_missing(self) -> str:
        return "; ".join(self._missing()) or f"all {self.dealer.world} ranks are there"

    def _check(self) -> None:
        if self._stranger:
            raise ConfigError(self._stranger)
        if self._failure is not None:
            raise BridgeError(f"the bridge has failed: {self._failure}") from self._failure

    async def _take(self) -> None:
        """Messages of ranks, one after the other."""
        assert self._socket is not None
        while True:
            frames = await self._socket.recv_multipart()
            peer, body = frames[0], frames[-1]
            try:
                if len(frames) != 2:
                    raise BridgeError(f"a message is one frame, this one has {len(frames) - 1}")
                message = decode_to_engine(body)
            except BridgeError as error:
                self.num_refused += 1
                log.event("bridge.refused", level="warning", reason=str(error))
                continue
            for answer in self.dealer.take(peer, message, time.monotonic()):
                await self._out(answer)
            # he was told before we end
            self._stranger = self.dealer.stranger
            await self._release()
            self._news.set()
            await self._tell()

    async def _release(self) -> None:
        if self.dealer.acked > self._released:
            self._released = self.dealer.acked
            await self._source.release(self._released)

    async def _send(self) -> None:
        """Groups and ends of shares, as credit allows, and a ping now and then."""
        pinged_s = time.monotonic()
        while True:
            self._news.clear()
            while (what := self.dealer.next()) is not None:
                if isinstance(what, Next):
                    await self._deliver(what)
                else:
                    await self._out(what)
            await self._tell()
            left_s = pinged_s + self.dealer.heartbeat_s - time.monotonic()
            # not wait_for: in Python 3.11 it may swallow a cancellation
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, left_s)):
                    await self._news.wait()
            if time.monotonic() - pinged_s >= self.dealer.heartbeat_s:
                pinged_s = time.monotonic()
                for ping in self.dealer.pings():
                    await self._out(ping)

    async def _deliver(self, what: Next) -> None:
        group = await self._source.load(what.iteration, what.index)
        deliver = Deliver(what.seat.session, what.iteration, what.place, group)
        frame = encode(deliver)
        if self.dealer.delivered(what, len(frame)):
            assert self._socket is not None
            await self._socket.send_multipart([what.seat.peer, frame], copy=False)

    async def _out(self, what: Outgoing) -> None:
        assert self._socket is not None
        peer, message = what
        await self._socket.send_multipart([peer, encode(message)])

    def _on_end(self, task: "asyncio.Task[None]") -> None:
        """A fault of ours, or of the source, is said to whoever waits."""
        if task.cancelled():
            return
        self._failure = task.exception()
        log.event("bridge.failed", level="error", error=str(self._failure))
        self._telling = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
