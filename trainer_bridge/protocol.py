"""What an engine and the ranks of a trainer say to each other: msgpack, one tagged union each way.

    rank → engine   Hello, Credit, Trained, Durable, Pong, Bye
    engine → rank   Welcome, Refused, Deliver, IterationEnd, RunEnd, Ping

The engine binds a ROUTER, every rank connects a DEALER; a message is one frame. The unit of work is
an iteration of C3PO++: its groups are dealt to the ranks, each to exactly one, and an
`IterationEnd` closes each rank's share. What a rank has got is the engine's until `Durable` says
that a checkpoint holds its effect. docs/reference/bridge.md tells it for other languages.
"""

import re
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from ..engine.errors import BridgeError, ConfigError
from ..engine.trajectory import Trajectory

PROTOCOL_VERSION = 1

Count = Annotated[int, Meta(ge=0, le=2**53)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Iteration = Annotated[int, Meta(ge=-1, le=2**53)]
"""-1: none yet."""


class Member(Struct, kw_only=True, forbid_unknown_fields=True):
    """A finished rollout of a group, and what it earned.

    reward  None: it has none, and trains nothing
    mask    uint8 per output token, 1 where it is trained on; empty: every token that was sampled
    """

    trajectory: Trajectory
    reward: float | None
    mask: bytes = b""


class TrajectoryGroup(Struct, kw_only=True, forbid_unknown_fields=True):
    """All rollouts of one prompt, in order of their index."""

    name: Name
    members: list[Member]

    @property
    def num_tokens(self) -> int:
        """Output tokens."""
        return sum(len(member.trajectory.output_ids) // 4 for member in self.members)


# rank → engine ----------------------------------------------------------------------------------


class Trained(Struct, tag="trained", frozen=True):
    """The weights of `version` hold the update of `iteration`. Rank 0 says it.

    path  the version's folder, where the engine can read it
    """

    iteration: Iteration
    version: Count
    digest: str
    path: str = ""


class Hello(Struct, tag="hello", kw_only=True, frozen=True):
    """First on a connection, and again after silence. Nothing else is taken before.

    protocol      of the sender; it is read before anything else is believed
    lineage       one life of the trainer: another begins whenever it starts from a checkpoint
    checkpoint    the one it started from, "" for none
    done_through  the last iteration whose effect a durable checkpoint holds
    oldest_through  the last that every checkpoint holds from which it may go on one day; None: it
                  has no other than the newest
    at, place     it has all iterations before `at`, and `place` groups of its share of that one;
                  at = -1: it has nothing, and takes what the engine has next
    trained       the last one that it said; of a life that has said none, what its checkpoint holds
    base          digest of the model that a life without a checkpoint begins with; "": it says none
    """

    protocol: int
    software: str
    run: Name
    lineage: Name
    rank: Count
    world: Annotated[int, Meta(ge=1, le=2**20)]
    checkpoint: str = ""
    done_through: Iteration = -1
    oldest_through: Iteration | None = None
    at: Iteration = -1
    place: Count = 0
    trained: Trained | None = None
    base: str = ""


class Credit(Struct, tag="credit", frozen=True):
    """So much may have been delivered since the Welcome of this session, in all.

    The group that passes the limit of bytes is still taken: it may be larger than the limit.
    """

    session: Count
    groups: Count
    bytes: Count


class Durable(Struct, tag="durable", frozen=True):
    """A durable checkpoint holds the effect of every iteration up to `done_through`, and every one
    that is kept those up to `oldest_through` (None: the same)."""

    checkpoint: Name
    done_through: Iteration
    oldest_through: Iteration | None = None


class Pong(Struct, tag="pong", frozen=True):
    """It lives. doing: what, in a word or two, for whoever waits for it."""

    doing: str = ""


class Bye(Struct, tag="bye", frozen=True):
    """It leaves on purpose."""

    reason: str = ""


# engine → rank ----------------------------------------------------------------------------------


class Welcome(Struct, tag="welcome", kw_only=True, frozen=True):
    """The rank is taken. Deliveries begin with place `place` of iteration `at`.

    session        of this connection; credits name it
    heartbeat_s    silence three times as long means that the engine is gone
    """

    protocol: int
    software: str
    run: Name
    session: Count
    at: Iteration
    place: Count
    heartbeat_s: float


class Refused(Struct, tag="refused", frozen=True):
    """The rank is not taken, or is not known any more; it may say Hello again if is_final is false."""

    reason: str
    is_final: bool = True


class Deliver(Struct, tag="deliver", frozen=True):
    """The group at `place` of the rank's share of an iteration."""

    session: Count
    iteration: Iteration
    place: Count
    group: TrajectoryGroup


class IterationEnd(Struct, tag="iteration_end", frozen=True):
    """The rank's share of the iteration is complete: num_groups, of num_groups_in_all.

    num_tokens_in_all  output tokens of all ranks' groups: a loss over the whole batch divides by it
    """

    session: Count
    iteration: Iteration
    num_groups: Count
    num_groups_in_all: Count
    num_tokens_in_all: Count


class RunEnd(Struct, tag="run_end", frozen=True):
    """No more iterations come: the rank saves what it has, and leaves.

    needs    folders of versions that an engine serves, or may start with again; None: not known
    is_over  no other process goes on with the run: a trainer that is started again waits for nobody
    """

    reason: str
    needs: list[str] | None = None
    is_over: bool = False


class Ping(Struct, tag="ping", frozen=True):
    """Are you there? Everything before place `place` of iteration `at` was sent before this: a rank
    that has not got it says Hello."""

    session: Count
    at: Iteration
    place: Count


ToEngine = Hello | Credit | Trained | Durable | Pong | Bye
ToRank = Welcome | Refused | Deliver | IterationEnd | RunEnd | Ping

encode = msgspec.msgpack.Encoder().encode
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_fields: msgspec.msgpack.Decoder[dict[str, msgspec.Raw]] = msgspec.msgpack.Decoder(
    dict[str, msgspec.Raw]
)


_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_run_name(name: str, setting: str) -> None:
    """Raises ConfigError, naming the setting, for a name that could not be part of a folder's."""
    if not _RUN_NAME.fullmatch(name):
        raise ConfigError(
            f"{setting} is {name!r}; accepted: letters, digits, '.', '_' and '-', at most 64, and "
            "the first a letter or a digit"
        )


def decode_to_engine(frame: bytes) -> ToEngine:
    """A rank's message. Raises BridgeError, naming both versions where that is what differs."""
    try:
        return _to_engine.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise why_not(frame, error) from None


def decode_to_rank(frame: bytes) -> ToRank:
    """An engine's message. Raises as `decode_to_engine` does."""
    try:
        return _to_rank.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise why_not(frame, error) from None


def check_version(protocol: int, software: str) -> None:
    """Raises BridgeError, naming both versions, unless they are the same."""
    if protocol != PROTOCOL_VERSION:
        raise BridgeError(
            f"the peer ({software}) speaks bridge protocol {protocol}, this side {PROTOCOL_VERSION}; "
            "use the same version of Everstep on both"
        )


def why_not(frame: bytes | memoryview, error: Exception) -> BridgeError:
    """What is wrong with a frame that cannot be decoded. A message of another version says so in
    fields that every version has."""
    try:
        fields = _fields.decode(frame)
        protocol = msgspec.msgpack.decode(fields["protocol"], type=int)
        software = msgspec.msgpack.decode(fields.get("software", b"\xa0"), type=str)
        check_version(protocol, software)
    except BridgeError as found:
        return found
    except (msgspec.MsgspecError, KeyError, UnicodeDecodeError, RecursionError):
        pass
    return BridgeError(f"not a message of bridge protocol {PROTOCOL_VERSION}: {error}")
