"""SHA-256 of many messages, two at a time where the processor has instructions for it (cpu/sha256.cpp):
nearly twice as fast as one after the other. Elsewhere hashlib's."""

import ctypes
import functools
import hashlib
import struct
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import native
from .pieces import PIECE_BYTES

_BLOCK = 64
# what is smaller is sooner done than begun here
_LEAST = 1 << 17
_BEGIN = (
    *(0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A),
    *(0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19),
)
Bytes = npt.NDArray[np.uint8]


class Message(NamedTuple):
    """A name for it, and its bytes: first those of `head`, then those of `body` (contiguous)."""

    name: str
    head: bytes
    body: Bytes


Hashed = tuple[str, str]
"""A message's name, and its digest in hex."""


def sha256_each(messages: Iterable[Message]) -> Iterator[Hashed]:
    """As they are done; other threads run meanwhile, and may take from the same iterator."""
    return (found for found in hashing(messages) if found is not None)


def hashing(
    messages: Iterable[Message], piece_bytes: int = PIECE_BYTES
) -> Generator[Hashed | None, None, None]:
    """`sha256_each` in pieces: gives None after at most so many bytes (and two blocks)."""
    library = _library()
    most = max(1, piece_bytes // 2 // _BLOCK)
    left = iter(messages)
    lanes: list[_Lane] = []
    while True:
        while len(lanes) < 2 and (message := next(left, None)) is not None:
            if library is None or message.body.size < _LEAST:
                yield from _alone(message, piece_bytes)
            else:
                lanes.append(_Lane(message))
        if not lanes or library is None:
            return
        count = min(most, *(lane.num_blocks for lane in lanes))
        places = [place for lane in lanes for place in lane.places]
        library.everstep_sha256(*places, *([None, None] if len(lanes) == 1 else []), count)
        for lane in lanes:
            lane.go_on(count)
        yield None
        for lane in [lane for lane in lanes if lane.is_done]:
            lanes.remove(lane)
            yield lane.name, lane.digest


class _Lane:
    """A message on its way: what can be hashed in place is."""

    def __init__(self, message: Message) -> None:
        self.name, head, body = message
        num_bits = 8 * (len(head) + body.size)
        end = b"\x80" + bytes(-(len(head) + body.size + 9) % _BLOCK) + struct.pack(">Q", num_bits)
        fill = min(-len(head) % _BLOCK, body.size)
        whole = (body.size - fill) // _BLOCK * _BLOCK
        parts = [head + body[:fill].tobytes(), body[fill + whole :].tobytes() + end]
        if not whole:
            parts = [b"".join(parts)]
        begin, *rest = (np.frombuffer(part, np.uint8) for part in parts)
        self._parts = [begin, body[fill : fill + whole], *rest] if whole else [begin]
        self._parts = [part for part in reversed(self._parts) if part.size]
        self._state = np.array(_BEGIN, np.uint32)

    @property
    def num_blocks(self) -> int:
        """That follow each other in memory."""
        return self._parts[-1].size // _BLOCK

    @property
    def places(self) -> tuple[int, int]:
        """Of its state and of its next block."""
        return self._state.ctypes.data, self._parts[-1].ctypes.data

    def go_on(self, count: int) -> None:
        self._parts[-1] = self._parts[-1][count * _BLOCK :]
        if not self._parts[-1].size:
            self._parts.pop()

    @property
    def is_done(self) -> bool:
        return not self._parts

    @property
    def digest(self) -> str:
        return self._state.astype(">u4").tobytes().hex()


def _alone(message: Message, piece_bytes: int) -> Generator[Hashed | None, None, None]:
    name, head, body = message
    digest = hashlib.sha256(head)
    for start in range(0, body.size, piece_bytes):
        digest.update(body[start : start + piece_bytes].data)
        yield None
    yield name, digest.hexdigest()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, where it can do it here."""
    library = native.library()
    if library is None:
        return None
    place = ctypes.c_void_p
    library.everstep_sha256.argtypes = [place, place, place, place, ctypes.c_int64]
    library.everstep_sha256.restype = ctypes.c_int
    state, block = np.zeros(8, np.uint32), np.zeros(_BLOCK, np.uint8)
    found = library.everstep_sha256(state.ctypes.data, block.ctypes.data, None, None, 1)
    return library if found == 0 else None
