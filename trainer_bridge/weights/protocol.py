"""What the ranks of a trainer and a receiver of weights say to each other, beside trajectories.

    rank → receiver   WeightsHello, Offer, Piece, Publish, Withdraw
    receiver → rank   WeightsWelcome, WeightsRefusal, Begun, Got, Digests, Arrived, Fault, Alive

The receiver binds a ROUTER, every rank connects a DEALER. A message is one frame; a `Piece` is
followed by a second one, the bytes themselves. The first rank offers a version, every rank sends
the bytes that it has of it, the receiver says what each tensor's digest has become, and the first
rank publishes the manifest that follows from them: then the folder has its name.
docs/reference/bridge.md tells it for other languages.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from ..protocol import Count, Name, why_not

# the files beside the tensors, a tokenizer say, are in the offer
MAX_MESSAGE_BYTES = 256 * 2**20


# rank → receiver --------------------------------------------------------------------------------


class WeightsHello(Struct, tag="weights_hello", kw_only=True, frozen=True):
    """First on a connection. lineage: one life of the trainer, as in `protocol.Hello`."""

    protocol: int
    software: str
    run: Name
    lineage: Name
    rank: Count
    world: Annotated[int, Meta(ge=1, le=2**20)]


class Offer(Struct, tag="offer", kw_only=True, frozen=True):
    """A version is about to come; the first rank says it.

    attempt    counts tries, of all versions of the lineage
    num_bytes  of the weights' file
    head       its beginning, in the safetensors format: everything before the tensors
    files      what else belongs into the folder, by name
    keep       versions that stay, this one included
    """

    version: Count
    attempt: Count
    num_bytes: Count
    head: bytes
    files: dict[Name, bytes]
    keep: Annotated[int, Meta(ge=1, le=2**20)]


class Piece(Struct, tag="piece", frozen=True):
    """Bytes of the weights' file: the next frame.

    number  of the rank's pieces of this attempt, from 0
    spans   where they belong: offset, size, offset, size, …
    crc     CRC-32 (zlib's) over `spans` as uint64, little-endian, and then over the bytes
    """

    version: Count
    attempt: Count
    number: Count
    spans: list[Count]
    crc: Annotated[int, Meta(ge=0, lt=2**32)]


class Publish(Struct, tag="publish", frozen=True):
    """The version's manifest.json; its digests must be those that the receiver has found."""

    version: Count
    attempt: Count
    manifest: bytes


class Withdraw(Struct, tag="withdraw", frozen=True):
    """The version will not come, at least not in this attempt."""

    version: Count
    attempt: Count
    reason: str


# receiver → rank --------------------------------------------------------------------------------


class WeightsWelcome(Struct, tag="weights_welcome", kw_only=True, frozen=True):
    """The rank is taken.

    receiver     one life of the receiver: another one has nothing of what was sent before
    window       bytes of pieces that may be on their way from this rank, before they are `Got`
    heartbeat_s  something is said at least so often while a version is under way
    version, attempt, have  what is under way, and how many pieces of this rank it has; -1: nothing
    """

    protocol: int
    software: str
    receiver: Name
    window: Count
    heartbeat_s: float
    version: Annotated[int, Meta(ge=-1, le=2**53)] = -1
    attempt: Count = 0
    have: Count = 0


class WeightsRefusal(Struct, tag="weights_refusal", frozen=True):
    """The rank is not taken; is_final false: it may say hello again."""

    reason: str
    is_final: bool = True


class Begun(Struct, tag="begun", frozen=True):
    """There is room for the version: its pieces may come, from all ranks."""

    version: Count
    attempt: Count


class Got(Struct, tag="got", frozen=True):
    """Of this rank's pieces, those before `number` are in their places."""

    version: Count
    attempt: Count
    number: Count


class Digests(Struct, tag="digests", frozen=True):
    """Every byte is there; sha256 (hex) of each tensor, for the first rank."""

    version: Count
    attempt: Count
    tensors: dict[str, str]


class Arrived(Struct, tag="arrived", frozen=True):
    """The version is in this folder, whole."""

    version: Count
    attempt: Count
    path: str


class Fault(Struct, tag="fault", frozen=True):
    """The version was given up here, and nothing is left of it. is_final false: try it again."""

    version: Count
    attempt: Count
    reason: str
    is_final: bool


class Alive(Struct, tag="alive", frozen=True):
    """It lives. doing: what, for whoever waits for it."""

    doing: str


ToReceiver = WeightsHello | Offer | Piece | Publish | Withdraw
FromReceiver = WeightsWelcome | WeightsRefusal | Begun | Got | Digests | Arrived | Fault | Alive
_to_receiver: msgspec.msgpack.Decoder[ToReceiver] = msgspec.msgpack.Decoder(ToReceiver)
_from_receiver: msgspec.msgpack.Decoder[FromReceiver] = msgspec.msgpack.Decoder(FromReceiver)


def decode_to_receiver(frame: bytes | memoryview) -> ToReceiver:
    """A rank's message. Raises BridgeError, naming both versions where that is what differs."""
    try:
        return _to_receiver.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise why_not(frame, error) from None


def decode_from_receiver(frame: bytes | memoryview) -> FromReceiver:
    """A receiver's message. Raises as `decode_to_receiver` does."""
    try:
        return _from_receiver.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise why_not(frame, error) from None
