"""The checksum of a piece of the weights on its way from a rank to a receiver: CRC-32 over where the
bytes belong (uint64, little-endian), and then over the bytes."""

import mmap
from collections.abc import Sequence

import numpy as np

from ...kernels.checksum import crc32, joined


def piece_crc(spans: Sequence[int], data: memoryview, to: mmap.mmap | None = None) -> int:
    """spans  offset, size, offset, size, …
    to        a file: its bytes become those of the piece, in the same pass
    """
    crc = _of_spans(spans)
    source = np.frombuffer(data, np.uint8)
    if to is None:
        return crc32(source, crc)
    target, start = np.frombuffer(to, np.uint8), 0
    for offset, size in zip(spans[::2], spans[1::2], strict=True):
        crc = crc32(source[start : start + size], crc, target[offset : offset + size])
        start += size
    return crc


def with_spans(spans: Sequence[int], crc: int, size: int) -> int:
    """The same of bytes whose own checksum is known."""
    return joined(_of_spans(spans), crc, size)


def _of_spans(spans: Sequence[int]) -> int:
    return crc32(np.array(spans, dtype="<u8").view(np.uint8))


def prepare() -> None:
    """Before anybody waits: the kernels may have to be compiled first."""
    crc32(np.zeros(64, np.uint8))
