"""What a rank writes of a version, in chunks that fit a processor's cache: converted, copied, summed
and sent while they are hot."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .weight_folder import Span
from .weight_layout import Piece

CHUNK_BYTES = 1 << 20
# a column-wise shard has a span per row; what is said of them must stay small beside the bytes
MAX_SPANS = 4096


class Chunk(NamedTuple):
    """`data` holds the spans' bytes, one after the other.

    number  from 0, on this rank
    buffer  of CHUNK_BYTES, whose beginning `data` is
    """

    number: int
    spans: tuple[Span, ...]
    data: memoryview
    buffer: Tensor


def new_buffer(device: torch.device) -> Tensor:
    """For one chunk; one that a GPU can write to without a detour."""
    return torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


def chunks(pieces: Iterable[Piece], take_buffer: Callable[[], Tensor]) -> Iterator[Chunk]:
    """The pieces' bytes, in their order. A chunk has a buffer of its own, for as long as its taker
    keeps it from `take_buffer`."""
    number = 0
    filling: _Filling | None = None
    for piece in pieces:
        data = piece.data.view(torch.uint8)
        start = 0
        while start < data.numel():
            filling = filling or _Filling(take_buffer())
            start += filling.take(piece.offset + start, data[start:])
            if filling.is_full:
                yield filling.chunk(number)
                number, filling = number + 1, None
    if filling is not None:
        yield filling.chunk(number)


class _Filling:
    """A chunk that is being filled."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._filled = 0
        self._spans: list[Span] = []

    @property
    def is_full(self) -> bool:
        return self._filled == CHUNK_BYTES or len(self._spans) == MAX_SPANS

    def take(self, offset: int, data: Tensor) -> int:
        """As many of the bytes as there is room for."""
        end = min(CHUNK_BYTES, self._filled + data.numel())
        size = end - self._filled
        self._buffer[self._filled : end].copy_(data[:size])
        self._filled = end
        if self._spans and self._spans[-1].end == offset:
            last = self._spans.pop()
            self._spans.append(Span(last.offset, last.size + size))
        else:
            self._spans.append(Span(offset, size))
        return size

    def chunk(self, number: int) -> Chunk:
        data = self._buffer.numpy().data[: self._filled]
        return Chunk(number, tuple(self._spans), data, self._buffer)
