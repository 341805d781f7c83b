"""Parts of a tensor on their way to its file: blocks of any kind, rows and columns, cut anywhere."""

from functools import partial
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.trainer_bridge.weights.layout import _Part, _place
from everstep.trainer_bridge.weights.reshard import Block, runs_of


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[int, ...], Block]:
    """A tensor's shape, and what one rank holds of it."""
    whole = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    offset = tuple(draw(st.integers(0, size - 1)) for size in whole)
    shape = tuple(draw(st.integers(1, w - o)) for w, o in zip(whole, offset, strict=True))
    return whole, Block(offset, shape)


@given(blocks(), st.lists(st.integers(0, 400)), st.sampled_from([torch.bfloat16, torch.float32]))
def test_a_block_comes_to_its_rows_and_columns(
    drawn: tuple[tuple[int, ...], Block], cuts: list[int], stored: torch.dtype
) -> None:
    whole, block = drawn
    values = torch.arange(1.0, 1.0 + block.size)
    edges = sorted({0, block.size, *(cut % block.size for cut in cuts)})
    parts = [_Part(b - a, partial(values.__getitem__, slice(a, b))) for a, b in pairwise(edges)]
    begin = 8
    count = int(np.prod(whole))
    expected = torch.zeros(whole, dtype=stored)
    rows = tuple(slice(o, o + s) for o, s in zip(*block, strict=True))
    expected[rows] = values.view(block.shape).to(stored)
    size = begin + count * stored.itemsize

    put, sent = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    pieces = list(_place(parts, list(runs_of(block, whole)), begin, stored))
    for piece in pieces:
        piece.put(put)
        data, start = piece.data().view(torch.uint8), 0
        for offset, length in piece.spans():
            sent[offset : offset + length] = data[start : start + length]
            start += length
    for file in (put, sent):
        assert not file[:begin].any()
        assert torch.equal(file[begin:].view(stored).view(whole), expected)
