"""What a rank sends of a version at once: values converted straight into memory that is used again, and
summed in the same pass.

A message costs several wakeups on both sides, so a chunk is larger than what is converted at once; a
page that the system has to find costs more than to fill it, so a chunk's memory is that of one that
has arrived.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels.checksum import crc32, crc32_bf16
from .folder import Span
from .layout import Piece, Place

CHUNK_BYTES = 4 << 20
# a column-wise shard has a span per row; what is said of them must stay small beside the bytes
MAX_SPANS = 4096
# chunks that are on their way at least, where many ranks share the memory of a receiver
_LEAST_ON_WAY = 4
_LEAST_BYTES = 1 << 19


class Chunk(NamedTuple):
    """`data` holds the spans' bytes, one after the other; number: from 0, on this rank; crc: CRC-32 of
    the bytes."""

    number: int
    spans: tuple[Span, ...]
    data: memoryview
    crc: int


class Memory:
    """Buffers for chunks of which `window` bytes may be on their way. One is given again when nobody
    holds it any more, ZeroMQ included."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._size = min(CHUNK_BYTES, max(_LEAST_BYTES, window // _LEAST_ON_WAY))
        self._free: list[npt.NDArray[np.uint8]] = []

    def take(self) -> npt.NDArray[np.uint8]:
        whole = self._free.pop() if self._free else np.empty(self._size, np.uint8)
        found = whole[:]
        # called by the thread that lets go of it last
        weakref.finalize(found, self._free.append, whole).atexit = False
        return found


def chunks(pieces: Iterable[Piece], memory: Memory) -> Iterator[Chunk]:
    """The pieces' bytes, put together and cut so that they fit."""
    number, filling = 0, _Filling(memory.take())
    for piece in pieces:
        values, places = piece.values(), deque(piece.places)
        while True:
            filling.take(values, piece.dtype, places)
            if not places:
                break
            yield filling.chunk(number)
            number, filling = number + 1, _Filling(memory.take())
    if filling.size:
        yield filling.chunk(number)


class _Filling:
    """A chunk that is being filled."""

    def __init__(self, buffer: npt.NDArray[np.uint8]) -> None:
        self.size = 0
        self._buffer = buffer
        self._spans: list[Span] = []
        self._crc = 0

    def take(self, values: Tensor, dtype: torch.dtype, places: deque[Place]) -> None:
        """Consecutive values, as many as there is room for; the places of the others are left."""
        if self.size % dtype.itemsize:
            return
        begin, taken = self.size, 0
        first = places[0].start if places else 0
        while places:
            offset, start, size = places.popleft()
            count = min(size, self._room(offset) // dtype.itemsize)
            if count:
                self._note(Span(offset, count * dtype.itemsize))
                taken += count
            if count < size:
                places.appendleft(
                    Place(offset + count * dtype.itemsize, start + count, size - count)
                )
                break
        target, source = self._buffer[begin : self.size], values[first : first + taken].contiguous()
        if (source.dtype, dtype) == (torch.float32, torch.bfloat16):
            self._crc = crc32_bf16(source, self._crc, target)
        else:
            stored = source.to(dtype).view(torch.uint8).numpy()
            self._crc = crc32(stored, self._crc, target)

    def chunk(self, number: int) -> Chunk:
        return Chunk(number, tuple(self._spans), self._buffer.data[: self.size], self._crc)

    def _room(self, offset: int) -> int:
        """Bytes that can be taken from this place of the file on."""
        is_next = bool(self._spans) and self._spans[-1].end == offset
        return self._buffer.size - self.size if is_next or len(self._spans) < MAX_SPANS else 0

    def _note(self, span: Span) -> None:
        self.size += span.size
        if self._spans and self._spans[-1].end == span.offset:
            last = self._spans.pop()
            span = Span(last.offset, last.size + span.size)
        self._spans.append(span)
