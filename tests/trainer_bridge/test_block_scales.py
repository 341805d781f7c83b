"""Scales of blocks that shards cut: over drawn weights and placements, those of the whole weight."""

import itertools
import math

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from everstep.kernels.quant import block_amax, block_codes, block_scale
from everstep.trainer_bridge.weights.block_scales import CutBlocks, corners_of, part_of
from everstep.trainer_bridge.weights.reshard import Block, plan, rows_of

from ..fp8_reference import block_reference

sizes = st.one_of(st.sampled_from([1, 127, 128, 129, 256]), st.integers(1, 300))


def mesh_block(shape: tuple[int, int], grid: tuple[int, int], rank: int) -> Block:
    """Of a grid of ranks, each of which has rows and columns in chunks as FSDP2 cuts them."""
    down, across = divmod(rank, grid[1])
    (top, _), (height, _) = rows_of(shape, down, grid[0])
    (left, _), (width, _) = rows_of(shape[::-1], across, grid[1])
    return Block((top, left), (height, width) if height and width else (0, 0))


def weight_of(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Values of very different sizes, with blocks of zeros."""
    random = np.random.default_rng(seed)
    values = random.normal(size=shape) * np.exp(3 * random.normal(size=(shape[0], 1)))
    for top, left in itertools.product(range(0, shape[0], 128), range(0, shape[1], 128)):
        if random.random() < 0.2:
            values[top : top + 128, left : left + 128] = 0
    return values.astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    copies=st.integers(1, 2),
    seed=st.integers(0, 10**6),
    power_of_two=st.booleans(),
)
@example(shapes=[(130, 257)], grid=(3, 2), copies=1, seed=0, power_of_two=True)
def test_ranks_write_what_the_float64_reference_has(shapes, grid, copies, seed, power_of_two):
    weights = {f"w{n}": weight_of(shape, seed + n) for n, shape in enumerate(shapes)}
    whole = {name: values.shape for name, values in weights.items()}
    world = grid[0] * grid[1] * copies
    # replicas of a grid, as a mesh of two dimensions has them
    ranks = [
        {name: mesh_block(shape, grid, rank % (grid[0] * grid[1])) for name, shape in whole.items()}
        for rank in range(world)
    ]
    cuts = [CutBlocks(whole, ranks, rank) for rank in range(world)]
    local = [{name: shard(weights[name], b) for name, b in held.items()} for held in ranks]
    amax = [
        {n: block_amax(v, ranks[r][n].offset) for n, v in held.items() if v.numel()}
        for r, held in enumerate(local)
    ]
    filled = [cut.fill(own, torch.device("cpu")) for cut, own in zip(cuts, amax, strict=True)]
    agreed = torch.stack(filled).amax(dim=0)
    for cut, own in zip(cuts, amax, strict=True):
        assert cut.count == len(agreed)
        cut.take(agreed, own)
    codes = {name: np.full(math.prod(shape), np.nan) for name, shape in whole.items()}
    cells = {name: (-(-shape[0] // 128), -(-shape[1] // 128)) for name, shape in whole.items()}
    scales = {name: np.full(math.prod(shape), np.nan) for name, shape in cells.items()}
    for rank, shares in enumerate(plan(whole, dict.fromkeys(whole, 1), ranks)):
        for name, runs in shares:
            block, own = ranks[rank][name], block_scale(amax[rank][name], power_of_two=power_of_two)
            made = block_codes(local[rank][name], own, block.offset).float().flatten().numpy()
            for source, target, size in runs:
                codes[name][target : target + size] = made[source : source + size]
    corners = [{name: corners_of(block) for name, block in held.items()} for held in ranks]
    for rank, shares in enumerate(plan(cells, dict.fromkeys(whole, 4), corners)):
        for name, runs in shares:
            own = block_scale(amax[rank][name], power_of_two=power_of_two)
            made = part_of(own, ranks[rank][name]).flatten().numpy()
            for source, target, size in runs:
                scales[name][target : target + size] = made[source : source + size]
    for name, values in weights.items():
        expected, scale = block_reference(values, power_of_two=power_of_two)
        assert np.array_equal(codes[name], expected.flatten())
        assert np.array_equal(scales[name], scale.flatten())


def shard(values: np.ndarray, block: Block) -> torch.Tensor:
    (top, left), (height, width) = block
    return torch.from_numpy(values[top : top + height, left : left + width].copy())


def test_only_blocks_of_several_shards_are_compared() -> None:
    shapes = {"a": (512, 200), "b": (512, 200)}
    # rows 0..255 and 256..511: no block is cut; 0..299 and 300..511: one row of two blocks
    ranks = [
        {"a": Block((0, 0), (256, 200)), "b": Block((0, 0), (300, 200))},
        {"a": Block((256, 0), (256, 200)), "b": Block((300, 0), (212, 200))},
    ]
    assert [CutBlocks(shapes, ranks, rank).count for rank in (0, 1)] == [2, 2]
