"""A rank's connection to one receiver: blocking calls, no thread. What was sent and not yet
acknowledged is kept, and sent again after the connection was cut."""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from ...engine.errors import BridgeError, PeerMissing, PeerRefused
from ..curve import Keys, check_endpoint
from ..protocol import PROTOCOL_VERSION, check_version, encode
from ..trajectories.dealing import SOFTWARE
from . import checksum as weight_checksum
from .checksum import with_spans
from .chunks import Chunk
from .protocol import (
    MAX_MESSAGE_BYTES,
    Alive,
    Arrived,
    Begun,
    Digests,
    Fault,
    FromReceiver,
    Got,
    Offer,
    Piece,
    Publish,
    WeightsHello,
    WeightsRefusal,
    WeightsWelcome,
    Withdraw,
    decode_from_receiver,
)

HELLO_EVERY_S = 1.0
# of a rank to one receiver: more would only lie in memory, and leave the cache
MAX_WINDOW_BYTES = 16 * 2**20
_TURN_MS = 100
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class VersionLost(BridgeError):
    """What was sent of a version is gone, and it can be sent again from its beginning."""


Answer = Begun | Digests | Arrived


class _Sent(NamedTuple):
    """A piece on its way. The frame stays, for the case that it must be sent again."""

    number: int
    head: bytes
    frame: zmq.Frame
    size: int


