"""Where a sharded model's values go in a version's file, and the bytes that this rank has of it.

FP8 weights are quantised here, in the ranks that hold them: half the bytes travel, and what arrives
has digests of its own. Codes and scales are parts of the file like any other.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ...engine.checkpoint.expected_tensors import expected_tensors
from ...engine.checkpoint.fp8_policy import BLOCK, has_power_of_two_scales
from ...engine.checkpoint.safetensors_writer import Part, layout
from ...engine.checkpoint.stored_format import StoredFormat
from ...engine.errors import BridgeError
from ...kernels.quant import block_amax, block_codes, block_scale, dequantize_block
from ..trainer.sharding import World
from ..trainer.trainable import TrainableRing
from .block_scales import CutBlocks, corners_of, part_of
from .folder import Span
from .reshard import Block, Run, explain, plan, rows_of

PIECE_BYTES = 1 << 20


class Place(NamedTuple):
    """`size` values of a piece, from its value `start` on, belong to the file from byte `offset` on."""

    offset: int
    start: int
    size: int


class Piece(NamedTuple):
    """Values that are made together, about `PIECE_BYTES` of the file, on any thread.

    make    gives them flat, not yet in the stored type where to copy them is to convert them
    dtype   the stored type
    places  where they belong, in order; all of them do
    """

    make: Callable[[], Tensor]
    dtype: torch.dtype
    places: tuple[Place, ...]

    def values(self) -> Tensor:
        """Flat, on the CPU; not yet in the stored type where to copy them is to convert them."""
        values = self.make()
        return values if values.is_cpu else values.to(self.dtype).cpu()

    def data(self) -> Tensor:
        """The same in the stored type."""
        return self.values().to(self.dtype)

    def spans(self) -> list[Span]:
        """Where its bytes belong, one after the other."""
        return [Span(offset, size * self.dtype.itemsize) for offset, _, size in self.places]

    def put(self, file: Tensor) -> None:
        """Into the file, its bytes (uint8): converted where they belong, without a copy between."""
        values = self.make()
        if not values.is_cpu:
            # converted where they are: less travels, and once
            values = values.to(self.dtype)
            values = values.cpu() if len(self.places) > 1 else values
        for offset, start, size in self.places:
            target = file[offset : offset + size * self.dtype.itemsize].view(self.dtype)
            target.copy_(values[start : start + size])


class _Part(NamedTuple):
    """Consecutive values of what is here of a tensor."""

    size: int
    make: Callable[[], Tensor]


class WeightLayout:
    """One safetensors file of a model's tensors, and who writes what of it. Made once, by all ranks."""

    def __init__(self, ring: TrainableRing, world: World, stored: StoredFormat) -> None:
        """Raises BridgeError for shards that do not make whole tensors."""
        self._world, self._stored = world, stored
        self._tensors = dict(ring.tensors())
        self.parts: dict[str, Part] = {}
        self._weights: dict[str, str] = {}
        """The weight of each scale."""
        for spec in expected_tensors(ring.config):
            first, *others = stored.parts(spec)
            self.parts[first.name] = first
            self.parts |= {scale.name: scale for scale in others}
            self._weights |= {scale.name: first.name for scale in others}
        self.head, self._offsets = layout(list(self.parts.values()))
        self.num_bytes = len(self.head) + sum(part.num_bytes for part in self.parts.values())
        self._blocks = {name: _block_of(tensor) for name, tensor in self._tensors.items()}
        blocks: list[dict[str, Block]] = [{} for _ in range(world.size)]
        dist.all_gather_object(blocks, self._blocks)
        quantised = {name: self.parts[name].shape for name in self._weights.values()}
        self._cut = CutBlocks(quantised, blocks, world.rank)
        for held in blocks:
            held |= {scale: corners_of(held[name]) for scale, name in self._weights.items()}
        self._itemsizes = {name: part.dtype.itemsize for name, part in self.parts.items()}
        self.plan = plan(
            {name: part.shape for name, part in self.parts.items()}, self._itemsizes, blocks
        )

    @property
    def is_fp8(self) -> bool:
        """Whether weights are stored in FP8."""
        return bool(self._weights)

    def explain(self) -> str:
        """Who writes what."""
        said = explain(self.plan, self._itemsizes)
        if not self._cut.count:
            return said
        return (
            f"{said}\n{self._cut.count} blocks of 128×128 are cut by shards: {4 * self._cut.count} "
            "bytes are compared for their scales"
        )

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes, in file order; a piece is made when it is asked for, of the weights as
        they are then.

        The call is collective (scales of blocks that are cut), to go through the pieces is not: each
        rank calls as often as the others, also one that has nothing to write.
        """
        return self._pieces(self._scales())

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Inside, the model's FP8 weights have the values that a version of it holds. Collective,
        and for scoring alone: a copy of those weights is kept meanwhile."""
        kept: list[tuple[Tensor, Tensor]] = []
        for name, scale in self._scales().items():
            local, start = _local(self._tensors[name]), self._start(name)
            kept.append((local, local.clone()))
            codes = block_codes(local.to(self._stored.dtype), scale, start)
            local.copy_(dequantize_block(codes, scale, local.dtype, start))
        try:
            yield
        finally:
            for local, values in kept:
                local.copy_(values)

    def _pieces(self, scales: dict[str, Tensor]) -> Iterator[Piece]:
        shares = self.plan[self._world.rank]
        for share in sorted(shares, key=lambda share: self._offsets[share.name]):
            dtype = self.parts[share.name].dtype
            parts = self._parts(share.name, scales)
            yield from _place(parts, share.runs, self._offsets[share.name], dtype)

    def _parts(self, name: str, scales: dict[str, Tensor]) -> Iterator[_Part]:
        """What is here of a tensor, flat, in order; each made when it is asked for, so that a
        conversion's result is still in the cache when it is copied."""
        if (weight := self._weights.get(name)) is not None:
            cells = part_of(scales[weight], self._blocks[weight]).reshape(-1)
            yield _Part(cells.numel(), partial(_as_it_is, cells))
            return
        local = _local(self._tensors[name])
        if name in scales:
            top, left = self._start(name)
            for first, rows in zip(*_bands(local, top), strict=True):
                cells = scales[name][(top + first) // BLOCK - top // BLOCK :]
                yield _Part(rows.numel(), partial(self._codes, rows, cells, (top + first, left)))
            return
        itemsize = self.parts[name].dtype.itemsize
        for values in torch.split(local.reshape(-1), PIECE_BYTES // itemsize):
            yield _Part(values.numel(), partial(_as_it_is, values))

    def _codes(self, rows: Tensor, cells: Tensor, start: tuple[int, int]) -> Tensor:
        return block_codes(rows.to(self._stored.dtype), cells, start).reshape(-1)

    def _scales(self) -> dict[str, Tensor]:
        """Of the blocks of each weight here that is stored in FP8. Collective."""
        amax: dict[str, Tensor] = {}
        for name in self._weights.values():
            if self._blocks[name].size:
                largest = block_amax(_local(self._tensors[name]), self._start(name))
                # of what was rounded the largest is what was largest, rounded
                amax[name] = largest.to(self._stored.dtype).float()
        if self._cut.count:
            vector = self._cut.fill(amax, self._world.device)
            dist.all_reduce(vector, op=dist.ReduceOp.MAX)
            self._cut.take(vector, amax)
        return {
            name: block_scale(values, power_of_two=has_power_of_two_scales(name))
            for name, values in amax.items()
        }

    def _start(self, name: str) -> tuple[int, int]:
        """Where in the whole weight the part begins that is here."""
        row, column = self._blocks[name].offset
        return row, column


def _bands(local: Tensor, top: int) -> tuple[list[int], tuple[Tensor, ...]]:
    """Rows of a shard that begins at row `top` of the whole, so that no block is in two: (the first
    row of each part, the part), of about `PIECE_BYTES` codes."""
    count, width = local.shape
    step = max(BLOCK, PIECE_BYTES // width // BLOCK * BLOCK)
    edges = [0, *range(step - top % BLOCK, count, step)]
    sizes = [end - start for start, end in pairwise([*edges, count])]
    return edges, torch.split(local, sizes)


def _place(
    parts: Iterable[_Part], runs: Sequence[Run], offset: int, dtype: torch.dtype
) -> Iterator[Piece]:
    """The parts of a tensor that begins at byte `offset`; one after the other, they are the runs."""
    left = iter(runs)
    run, used = next(left), 0
    for size, make in parts:
        places: list[Place] = []
        start = 0
        while start < size:
            if used == run.size:
                run, used = next(left), 0
            most = min(size - start, run.size - used)
            places.append(Place(offset + (run.target + used) * dtype.itemsize, start, most))
            start, used = start + most, used + most
        yield Piece(make, dtype, tuple(places))
    # what is not written over would be an older version's
    assert used == run.size
    assert next(left, None) is None


def _as_it_is(values: Tensor) -> Tensor:
    return values


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _block_of(tensor: Tensor) -> Block:
    """What this rank holds of it. Raises BridgeError for a placement that is none of ours."""
    offset, shape = [0] * tensor.dim(), list(tensor.shape)
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        for dim, placement in enumerate(tensor.placements):
            if type(placement) is Shard:
                rows = rows_of(
                    (shape[placement.dim],), coordinate[dim], tensor.device_mesh.size(dim)
                )
                offset[placement.dim] += rows.offset[0]
                shape[placement.dim] = rows.shape[0]
            elif not isinstance(placement, Replicate):
                raise BridgeError(f"a tensor is placed as {placement}; accepted: Shard, Replicate")
        if list(tensor.to_local().shape) != shape:
            raise BridgeError(f"a shard is {list(tensor.to_local().shape)}, it should be {shape}")
    return Block(tuple(offset), tuple(shape))
