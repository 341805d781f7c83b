"""Plans over drawn shapes and placements, carried out with numpy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine.errors import BridgeError
from everstep.trainer_bridge.weights.reshard import Block, explain, plan, rows_of, runs_of

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


def cut(draw: st.DrawFn, whole: tuple[int, ...]) -> list[Block]:
    """Blocks that tile the tensor: a grid of cuts along some dimensions."""
    edges = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in whole]
    blocks = [Block((), ())]
    for bounds in edges:
        blocks = [
            Block((*b.offset, lo), (*b.shape, hi - lo))
            for b in blocks
            for lo, hi in itertools.pairwise(bounds)
        ]
    return blocks


@st.composite
def placements(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], list[dict[str, Block]]]:
    world = draw(st.integers(1, 4))
    tensors = {f"t{n}": draw(shapes) for n in range(draw(st.integers(1, 4)))}
    ranks: list[dict[str, Block]] = [{} for _ in range(world)]
    for name, whole in tensors.items():
        blocks = cut(draw, whole)
        if len(blocks) > world:
            blocks = [Block((0,) * len(whole), whole)]
        for block, first in zip(blocks, draw(st.permutations(range(world))), strict=False):
            ranks[first][name] = block
        # replicas on ranks that hold nothing
        for held in ranks:
            if name not in held and draw(st.booleans()):
                held[name] = draw(st.sampled_from(blocks))
    return tensors, ranks


@given(placements())
def test_carrying_the_plan_out_writes_every_element_once(drawn: object) -> None:
    tensors, ranks = drawn  # type: ignore[misc]
    made = plan(tensors, dict.fromkeys(tensors, 2), ranks)
    for name, whole in tensors.items():
        values = np.arange(math.prod(whole)).reshape(whole)
        written = np.full(math.prod(whole), -1)
        for rank, shares in enumerate(made):
            for share in shares:
                if share.name != name:
                    continue
                block = ranks[rank][name]
                where = tuple(slice(o, o + n) for o, n in zip(*block, strict=True))
                local = values[where].reshape(-1)
                for source, target, count in share.runs:
                    assert (written[target : target + count] == -1).all()
                    written[target : target + count] = local[source : source + count]
        assert (written.reshape(whole) == values).all()


@given(shapes, st.integers(1, 9))
def test_rows_tile_the_tensor_in_one_run_each(whole: tuple[int, ...], world: int) -> None:
    blocks = [{"t": rows_of(whole, rank, world)} for rank in range(world)]
    made = plan({"t": whole}, {"t": 4}, blocks)
    assert sum(share.size for shares in made for share in shares) == math.prod(whole)
    assert all(len(share.runs) == 1 for shares in made for share in shares)


def test_replicas_are_shared_out() -> None:
    whole = Block((0, 0), (4, 4))
    ranks = [{f"t{n}": whole for n in range(6)} for _ in range(3)]
    made = plan({f"t{n}": (4, 4) for n in range(6)}, {f"t{n}": 2 for n in range(6)}, ranks)
    assert [len(shares) for shares in made] == [2, 2, 2]


def test_columns_are_runs_of_their_rows() -> None:
    assert list(runs_of(Block((0, 2), (3, 2)), (3, 5))) == [(0, 2, 2), (2, 7, 2), (4, 12, 2)]


def test_a_hole_and_an_overlap_are_named() -> None:
    with pytest.raises(BridgeError, match="t: element 2 is held by no rank"):
        plan({"t": (4,)}, {"t": 2}, [{"t": Block((0,), (2,))}])
    with pytest.raises(BridgeError, match="t: element 1 is in blocks that overlap"):
        plan({"t": (4,)}, {"t": 2}, [{"t": Block((0,), (2,))}, {"t": Block((1,), (3,))}])


def test_the_plan_can_be_read() -> None:
    ranks = [{"w": rows_of((5, 2), rank, 2), "b": rows_of((1,), rank, 2)} for rank in range(2)]
    text = explain(plan({"w": (5, 2), "b": (1,)}, {"w": 2, "b": 4}, ranks), {"w": 2, "b": 4})
    assert text.splitlines() == [
        "24 bytes in all, each written once",
        "rank 0: 16 bytes of 2 tensors",
        "  w: 12 bytes, elements 0..5",
        "  b: 4 bytes, elements 0..0",
        "rank 1: 8 bytes of 1 tensors",
        "  w: 8 bytes, elements 6..9",
    ]
