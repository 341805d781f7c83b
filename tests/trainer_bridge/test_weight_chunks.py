"""Chunks against the bytes of the pieces, for drawn sizes."""

from collections.abc import Iterator
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.trainer_bridge.weights import chunks as weight_chunks
from everstep.trainer_bridge.weights.chunks import chunks
from everstep.trainer_bridge.weights.layout import Piece

CHUNK, SPANS = 64, 5


@st.composite
def drawn_pieces(draw: st.DrawFn) -> list[Piece]:
    """Pieces in file order, gaps between some of them."""
    pieces, offset = [], draw(st.integers(0, 9))
    for size in draw(st.lists(st.integers(0, 3 * CHUNK), max_size=20)):
        values = torch.arange(offset, offset + 2 * size) % 251
        dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16]))
        if dtype == torch.bfloat16:
            data = values.to(torch.uint8).view(dtype)
        else:
            data = values[:size].to(dtype)
        pieces.append(Piece(offset, data))
        offset += data.numel() * data.itemsize + draw(st.sampled_from([0, 0, 3]))
    return pieces


@given(drawn_pieces())
def test_every_byte_is_in_one_chunk_at_its_place(pieces: list[Piece]) -> None:
    with (
        patch.object(weight_chunks, "CHUNK_BYTES", CHUNK),
        patch.object(weight_chunks, "MAX_SPANS", SPANS),
    ):
        found = list(chunks(iter(pieces)))
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


def bytes_of(pieces: list[Piece]) -> Iterator[tuple[int, int]]:
    for offset, data in pieces:
        yield from enumerate(data.view(torch.uint8).tolist(), offset)


def test_small_pieces_share_a_chunk() -> None:
    pieces = [Piece(8 * n, torch.full((8,), n, dtype=torch.uint8)) for n in range(10)]
    [chunk] = chunks(pieces)
    assert chunk.spans == ((0, 80),)
