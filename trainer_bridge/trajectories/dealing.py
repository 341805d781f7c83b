"""Which group goes to which rank, and when: the engine's side of the bridge as a pure state machine.

No sockets and no clock of its own: messages and times go in, messages come out, so every order of
losses, restarts and reconnections can be tested. `TrajectorySender` is the shell around it.

A lineage is one life of the trainer. Within it a group is dealt to one rank, by a function of the
iteration's groups alone, so what is sent again goes where it went before. A trainer that starts
from a checkpoint begins another lineage: whatever that checkpoint does not hold is dealt anew, to a
world of any size, and ranks of the old lineage are refused from then on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ... import __version__
from ...engine.errors import BridgeError
from ..protocol import (
    PROTOCOL_VERSION,
    Bye,
    Credit,
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
    Welcome,
    check_version,
)

Peer = bytes
"""A connection, as ROUTER names it."""
Outgoing = tuple[Peer, ToRank]
SOFTWARE = f"everstep {__version__}"


def deal(sizes: Sequence[int], world: int) -> list[list[int]]:
    """Indexes of groups for each rank, balanced by their tokens: the largest first, to the rank
    that has least (the lowest of several). Each rank's are in ascending order."""
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(world), key=lambda r: (loads[r], r))
        shares[rank].append(index)
        loads[rank] += sizes[index]
    return [sorted(share) for share in shares]


@dataclass
class Seat:
    """A rank of the lineage that is served. `at`, `place`: what it is to get next."""

    rank: int
    peer: Peer
    session: int
    at: int
    place: int
    heard_s: float
    credit: Credit
    sent_groups: int = 0
    sent_bytes: int = 0
    done_through: int = -1
    oldest_through: int = -1
    doing: str = ""

    @property
    def has_credit(self) -> bool:
        return self.sent_groups < self.credit.groups and self.sent_bytes < self.credit.bytes


@dataclass(frozen=True)
class Next:
    """Load group `index` of `iteration`, and send it to this seat with `Dealer.delivered`."""

    seat: Seat
    iteration: int
    place: int
    index: int


