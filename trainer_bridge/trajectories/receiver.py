"""A rank's end of the trajectory bridge: plain blocking calls, a thread that owns the socket.

The thread answers the engine while the rank trains, and says hello again when the engine is gone
and comes back; what the rank has already got is not sent to it twice.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from ...engine import log
from ...engine.errors import BridgeError, PeerMissing, PeerRefused
from ..curve import Keys, check_endpoint
from ..protocol import (
    PROTOCOL_VERSION,
    Bye,
    Credit,
    Deliver,
    Durable,
    Hello,
    IterationEnd,
    Ping,
    Pong,
    Refused,
    RunEnd,
    ToEngine,
    ToRank,
    Trained,
    TrajectoryGroup,
    Welcome,
    check_version,
    decode_to_rank,
    encode,
)
from .dealing import SOFTWARE

HELLO_EVERY_S = 1.0
News = Deliver | IterationEnd | RunEnd
_TURN_MS = 100


class _Amount(NamedTuple):
    """Of groups and their bytes on the wire."""

    groups: int = 0
    bytes: int = 0

    def __add__(self, other: "_Amount") -> "_Amount":  # type: ignore[override]
        return _Amount(self.groups + other.groups, self.bytes + other.bytes)

    def __sub__(self, other: "_Amount") -> "_Amount":
        return _Amount(self.groups - other.groups, self.bytes - other.bytes)


class Iteration:
    """A rank's share of one iteration. Iterate over it to take its groups as they come.

    num_groups, num_groups_in_all, num_tokens_in_all are known when the last has been taken.
    """

    def __init__(self, number: int, take: "Iterator[TrajectoryGroup | IterationEnd]") -> None:
        self.number = number
        self.num_groups = 0
        self.num_groups_in_all = 0
        self.num_tokens_in_all = 0
        self._take = take

    def __iter__(self) -> Iterator[TrajectoryGroup]:
        for found in self._take:
            if isinstance(found, IterationEnd):
                self.num_groups = found.num_groups
                self.num_groups_in_all = found.num_groups_in_all
                self.num_tokens_in_all = found.num_tokens_in_all
            else:
                yield found


class TrajectoryReceiver:
    """Takes groups from an engine, once each.

    lineage       of this life of the trainer, the same on every rank
    checkpoint    what it was started from; done_through: the last iteration that it holds;
                  oldest_through: as in `Hello`; begun: the version that it is
    base          digest of the model, where it was started from none
    max_groups    delivered and not yet taken, at most; max_bytes likewise, give or take a group
    """

    def __init__(
        self,
        endpoint: str,
        *,
        run: str,
        lineage: str,
        rank: int = 0,
        world: int = 1,
        checkpoint: str = "",
        done_through: int = -1,
        oldest_through: int | None = None,
        begun: Trained | None = None,
        base: str = "",
        keys: Keys | None = None,
        max_groups: int = 64,
        max_bytes: int = 256 * 2**20,
    ) -> None:
        """Raises ConfigError for an address beyond this machine without keys."""
        check_endpoint(endpoint, keys, "source.endpoint")
        self.endpoint = endpoint
        self.welcome: Welcome | None = None
        """The engine's last."""
        self.doing = ""
        """Said to whoever waits for this rank."""
        self.ended: RunEnd | None = None
        """What the engine said when its run ended."""
        self._run, self._lineage, self._rank, self._world = run, lineage, rank, world
        self._checkpoint, self._done_through = checkpoint, done_through
        self._oldest_through, self._base = oldest_through, base
        self._max_groups, self._max_bytes = max_groups, max_bytes
        self._keys = keys
        # written by the thread alone
        self._at, self._place, self._session = -1, 0, 0
        self._heard_s = self._asked_s = 0.0
        self._is_known = False
        """Welcomed on this connection."""
        self._got = _Amount()
        self._got_before = _Amount()
        self._dropped = _Amount()
        self._credited = Credit(0, 0, 0)
        # written by the caller alone
        self._taken = _Amount()
        self._last_trained = begun
        self._inbox: queue.SimpleQueue[tuple[News, int]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._is_welcome = threading.Event()
        self._failure: BridgeError | None = None
        self._is_closing = False
        self._context = zmq.Context()
        self._waker = self._context.socket(zmq.PAIR)
        self._waker.bind("inproc://wake")
        self._thread = threading.Thread(target=self._run_thread, name="bridge", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def connect(self, deadline_s: float) -> Welcome:
        """Return once the engine has taken this rank. Raises PeerMissing, PeerRefused, BridgeError."""
        end = time.monotonic() + deadline_s
        while not self._is_welcome.wait(0.05):
            self._check()
            if time.monotonic() > end:
                raise PeerMissing(f"no engine answers at {self.endpoint} for {deadline_s:.0f} s")
        self._check()
        assert self.welcome is not None
        return self.welcome

    def next_iteration(self, deadline_s: float) -> Iteration | None:
        """The next one, as soon as anything of it is here; all of the last must have been taken.
        None: the engine's run has ended.

        Raises PeerMissing when nothing comes; likewise while its groups are taken.
        """
        first, size = self._get(deadline_s)
        if isinstance(first, RunEnd):
            self.ended = first
            return None
        return Iteration(first.iteration, self._share(first, size, deadline_s))

    def trained(self, iteration: int, version: int, digest: str, path: str = "") -> None:
        """The update of the iteration is in the weights of `version`, in the folder `path`."""
        self._last_trained = Trained(iteration, version, digest, path)
        self._say(self._last_trained)

    def durable(
        self, checkpoint: str, done_through: int, oldest_through: int | None = None
    ) -> None:
        """A durable checkpoint holds the effect of everything up to this iteration; every one that
        is kept, of everything up to `oldest_through`."""
        self._done_through, self._oldest_through = done_through, oldest_through
        self._say(Durable(checkpoint, done_through, oldest_through))

    def close(self, reason: str = "") -> None:
        """Say goodbye and end the thread."""
        if self._thread.is_alive():
            self._is_closing = True
            self._say(Bye(reason))
            self._thread.join(5.0)
        self._waker.close(0)
        self._context.term()

    # the caller's side ----------------------------------------------------------------------------

    def _share(
        self, first: Deliver | IterationEnd, size: int, deadline_s: float
    ) -> Iterator[TrajectoryGroup | IterationEnd]:
        found: News = first
        num_bytes = size
        while isinstance(found, Deliver):
            yield found.group
            self._taken = self._taken + _Amount(1, num_bytes)
            self._wake()
            found, num_bytes = self._get(deadline_s)
        if isinstance(found, RunEnd):
            raise BridgeError(f"the engine ended in mid-iteration: {found.reason}")
        yield found

    def _get(self, deadline_s: float) -> tuple[News, int]:
        end = time.monotonic() + deadline_s
        while True:
            try:
                return self._inbox.get(timeout=0.1)
            except queue.Empty:
                self._check()
                if time.monotonic() > end:
                    raise PeerMissing(self._why_nothing(deadline_s)) from None

    def _why_nothing(self, deadline_s: float) -> str:
        silence = time.monotonic() - self._heard_s
        if self.welcome is None:
            return f"no engine answers at {self.endpoint} for {deadline_s:.0f} s"
        if silence > 3 * self.welcome.heartbeat_s:
            return f"the engine at {self.endpoint} is silent for {silence:.0f} s"
        return (
            f"the engine at {self.endpoint} is there, but brought no group for {deadline_s:.0f} s"
        )

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _say(self, message: ToEngine) -> None:
        self._outbox.put(message)
        self._wake()

    def _wake(self) -> None:
        """The thread looks about at once. A waker that is full has been heard already."""
        with contextlib.suppress(zmq.Again):
            self._waker.send(b"", zmq.DONTWAIT)

    # the thread's side ----------------------------------------------------------------------------

    def _run_thread(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.IDENTITY, f"{self._lineage}/{self._rank}".encode()[-255:])
        if self._keys is not None:
            self._keys.join(socket)
        # without a connection nothing is queued: every connection begins with a Hello
        socket.setsockopt(zmq.IMMEDIATE, 1)
        monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED
        )
        wake = self._context.socket(zmq.PAIR)
        wake.connect("inproc://wake")
        poller = zmq.Poller()
        for one in (socket, monitor, wake):
            poller.register(one, zmq.POLLIN)
        try:
            socket.connect(self.endpoint)
            while not (self._is_closing and (self._outbox.empty() or not self._is_known)):
                self._speak(socket)
                ready = dict(poller.poll(_TURN_MS))
                if wake in ready:
                    wake.recv()
                if monitor in ready:
                    self._note(socket, recv_monitor_message(monitor)["event"])
                if socket in ready:
                    frame = socket.recv()
                    self._take(socket, decode_to_rank(frame), len(frame))
        except BridgeError as error:
            self._failure = error
        except Exception as error:
            self._failure = BridgeError(
                f"bridge to {self.endpoint}: {type(error).__name__}: {error}"
            )
        finally:
            socket.disable_monitor()
            for one in (monitor, wake, socket):
                one.close()

    def _note(self, socket: "zmq.Socket[bytes]", event: int) -> None:
        """What became of the connection."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise PeerRefused(f"the engine at {self.endpoint} does not accept our key")
        self._is_known = False
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._say_hello(socket)

    def _speak(self, socket: "zmq.Socket[bytes]") -> None:
        """Hello after silence; what the caller has to say, and the credit that it has made."""
        now = time.monotonic()
        patience = 3 * self.welcome.heartbeat_s if self.welcome is not None else HELLO_EVERY_S
        if now - max(self._heard_s, self._asked_s) > patience:
            self._is_known = False
            self._say_hello(socket)
        if not self._is_known:
            return
        with contextlib.suppress(queue.Empty):
            while self._send(socket, self._outbox.get_nowait()):
                pass
        credit = self._credit()
        if credit != self._credited and self._send(socket, credit):
            self._credited = credit

    def _send(self, socket: "zmq.Socket[bytes]", message: ToEngine) -> bool:
        """False if there is no connection: the Hello of the next one tells what this would have."""
        try:
            socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:
            self._is_known = False
        return self._is_known

    def _credit(self) -> Credit:
        """What may be delivered in all since the session began: the limits, less what had come
        and was not taken then, and what has been taken, or came twice, since."""
        limits = _Amount(self._max_groups, self._max_bytes)
        left = limits - self._got_before + self._taken + self._dropped
        return Credit(self._session, max(0, left.groups), max(0, left.bytes))

    def _say_hello(self, socket: "zmq.Socket[bytes]") -> None:
        self._asked_s = time.monotonic()
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            software=SOFTWARE,
            run=self._run,
            lineage=self._lineage,
            rank=self._rank,
            world=self._world,
            checkpoint=self._checkpoint,
            done_through=self._done_through,
            oldest_through=self._oldest_through,
            at=self._at,
            place=self._place,
            trained=self._last_trained,
            base=self._base,
        )
        self._send(socket, hello)

    def _take(self, socket: "zmq.Socket[bytes]", message: ToRank, size: int) -> None:
        self._heard_s = time.monotonic()
        match message:
            case Welcome():
                self._begin(message)
            case RunEnd():
                self._inbox.put((message, 0))
            case Refused():
                if message.is_final:
                    raise PeerRefused(f"the engine at {self.endpoint} says: {message.reason}")
                self._say_hello(socket)
            case Ping() if self._is_next(message.session, message.at, message.place):
                self._send(socket, Pong(self.doing))
            case Ping():
                self._say_hello(socket)
            case Deliver() if self._is_next(message.session, message.iteration, message.place):
                self._place += 1
                self._got = self._got + _Amount(1, size)
                self._inbox.put((message, size))
            case Deliver() if message.session == self._session:
                self._dropped = self._dropped + _Amount(1, size)
            case IterationEnd() if self._is_next(
                message.session, message.iteration, message.num_groups
            ):
                self._at, self._place = self._at + 1, 0
                self._inbox.put((message, 0))

    def _is_next(self, session: int, iteration: int, place: int) -> bool:
        """Anything else is of an older session, or came before."""
        return (session, iteration, place) == (self._session, self._at, self._place)

    def _begin(self, welcome: Welcome) -> None:
        check_version(welcome.protocol, welcome.software)
        here, there = (self._at, self._place), (welcome.at, welcome.place)
        if self._at < 0:
            self._at, self._place = there
        elif there > here:
            raise BridgeError(
                f"the engine at {self.endpoint} goes on with group {there[1]} of iteration "
                f"{there[0]}, this rank is at group {here[1]} of iteration {here[0]}"
            )
        # what it had sent before it read where this rank is comes twice, and is dropped
        self._session, self._got_before, self._dropped = welcome.session, self._got, _Amount()
        self.welcome, self._is_known = welcome, True
        self._is_welcome.set()
        log.event("bridge.welcome", rank=self._rank, at=self._at, place=self._place)
