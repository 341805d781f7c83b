"""CRC-32 against zlib's, for every length and start about the places where the paths change."""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import checksum
from everstep.kernels.checksum import crc32, crc32_bf16, joined

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
    first, second = WORDS[:cut], WORDS[cut:]
    whole = zlib.crc32(WORDS.tobytes())
    assert crc32(second, crc32(first)) == whole
    assert joined(crc32(first), crc32(second), second.size) == whole


@given(size=st.integers(0, 2**45), first=st.integers(0, 2**32 - 1))
def test_nothing_is_lost_over_many_bytes(size: int, first: int) -> None:
    """Zeros after it, in two parts of any sizes."""
    half = size // 3
    assert joined(joined(first, 0, half), 0, size - half) == joined(first, 0, size)


@given(start=st.integers(0, 20), size=st.integers(0, 700), crc=st.integers(0, 2**32 - 1))
def test_floats_are_rounded_as_torch_does(start: int, size: int, crc: int) -> None:
    values = torch.from_numpy(WORDS.view(np.float32))
    # any bits but those of NaN
    values = torch.where(values.isnan(), values.new_tensor(0.1), values)[start : start + size]
    place = np.zeros(2 * size + 2, np.uint8)
    found = crc32_bf16(values, crc, place[1:-1])
    wanted = values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert place.tobytes() == b"\0" + wanted + b"\0"
    assert found == zlib.crc32(wanted, crc)


def test_nan_stays_nan() -> None:
    values = torch.full((100,), torch.nan)
    place = np.zeros(200, np.uint8)
    crc32_bf16(values, 0, place)
    assert torch.from_numpy(place).view(torch.bfloat16).isnan().all()


def test_without_a_library_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = crc32(WORDS)
    monkeypatch.setattr(checksum, "_library", lambda: None)
    place = np.zeros_like(WORDS)
    assert crc32(WORDS, 0, place) == found
    assert place.tobytes() == WORDS.tobytes()
