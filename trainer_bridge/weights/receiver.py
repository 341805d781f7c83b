"""The engine's end of the weights' way: a ROUTER around one `Arrival`, on a thread of its own or in
a process of its own (`everstep receive-weights`).

Whatever a rank says, the versions that are there stay; a version that is under way appears whole
or not at all.
"""

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

from ...engine import log
from ...engine.errors import BridgeError, CheckpointError, ConfigError, WeightsRefused
from ..curve import Gate, Keys, check_endpoint
from ..protocol import PROTOCOL_VERSION, check_version, encode
from ..run.folders import hold
from ..trajectories.dealing import SOFTWARE
from . import checksum as weight_checksum
from .arrival import Arrival, Workers
from .pages import Pages
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
    ToReceiver,
    WeightsHello,
    WeightsRefusal,
    WeightsWelcome,
    Withdraw,
    decode_to_receiver,
)

HEARTBEAT_S = 2.0
PATIENCE_S = 60.0
MAX_BYTES = 64 * 2**20
_LEAST_WINDOW = 2 * 2**20
# when nothing has come for so long, there is time to hash; on more cores there always is
_PAUSE_S = 0.05
_FEW_CORES = 4


@dataclass
class _Seat:
    """A rank of the lineage that is served."""

    peer: bytes
    heard_s: float


class Settings(NamedTuple):
    """What errors call the endpoint, and what may be changed where another writes to the folder."""

    endpoint: str
    root: str


FLAGS = Settings("--bind", "--run-name or --root")