class WeightLink:
    """To the receiver at `endpoint`.

    deadline_s  how long it may say nothing while it is waited for
    """

    def __init__(
        self,
        endpoint: str,
        *,
        run: str,
        lineage: str,
        rank: int,
        world: int,
        keys: Keys | None,
        deadline_s: float,
    ) -> None:
        """Raises ConfigError for an address beyond this machine without keys."""
        check_endpoint(endpoint, keys, "publish.endpoints")
        weight_checksum.prepare()
        self.endpoint = endpoint
        self.num_bytes = 0
        """Of pieces, sent and acknowledged, of the version under way."""
        self._hello = WeightsHello(
            protocol=PROTOCOL_VERSION,
            software=SOFTWARE,
            run=run,
            lineage=lineage,
            rank=rank,
            world=world,
        )
        self._deadline_s = deadline_s
        self._welcome: WeightsWelcome | None = None
        self._is_known = False
        """Welcomed on this connection."""
        self._receiver = ""
        """The life of it that the version under way is sent to."""
        self._num_failed = 0
        """Handshakes, in a row."""
        self._heard_s = self._asked_s = 0.0
        # of the version under way
        self._version: tuple[int, int] | None = None
        self._asking: Offer | Publish | None = None
        """What is said again after the connection was cut, until it is answered."""
        self._on_way: deque[_Sent] = deque()
        self._on_way_bytes = 0
        self.window = 0
        """Bytes that may be on their way."""
        self._answers: dict[type, Answer] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.IDENTITY, f"{lineage}/{rank}".encode()[-255:])
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        # without a connection nothing is queued: every connection begins with a hello
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        # a host that is gone does not say so
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 20000)
        if keys is not None:
            keys.join(self._socket)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | _FAILED | zmq.EVENT_DISCONNECTED
        )
        self._poller = zmq.Poller()
        for one in (self._socket, self._monitor):
            self._poller.register(one, zmq.POLLIN)
        self._socket.connect(endpoint)

    # calls ----------------------------------------------------------------------------------------

    def begin(self, version: int, attempt: int) -> None:
        """Be known to the receiver.

        This and every other call raises PeerMissing, PeerRefused, BridgeError (the receiver has
        given the version up for good) and VersionLost, in one line that names the receiver.
        """
        self._version = (version, attempt)
        self._asking = None
        self._answers.clear()
        self._on_way.clear()
        self._on_way_bytes = self.num_bytes = 0
        self._receiver = ""
        self._heard_s = time.monotonic()
        self._turn(0)
        self._until(lambda: self._is_known, "to be known")
        assert self._welcome is not None
        self._receiver = self._welcome.receiver
        self.window = min(MAX_WINDOW_BYTES, self._welcome.window)

    def offer(self, offer: Offer) -> None:
        """Return when pieces may come."""
        self._ask(offer, Begun)

    def digests(self) -> dict[str, str]:
        """Of every tensor, as they arrived."""
        found = self._ask(None, Digests)
        assert isinstance(found, Digests)
        return found.tensors

    def publish(self, publish: Publish) -> str:
        """The folder, when it has its name."""
        found = self._ask(publish, Arrived)
        assert isinstance(found, Arrived)
        return found.path

    def send(self, chunk: Chunk) -> None:
        """Put it on its way, as soon as there is room."""
        assert self._version is not None
        room = max(0, self.window - len(chunk.data))
        self._until(lambda: self._on_way_bytes <= room, f"to take piece {chunk.number}")
        spans = [number for span in chunk.spans for number in span]
        crc = with_spans(spans, chunk.crc, len(chunk.data))
        piece = Piece(*self._version, chunk.number, spans, crc)
        sent = _Sent(
            chunk.number, encode(piece), zmq.Frame(chunk.data, copy=False), len(chunk.data)
        )
        self._on_way.append(sent)
        self._on_way_bytes += sent.size
        self._send_piece(sent)

    def settle(self, number: int) -> None:
        """Return when this piece and all before it are in their places."""
        self._until(
            lambda: not self._on_way or self._on_way[0].number > number,
            f"to acknowledge piece {number}",
        )

    def withdraw(self, reason: str) -> None:
        """The version will not come. Never fails."""
        if self._version is not None:
            self._say(Withdraw(*self._version, reason))
        self._version = self._asking = None
        self._on_way.clear()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()
        self._context.term()

    # inside ---------------------------------------------------------------------------------------

    def _ask(self, asking: Offer | Publish | None, kind: type[Answer]) -> Answer:
        self._asking = asking
        if asking is not None:
            self._say(asking)
        self._until(lambda: kind in self._answers, f"to say {kind.__name__.lower()}")
        self._asking = None
        return self._answers[kind]

    def _until(self, is_so: Callable[[], bool], what: str) -> None:
        """Turn until it is so. Silence is what ends the waiting, not slowness."""
        self._heard_s = time.monotonic()
        while not is_so():
            self._turn(_TURN_MS)
            silence = time.monotonic() - self._heard_s
            if silence > self._deadline_s:
                hint = "; it does not know our keys, or we not its" if self._num_failed else ""
                raise PeerMissing(
                    f"no receiver of weights answers at {self.endpoint} for {silence:.0f} s "
                    f"({what}){hint}"
                )

    def _turn(self, timeout_ms: int) -> None:
        """Hear what there is, or wait so long for something."""
        if not self._is_known and time.monotonic() - self._asked_s > HELLO_EVERY_S:
            self._say_hello()
        ready = dict(self._poller.poll(timeout_ms))
        while ready:
            if self._monitor in ready:
                self._note(recv_monitor_message(self._monitor)["event"])
            if self._socket in ready:
                self._take(decode_from_receiver(self._socket.recv()))
            ready = dict(self._poller.poll(0))

    def _note(self, event: int) -> None:
        """What became of the connection."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise PeerRefused(f"the receiver of weights at {self.endpoint} does not accept our key")
        self._is_known = False
        self._num_failed += bool(event & _FAILED)
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_failed = 0
            self._say_hello()

    def _say_hello(self) -> None:
        self._asked_s = time.monotonic()
        self._say(self._hello)

    def _say(self, message: WeightsHello | Offer | Publish | Withdraw) -> None:
        """What finds no connection is said again after the next hello."""
        try:
            self._socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:
            self._is_known = False

    def _send_piece(self, sent: _Sent) -> None:
        try:
            self._socket.send(sent.head, zmq.DONTWAIT | zmq.SNDMORE)
            self._socket.send(sent.frame, zmq.DONTWAIT, copy=False)
        except zmq.Again:
            self._is_known = False

    def _take(self, message: FromReceiver) -> None:
        self._heard_s = time.monotonic()
        match message:
            case WeightsWelcome():
                self._begin(message)
            case WeightsRefusal():
                if message.is_final:
                    raise PeerRefused(
                        f"the receiver of weights at {self.endpoint} says: {message.reason}"
                    )
                self._say_hello()
            case Alive():
                pass
            case _ if (message.version, message.attempt) != self._version:
                # of an attempt that is over
                pass
            case Got():
                self._settle(message.number)
            case Fault():
                kind = BridgeError if message.is_final else VersionLost
                raise kind(
                    f"the receiver of weights at {self.endpoint} gives version "
                    f"{message.version} up: {message.reason}"
                )
            case Begun() | Digests() | Arrived():
                self._answers[type(message)] = message

    def _begin(self, welcome: WeightsWelcome) -> None:
        check_version(welcome.protocol, welcome.software)
        self._welcome, self._is_known = welcome, True
        if isinstance(self._asking, Offer):
            self._receiver = welcome.receiver
            self._say(self._asking)
            return
        if not self._receiver or self._version is None:
            return
        is_same = (welcome.version, welcome.attempt) == self._version
        has_sent = self.num_bytes or self._on_way
        if welcome.receiver != self._receiver:
            raise self._lost("another one answers now")
        if self._asking is not None:
            self._say(self._asking)
        elif has_sent and not is_same:
            raise self._lost("it has given it up")
        elif is_same:
            self._settle(welcome.have)
            for sent in self._on_way:
                self._send_piece(sent)

    def _lost(self, why: str) -> VersionLost:
        number = self._version[0] if self._version else -1
        return VersionLost(
            f"the receiver of weights at {self.endpoint} lost version {number} on its way: {why}"
        )

    def _settle(self, number: int) -> None:
        while self._on_way and self._on_way[0].number < number:
            done = self._on_way.popleft()
            self._on_way_bytes -= done.size
            self.num_bytes += done.size