@dataclass
class Dealer:
    """One run's deliveries.

    run          its name: ranks of another run are refused
    acked        the last iteration that no checkpoint of the trainer lacks: what it goes back to can
                 only need later ones
    heartbeat_s  told to ranks
    """

    run: str
    acked: int = -1
    heartbeat_s: float = 5.0
    lineage: str = ""
    world: int = 0
    trained: dict[int, Trained] = field(default_factory=dict)
    """By iteration, from `acked` on."""
    begun: Trained | None = None
    """The version that this lineage began with, if it began with a checkpoint's."""
    serving: str = ""
    """Digest of what the engines serve, until a trainer has given them something."""
    stranger: str = ""
    """Why a trainer was sent away that begins with other weights."""
    done_through: int = -1
    """The last iteration that the newest checkpoint of this lineage holds."""
    _sizes: dict[int, list[int]] = field(default_factory=dict)
    _shares: dict[int, list[list[int]]] = field(default_factory=dict)
    _seats: dict[int, Seat] = field(default_factory=dict)
    _past: set[str] = field(default_factory=set)
    _num_sessions: int = 0

    # iterations -----------------------------------------------------------------------------------

    def announce(self, iteration: int, sizes: Sequence[int]) -> None:
        """The groups of an iteration are complete, with so many tokens each.

        Idempotent. Raises BridgeError for other sizes, or out of order.
        """
        if iteration <= self.acked:
            return
        if iteration in self._sizes:
            if self._sizes[iteration] != list(sizes):
                raise BridgeError(f"iteration {iteration} was announced with other groups")
            return
        if self._sizes and iteration != max(self._sizes) + 1:
            raise BridgeError(f"iteration {iteration} after {max(self._sizes)}")
        self._sizes[iteration] = list(sizes)
        if self.world:
            self._shares[iteration] = deal(sizes, self.world)

    @property
    def pending(self) -> list[int]:
        """Announced iterations that a trainer may still ask for."""
        return sorted(self._sizes)

    # ranks ----------------------------------------------------------------------------------------

    def take(self, peer: Peer, message: ToEngine, now_s: float) -> list[Outgoing]:
        """What there is to answer. Nothing that a rank says can do more than have it refused."""
        if isinstance(message, Hello):
            return self._hello(peer, message, now_s)
        seat = next((s for s in self._seats.values() if s.peer == peer), None)
        if seat is None:
            return [(peer, Refused("say Hello first", is_final=False))]
        seat.heard_s = now_s
        match message:
            case Credit() if message.session == seat.session:
                seat.credit = message
            case Trained():
                self._note_trained(message)
            case Durable():
                self._note_durable(seat, message)
            case Pong():
                seat.doing = message.doing
            case Bye():
                del self._seats[seat.rank]
        return []

    def missing(self, now_s: float, patience_s: float) -> list[str]:
        """Who has not been heard of for so long, each as a phrase; empty: all are there."""
        if not self.world:
            return ["no rank of the trainer has said hello"]
        found = []
        for rank in range(self.world):
            seat = self._seats.get(rank)
            if seat is None:
                found.append(f"rank {rank} of {self.world} has not said hello")
            elif now_s - seat.heard_s > patience_s:
                silence = now_s - seat.heard_s
                doing = f" (last doing: {seat.doing})" if seat.doing else ""
                found.append(f"rank {rank} of {self.world} is silent for {silence:.0f} s{doing}")
        return found

    def end(self, reason: str, needs: Sequence[str], *, is_over: bool) -> list[Outgoing]:
        """No more is announced: what everybody is told. needs, is_over: as in `RunEnd`."""
        end = RunEnd(reason, list(needs), is_over)
        return [(seat.peer, end) for seat in self._seats.values()]

    def forget(self) -> None:
        """The run is over: nobody goes back any more from what the newest checkpoint holds."""
        self._forget(self.done_through)

    def pings(self) -> list[Outgoing]:
        """For everybody who is seated."""
        return [(s.peer, Ping(s.session, s.at, s.place)) for s in self._seats.values()]

    @property
    def is_delivered(self) -> bool:
        """Whether every seated rank has been sent all that was announced."""
        return all(seat.at > self._newest for seat in self._seats.values())

    @property
    def num_seated(self) -> int:
        """Ranks that have said hello and not goodbye."""
        return len(self._seats)

    # deliveries -----------------------------------------------------------------------------------

    def next(self) -> Next | Outgoing | None:
        """One thing to send now: the end of a share, or a group for which there is credit."""
        for seat in sorted(self._seats.values(), key=lambda s: (s.at, s.place, s.rank)):
            share = self._share(seat)
            if share is None:
                continue
            if seat.place >= len(share):
                end = self._end(seat, len(share))
                seat.at, seat.place = seat.at + 1, 0
                return seat.peer, end
            if seat.has_credit:
                return Next(seat, seat.at, seat.place, share[seat.place])
        return None

    def delivered(self, what: Next, num_bytes: int) -> bool:
        """It has been loaded and is sent. False: the seat has moved on meanwhile, do not send it."""
        seat = what.seat
        is_due = (seat.at, seat.place) == (what.iteration, what.place)
        if self._seats.get(seat.rank) is not seat or not is_due:
            return False
        seat.place += 1
        seat.sent_groups += 1
        seat.sent_bytes += num_bytes
        return True

    # inside ---------------------------------------------------------------------------------------

    def _hello(self, peer: Peer, hello: Hello, now_s: float) -> list[Outgoing]:
        reason = self._why_not(hello) or self._why_stranger(hello)
        if reason:
            return [(peer, Refused(reason))]
        answers: list[Outgoing] = []
        if hello.lineage != self.lineage:
            answers += self._begin_lineage(hello)
        self._num_sessions += 1
        at, place = self._position(hello)
        seat = Seat(
            rank=hello.rank,
            peer=peer,
            session=self._num_sessions,
            at=at,
            place=place,
            heard_s=now_s,
            credit=Credit(self._num_sessions, 0, 0),
        )
        self._seats[hello.rank] = seat
        if hello.trained is not None:
            self._note_trained(hello.trained)
        self._note_durable(seat, hello)
        welcome = Welcome(
            protocol=PROTOCOL_VERSION,
            software=SOFTWARE,
            run=self.run,
            session=seat.session,
            at=at,
            place=place,
            heartbeat_s=self.heartbeat_s,
        )
        return [*answers, (peer, welcome)]

    def _why_not(self, hello: Hello) -> str | None:
        try:
            check_version(hello.protocol, hello.software)
        except BridgeError as error:
            return str(error)
        if hello.run != self.run:
            return f"this engine serves the run {self.run!r}, not {hello.run!r}"
        if hello.rank >= hello.world:
            return f"rank {hello.rank} does not exist in a world of {hello.world}"
        if hello.lineage in self._past:
            return f"lineage {hello.lineage!r} was replaced by {self.lineage!r}"
        if hello.lineage == self.lineage and hello.world != self.world:
            return f"lineage {self.lineage!r} has a world of {self.world}, not {hello.world}"
        if hello.done_through > self._newest:
            return (
                f"its checkpoint {hello.checkpoint!r} holds iterations up to {hello.done_through}, "
                f"and this run has come to {self._newest}: it is of another run"
            )
        if hello.at >= 0 and hello.at > self._newest + 1:
            return f"iteration {hello.at} was never announced; the newest is {self._newest}"
        return None

    def _why_stranger(self, hello: Hello) -> str:
        """Of a trainer whose first update would be of other weights than sampled its tokens."""
        if not self.serving or not hello.base or hello.base == self.serving:
            return ""
        self.stranger = (
            f"the trainer begins with weights {hello.base[:12]}, the engines serve "
            f"{self.serving[:12]}: serve the model that its `model` names, or name the one that is "
            "served"
        )
        return self.stranger

    @property
    def _newest(self) -> int:
        return max(self._sizes, default=self.acked)

    def _begin_lineage(self, hello: Hello) -> list[Outgoing]:
        """A new life of the trainer: everybody of the old one is sent away."""
        reason = f"lineage {self.lineage!r} was replaced by {hello.lineage!r}"
        gone: list[Outgoing] = [(seat.peer, Refused(reason)) for seat in self._seats.values()]
        if self.lineage:
            self._past.add(self.lineage)
        self._seats.clear()
        # what the old life has trained since its checkpoint is trained anew
        self.trained.clear()
        self.lineage, self.world = hello.lineage, hello.world
        self.begun, self.done_through = hello.trained, -1
        self._shares = {i: deal(sizes, self.world) for i, sizes in self._sizes.items()}
        return gone

    def _position(self, hello: Hello) -> tuple[int, int]:
        """What the rank gets next. Iterations that are acknowledged are not here any more: a
        checkpoint older than they are goes on with what comes after them."""
        first = max(hello.done_through, self.acked) + 1
        if hello.at < first:
            return first, 0
        share = self._shares.get(hello.at)
        return hello.at, min(hello.place, len(share[hello.rank]) if share else 0)

    def _note_trained(self, trained: Trained) -> None:
        if self.acked < trained.iteration <= self._newest:
            self.trained.setdefault(trained.iteration, trained)

    def _note_durable(self, seat: Seat, said: Hello | Durable) -> None:
        """What no rank can come back to is acknowledged, and forgotten here."""
        done = min(said.done_through, self._newest)
        oldest = done if said.oldest_through is None else min(said.oldest_through, done)
        seat.done_through = max(seat.done_through, done)
        seat.oldest_through = max(seat.oldest_through, oldest)
        if len(self._seats) < self.world:
            return
        seats = self._seats.values()
        self.done_through = min(s.done_through for s in seats)
        self._forget(min(s.oldest_through for s in seats))

    def _forget(self, through: int) -> None:
        self.acked = max(self.acked, through)
        self._sizes = {i: sizes for i, sizes in self._sizes.items() if i > self.acked}
        self._shares = {i: shares for i, shares in self._shares.items() if i > self.acked}
        # the last one stays: whoever waits for it may not have seen it yet
        self.trained = {i: said for i, said in self.trained.items() if i >= self.acked}

    def _share(self, seat: Seat) -> list[int] | None:
        shares = self._shares.get(seat.at)
        return None if shares is None else shares[seat.rank]

    def _end(self, seat: Seat, num_groups: int) -> IterationEnd:
        sizes = self._sizes[seat.at]
        return IterationEnd(seat.session, seat.at, num_groups, len(sizes), sum(sizes))