class WeightReceiver:
    """Puts the versions of one run into folders under `root`.

    max_bytes    on their way at once, of all ranks together; a rank has 2 MiB at least
    patience_s   silence of all ranks after which a version under way is given up
    on_arrival   told a version's number, its folder, its bytes, and the seconds since it was offered
    """

    def __init__(
        self,
        root: Path,
        *,
        run: str,
        endpoint: str,
        settings: Settings = FLAGS,
        keys: Keys | None = None,
        max_bytes: int = MAX_BYTES,
        heartbeat_s: float = HEARTBEAT_S,
        patience_s: float = PATIENCE_S,
        on_arrival: Callable[[int, Path, int, float], None] = lambda *_: None,
    ) -> None:
        """Raises ConfigError for an endpoint that is reached from outside without keys."""
        check_endpoint(endpoint, keys, settings.endpoint)
        weight_checksum.prepare()
        self.num_refused = 0
        """Messages that were none of this protocol."""
        self._root, self._run_name = root, run
        self._pages = Pages(root)
        self._endpoint, self._settings, self._keys = endpoint, settings, keys
        self._max_bytes, self._heartbeat_s = max_bytes, heartbeat_s
        self._patience_s, self._on_arrival = patience_s, on_arrival
        self._id = secrets.token_hex(8)
        self._lineage, self._world = "", 0
        self._past: set[str] = set()
        self._seats: dict[int, _Seat] = {}
        self._ranks: dict[bytes, int] = {}
        self._arrival: Arrival | None = None
        self._last: Arrived | None = None
        self._offered_s = self._heard_s = self._beat_s = 0.0
        self._is_told = False
        self._is_rung = False
        self._is_stopping = False
        self._pause_s = _PAUSE_S if (os.cpu_count() or 1) <= _FEW_CORES else 0.0
        self._workers = Workers()
        self._context = zmq.Context()
        self._gate: ThreadAuthenticator | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._held: BinaryIO | None = None
        self._waker, self._wake = socket.socketpair()
        for one in (self._waker, self._wake):
            one.setblocking(False)

    def start(self) -> str:
        """Bind; returns the address as bound. Raises ConfigError where that is not possible.

        `close` is called in every case.
        """
        self._held = hold(self._root, self._settings.root)
        self._pages.clean()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        # what is on its way is bounded by windows, in bytes
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        if self._keys is not None:
            self._gate = ThreadAuthenticator(self._context)
            self._gate.start()
            self._gate.configure_curve_callback("*", Gate(self._keys))
            self._keys.serve(self._socket)
        try:
            self._socket.bind(self._endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"{self._settings.endpoint}: {self._endpoint}: {error}") from None
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return bound.rstrip(b"\0").decode()

    def run(self) -> None:
        """Take what comes, until `stop`."""
        assert self._socket is not None
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker, zmq.POLLIN)
        while not self._is_stopping:
            arrival = self._arrival
            is_short = arrival is not None and arrival.has_whole
            wait_s = self._pause_s if is_short else self._heartbeat_s / 2
            ready = dict(poller.poll(int(1000 * wait_s)))
            if arrival is not None and not ready:
                arrival.hash()
            if self._waker.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._waker.recv(4096)
                self._is_rung = False
            if self._socket in ready:
                self._take_next()
            self._look()

    def stop(self) -> None:
        """`run` returns soon; on any thread."""
        self._is_stopping = True
        self._ring()

    def close(self) -> None:
        """After `run`. What was not finished goes."""
        self._give_up()
        self._workers.close()
        self._pages.close()
        if self._gate is not None:
            self._gate.stop()
        if self._socket is not None:
            self._socket.close()
        self._context.term()
        for one in (self._waker, self._wake, self._held):
            if one is not None:
                one.close()

    # messages -------------------------------------------------------------------------------------

    def _take_next(self) -> None:
        """A message. One at a time: who sent it waits for the word that there is room again."""
        assert self._socket is not None
        with contextlib.suppress(zmq.Again):
            peer, *frames = self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
            self._take_frames(bytes(peer.buffer), [frame.buffer for frame in frames])

    def _take_frames(self, peer: bytes, frames: list[memoryview]) -> None:
        try:
            if not frames:
                raise BridgeError("a message without a frame")
            message = decode_to_receiver(frames[0])
            expected = 2 if isinstance(message, Piece) else 1
            if len(frames) != expected:
                raise BridgeError(f"a message of {expected} frames, this one has {len(frames)}")
        except BridgeError as error:
            self.num_refused += 1
            log.event("weights.refused", level="warning", reason=str(error))
            return
        if isinstance(message, WeightsHello):
            self._hello(peer, message)
            return
        rank = self._ranks.get(peer)
        if rank is None:
            self._say(peer, WeightsRefusal("say hello first", is_final=False))
            return
        self._heard_s = self._seats[rank].heard_s = time.monotonic()
        try:
            self._take(rank, message, frames[-1])
        except (CheckpointError, WeightsRefused) as error:
            self._fail(message, str(error))

    def _take(self, rank: int, message: ToReceiver, data: memoryview) -> None:
        """Raises CheckpointError, WeightsRefused."""
        match message:
            case Offer():
                self._offer(rank, message)
            case Piece() if self._is_current(message):
                self._piece(rank, message, data)
            case Publish() if self._is_current(message):
                self._publish(message)
            case Publish() if self._is_last(message):
                # it was not heard
                assert self._last is not None
                self._say(self._seats[rank].peer, self._last)
            case Withdraw() if self._is_current(message):
                log.event("weights.withdrawn", version=message.version, reason=message.reason)
                self._give_up()

    def _hello(self, peer: bytes, hello: WeightsHello) -> None:
        reason = self._why_not(hello)
        if reason is not None:
            log.event("weights.refused", level="warning", reason=reason)
            self._say(peer, WeightsRefusal(reason))
            return
        if hello.lineage != self._lineage:
            self._begin_lineage(hello)
        self._heard_s = time.monotonic()
        self._seats[hello.rank] = _Seat(peer, self._heard_s)
        self._ranks = {seat.peer: rank for rank, seat in self._seats.items()}
        arrival = self._arrival
        self._say(
            peer,
            WeightsWelcome(
                protocol=PROTOCOL_VERSION,
                software=SOFTWARE,
                receiver=self._id,
                window=max(_LEAST_WINDOW, self._max_bytes // hello.world),
                heartbeat_s=self._heartbeat_s,
                version=-1 if arrival is None else arrival.offer.version,
                attempt=0 if arrival is None else arrival.offer.attempt,
                have=0 if arrival is None else arrival.taken[hello.rank],
            ),
        )
        if hello.rank == 0:
            self._is_told = False

    def _why_not(self, hello: WeightsHello) -> str | None:
        try:
            check_version(hello.protocol, hello.software)
        except BridgeError as error:
            return str(error)
        if hello.run != self._run_name:
            return f"this receiver takes weights of the run {self._run_name!r}, not {hello.run!r}"
        if hello.rank >= hello.world:
            return f"rank {hello.rank} does not exist in a world of {hello.world}"
        if hello.lineage in self._past:
            return f"lineage {hello.lineage!r} was replaced by {self._lineage!r}"
        if hello.lineage == self._lineage and hello.world != self._world:
            return f"lineage {self._lineage!r} has a world of {self._world}, not {hello.world}"
        return None

    def _begin_lineage(self, hello: WeightsHello) -> None:
        """A new life of the trainer: everybody of the old one is sent away."""
        reason = f"lineage {self._lineage!r} was replaced by {hello.lineage!r}"
        for seat in self._seats.values():
            self._say(seat.peer, WeightsRefusal(reason))
        if self._lineage:
            self._past.add(self._lineage)
        self._seats.clear()
        self._ranks.clear()
        self._give_up()
        self._last = None
        self._lineage, self._world = hello.lineage, hello.world

    def _offer(self, rank: int, offer: Offer) -> None:
        if not self._is_current(offer):
            self._give_up()
            self._offered_s = time.monotonic()
            self._is_told = False
            self._arrival = Arrival(self._pages, offer, self._world, self._workers, self._ring)
            log.event("weights.offered", version=offer.version, bytes=offer.num_bytes)
        self._say(self._seats[rank].peer, Begun(offer.version, offer.attempt))

    def _piece(self, rank: int, piece: Piece, data: memoryview) -> None:
        """One that is not the rank's next was here before, or comes again after one that was lost."""
        arrival = self._arrival
        assert arrival is not None
        if piece.number == arrival.taken[rank]:
            arrival.take(rank, piece, data)

    def _publish(self, message: Publish) -> None:
        arrival = self._arrival
        assert arrival is not None
        path = arrival.publish(message.manifest)
        seconds = time.monotonic() - self._offered_s
        self._arrival = None
        self._last = Arrived(message.version, message.attempt, str(path))
        self._say_all(self._last, first_only=True)
        log.event("weights.arrived", version=message.version, path=str(path), seconds=seconds)
        self._on_arrival(message.version, path, arrival.num_bytes, seconds)

    # between messages -----------------------------------------------------------------------------

    def _look(self) -> None:
        """What has become due: acknowledgements, digests, a heartbeat, the end of our patience."""
        arrival, now = self._arrival, time.monotonic()
        if arrival is None:
            return
        number = (arrival.offer.version, arrival.offer.attempt)
        try:
            for rank in arrival.settle() & self._seats.keys():
                self._say(self._seats[rank].peer, Got(*number, arrival.have[rank]))
            # after the word that is waited for: to hash takes every core
            found = None if self._is_told else arrival.digests()
        except (CheckpointError, WeightsRefused) as error:
            # bytes that were spoilt on their way may be sent again
            self._fail(arrival.offer, str(error), is_final=not isinstance(error, WeightsRefused))
            return
        if found is not None and 0 in self._seats:
            self._is_told, self._heard_s = True, now
            self._say(self._seats[0].peer, Digests(*number, found))
        if now - self._beat_s > self._heartbeat_s:
            self._beat_s = now
            self._say_all(Alive(arrival.doing))
        is_waiting = not arrival.is_complete or self._is_told
        if is_waiting and now - self._heard_s > self._patience_s:
            self._fail(arrival.offer, f"{self._who_is_missing(now)}; it {arrival.doing}")

    def _who_is_missing(self, now: float) -> str:
        words = []
        for rank in range(self._world):
            seat = self._seats.get(rank)
            silence = (
                "has not said hello"
                if seat is None
                else f"is silent for {now - seat.heard_s:.0f} s"
            )
            words.append(f"rank {rank} of {self._world} {silence}")
        return ", ".join(words)

    # inside ---------------------------------------------------------------------------------------

    def _is_current(self, message: Offer | Piece | Publish | Withdraw) -> bool:
        return self._arrival is not None and _same(self._arrival.offer, message)

    def _is_last(self, message: Publish) -> bool:
        return self._last is not None and _same(self._last, message)

    def _fail(self, about: ToReceiver, reason: str, *, is_final: bool = True) -> None:
        """The version is given up, and every rank is told."""
        assert isinstance(about, Offer | Piece | Publish)
        self._give_up()
        log.event("weights.given_up", level="warning", version=about.version, reason=reason)
        self._say_all(Fault(about.version, about.attempt, reason, is_final))

    def _give_up(self) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.discard()

    def _say(self, peer: bytes, message: FromReceiver) -> None:
        assert self._socket is not None
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart([peer, encode(message)], zmq.DONTWAIT)

    def _say_all(self, message: FromReceiver, *, first_only: bool = False) -> None:
        for rank, seat in self._seats.items():
            if rank == 0 or not first_only:
                self._say(seat.peer, message)

    def _ring(self) -> None:
        """On any thread: `run` looks about at once. Once is enough until it does."""
        if not self._is_rung:
            self._is_rung = True
            with contextlib.suppress(BlockingIOError, OSError):
                self._wake.send(b"\0")


Numbered = Offer | Piece | Publish | Withdraw | Arrived


def _same(one: Numbered, other: Numbered) -> bool:
    return (one.version, one.attempt) == (other.version, other.attempt)


@contextlib.contextmanager
def receiving(receiver: WeightReceiver) -> Iterator[str]:
    """On a thread of this process; gives the address."""
    thread = threading.Thread(target=receiver.run, name="weights", daemon=True)
    try:
        endpoint = receiver.start()
        thread.start()
        try:
            yield endpoint
        finally:
            receiver.stop()
            thread.join()
    finally:
        receiver.close()
