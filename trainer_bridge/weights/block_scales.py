"""Largest values of 128×128 blocks, agreed on by the ranks whose shards cut them.

A block's scale follows from its largest value, and a rank that holds a part of the block knows the
largest of that part alone. Which blocks are cut follows from the shards: it is planned once. Each time
every rank fills in what it holds, one all-reduce takes the largest, and all that hold a part of a
block have the same scale, to the bit: a maximum is exact, in whatever order.

Pure but for the tensors that it fills; whoever calls it does the all-reduce.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...engine.checkpoint.fp8_policy import BLOCK, scale_shape
from .reshard import Block, Shape


def cells_of(block: Block) -> Block:
    """What a shard of a weight touches of its scales, one cell for each 128×128 block."""
    ranges = [(o // BLOCK, -(-(o + s) // BLOCK)) for o, s in zip(*block, strict=True)]
    return Block(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))


def corners_of(block: Block) -> Block:
    """The cells whose first element the shard holds: of shards that make a whole weight each cell
    is one's, who writes its scale."""
    ranges = [(-(-o // BLOCK), -(-(o + s) // BLOCK)) for o, s in zip(*block, strict=True)]
    return Block(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))


class CutBlocks:
    """Blocks that several shards share, of all weights, as places of one vector.

    shapes  of the weights, whole
    blocks  what each rank holds of them, by name
    """

    def __init__(
        self, shapes: Mapping[str, Shape], blocks: Sequence[Mapping[str, Block]], rank: int
    ) -> None:
        self.count = 0
        self._own: dict[str, tuple[Tensor, Tensor]] = {}
        """By weight: which of its cells here are cut (bool, as the cells), and their places."""
        for name, shape in shapes.items():
            held = {ranks[name] for ranks in blocks if ranks[name].size}
            touched = torch.zeros(scale_shape(shape), dtype=torch.int32)
            for block in held:
                touched[_slices(cells_of(block))] += 1
            is_cut = touched > 1
            places = is_cut.flatten().cumsum(0).view(is_cut.shape) - 1 + self.count
            self.count += int(is_cut.sum())
            own = blocks[rank][name]
            if own.size:
                here = _slices(cells_of(own))
                mask = is_cut[here]
                if mask.any():
                    self._own[name] = mask, places[here][mask]

    def fill(self, amax: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """(count,) float32: the largest values of the parts here, 0 of blocks of others."""
        vector = torch.zeros(self.count, device=device)
        for name, (mask, places) in self._own.items():
            vector[places.to(device)] = amax[name][mask.to(device)]
        return vector

    def take(self, vector: Tensor, amax: Mapping[str, Tensor]) -> None:
        """Put the largest over all ranks into `amax`."""
        for name, (mask, places) in self._own.items():
            amax[name][mask.to(vector.device)] = vector[places.to(vector.device)]


def part_of(cells: Tensor, block: Block) -> Tensor:
    """Of the cells that a shard touches, those that it writes."""
    touched, written = cells_of(block), corners_of(block)
    skip = [w - t for w, t in zip(written.offset, touched.offset, strict=True)]
    return cells[skip[0] :, skip[1] :]


def _slices(block: Block) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(*block, strict=True))
