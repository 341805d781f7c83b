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
        data = piece.data.cpu().view(torch.uint8)
        for start in range(0, data.numel(), CHUNK_BYTES):
            part = data[start : start + CHUNK_BYTES]
            span = Span(piece.offset + start, part.numel())
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
