"""What a rank writes of a version, in chunks that fit a processor's cache: converted, summed, copied
and sent while they are hot."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .folder import Span
from .layout import Piece

CHUNK_BYTES = 1 << 20
# a column-wise shard has a span per row; what is said of them must stay small beside the bytes
MAX_SPANS = 4096


class Chunk(NamedTuple):
    """`data` holds the spans' bytes, one after the other; number: from 0, on this rank."""

    number: int
    spans: tuple[Span, ...]
    data: memoryview


def chunks(pieces: Iterable[Piece]) -> Iterator[Chunk]:
    """The pieces' bytes: large pieces as they are, small ones put together, at most CHUNK_BYTES."""
    number = 0
    filling = _Filling()
    for piece in pieces:
        for span, part in _spans(piece):
            if span.size >= CHUNK_BYTES // 2:
                yield Chunk(number, (span,), part.numpy().data)
                number += 1
                continue
            if not filling.has_room(span):
                yield filling.chunk(number)
                number, filling = number + 1, _Filling()
            filling.take(span, part)
    if filling.size:
        yield filling.chunk(number)


def spans_of(piece: Piece) -> list[Span]:
    """Where its bytes belong, one after the other."""
    return [Span(offset, size * piece.dtype.itemsize) for offset, _, size in piece.places]


def _spans(piece: Piece) -> Iterator[tuple[Span, Tensor]]:
    """Its bytes, at most CHUNK_BYTES at once."""
    data = piece.data().view(torch.uint8)
    begin = 0
    for offset, size in spans_of(piece):
        for start in range(0, size, CHUNK_BYTES):
            part = data[begin + start : begin + min(size, start + CHUNK_BYTES)]
            yield Span(offset + start, part.numel()), part
        begin += size


class _Filling:
    """A chunk of small pieces."""

    def __init__(self) -> None:
        self.size = 0
        self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        self._spans: list[Span] = []

    def has_room(self, span: Span) -> bool:
        return self.size + span.size <= CHUNK_BYTES and len(self._spans) < MAX_SPANS

    def take(self, span: Span, data: Tensor) -> None:
        self._buffer[self.size : self.size + span.size].copy_(data)
        self.size += span.size
        if self._spans and self._spans[-1].end == span.offset:
            last = self._spans.pop()
            span = Span(last.offset, last.size + span.size)
        self._spans.append(span)

    def chunk(self, number: int) -> Chunk:
        return Chunk(number, tuple(self._spans), self._buffer.numpy().data[: self.size])
