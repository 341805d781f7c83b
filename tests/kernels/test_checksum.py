"""CRC-32 against zlib's, for every length and start about the places where the paths change."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import checksum
from everstep.kernels.checksum import crc32

WORDS = np.random.default_rng(0).integers(0, 256, 1 << 16, dtype=np.uint8)


@given(start=st.integers(0, 70), size=st.integers(0, 2000), crc=st.integers(0, 2**32 - 1))
def test_it_is_that_of_zlib(start: int, size: int, crc: int) -> None:
    data = WORDS[start : start + size]
    assert crc32(data, crc) == zlib.crc32(data.tobytes(), crc)


@given(start=st.integers(0, 70), size=st.integers(0, 2000), crc=st.integers(0, 2**32 - 1))
def test_it_copies_what_it_sums(start: int, size: int, crc: int) -> None:
    data, place = WORDS[start : start + size], np.zeros(size + 2, np.uint8)
    assert crc32(data, crc, place[1:-1]) == zlib.crc32(data.tobytes(), crc)
    assert place.tobytes() == b"\0" + data.tobytes() + b"\0"


@given(cut=st.integers(0, WORDS.size))
def test_parts_add_up(cut: int) -> None:
    assert crc32(WORDS[cut:], crc32(WORDS[:cut])) == zlib.crc32(WORDS.tobytes())


def test_without_a_library_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = crc32(WORDS)
    monkeypatch.setattr(checksum, "_library", lambda: None)
    place = np.zeros_like(WORDS)
    assert crc32(WORDS, 0, place) == found
    assert place.tobytes() == WORDS.tobytes()
