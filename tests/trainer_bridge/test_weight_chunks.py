"""Chunks against the bytes of the pieces, for drawn sizes."""

from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.trainer_bridge.weights import chunks as weight_chunks
from everstep.trainer_bridge.weights.chunks import Memory, chunks
from everstep.trainer_bridge.weights.layout import Piece, Place

CHUNK, SPANS = 64, 5


@st.composite
def drawn_pieces(draw: st.DrawFn) -> list[Piece]:
    """Pieces in file order, gaps between some of them and between their places."""
    pieces, offset = [], draw(st.integers(0, 9))
    for sizes in draw(st.lists(st.lists(st.integers(0, 3 * CHUNK), max_size=4), max_size=8)):
        dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16]))
        places: list[Place] = []
        for size in sizes:
            start = places[-1].start + places[-1].size if places else 0
            offset += -offset % dtype.itemsize
            places.append(Place(offset, start, size))
            offset += size * dtype.itemsize + draw(st.sampled_from([0, 0, 3]))
        values = torch.arange(offset, offset + sum(sizes) * dtype.itemsize) % 251
        data = values.to(torch.uint8).view(dtype)
        pieces.append(Piece(partial(torch.clone, data), dtype, tuple(places)))
    return pieces


@given(drawn_pieces(), st.booleans())
def test_every_byte_is_in_one_chunk_at_its_place(pieces: list[Piece], converts: bool) -> None:
    given = [as_trained(piece) if converts else piece for piece in pieces]
    with (
        patch.object(weight_chunks, "CHUNK_BYTES", CHUNK),
        patch.object(weight_chunks, "MAX_SPANS", SPANS),
    ):
        found = list(chunks(iter(given), Memory(1 << 20)))
    assert [chunk.number for chunk in found] == list(range(len(found)))
    written: dict[int, int] = {}
    for chunk in found:
        assert 0 < len(chunk.data) <= CHUNK
        assert len(chunk.spans) <= SPANS
        places = [place for o, size in chunk.spans for place in range(o, o + size)]
        assert len(places) == len(chunk.data)
        for place, value in zip(places, chunk.data, strict=True):
            assert place not in written
            written[place] = value
    assert written == dict(bytes_of(pieces))


def as_trained(piece: Piece) -> Piece:
    """Its values in another type than the stored one, which holds them all."""
    return piece._replace(make=lambda: piece.make().to(torch.float32))


def bytes_of(pieces: list[Piece]) -> Iterator[tuple[int, int]]:
    for make, dtype, places in pieces:
        values = make()
        for offset, start, size in places:
            own = values[start : start + size]
            yield from enumerate(own.view(torch.uint8).tolist(), offset)
        assert sum(size for *_, size in places) * dtype.itemsize == values.nbytes


@given(drawn_pieces())
def test_a_piece_puts_its_bytes_where_it_belongs(pieces: list[Piece]) -> None:
    written = dict(bytes_of(pieces))
    # places of nothing too are inside
    offsets = [place.offset for piece in pieces for place in piece.places]
    size = 2 + max([*written, *offsets], default=0)
    file = torch.full((size,), 255, dtype=torch.uint8)
    for piece in pieces:
        piece.put(file)
    assert file.tolist() == [written.get(place, 255) for place in range(size)]


def test_small_pieces_share_a_chunk() -> None:
    values = [torch.full((8,), n, dtype=torch.uint8) for n in range(10)]
    pieces = [
        Piece(partial(torch.clone, data), torch.uint8, (Place(8 * n, 0, 8),))
        for n, data in enumerate(values)
    ]
    [chunk] = chunks(pieces, Memory(1 << 20))
    assert chunk.spans == ((0, 80),)


@pytest.mark.parametrize(
    ("window", "size"), [(16 << 20, 4 << 20), (4 << 20, 1 << 20), (1, 1 << 19)]
)
def test_several_chunks_fit_the_window(window: int, size: int) -> None:
    values = torch.arange(9 << 20, dtype=torch.int64).to(torch.uint8)
    piece = Piece(lambda: values, torch.uint8, (Place(0, 0, len(values)),))
    assert len(next(chunks([piece], Memory(window))).data) == size


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    memory = Memory(1 << 20)
    first, second = memory.take(), memory.take()
    places = [first.ctypes.data, second.ctypes.data]
    held = first.data[:10]
    del first, second
    third, fourth = memory.take(), memory.take()
    assert third.ctypes.data == places[1]
    assert fourth.ctypes.data not in places
    del held
    assert memory.take().ctypes.data == places[0]
