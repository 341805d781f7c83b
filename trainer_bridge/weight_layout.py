"""Where a sharded model's values go in a version's file, and the bytes that this rank has of it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..engine.errors import BridgeError
from ..engine.safetensors_writer import Part, layout
from .export import stored_dtype
from .reshard import Block, explain, plan, rows_of
from .sharding import World
from .trainable import TrainableRing


class Piece(NamedTuple):
    """Consecutive values of the file: `data` (one-dimensional, contiguous, in the stored type) from
    byte `offset` on."""

    offset: int
    data: Tensor


class WeightLayout:
    """One safetensors file of a model's tensors, and who writes what of it. Made once, by all ranks.

    dtype  in which weights are stored
    """

    def __init__(self, ring: TrainableRing, world: World, dtype: torch.dtype) -> None:
        """Raises BridgeError for shards that do not make whole tensors."""
        self._ring, self._world = ring, world
        self.parts = {
            name: Part(name, stored_dtype(name, dtype), tuple(tensor.shape))
            for name, tensor in ring.tensors()
        }
        self.head, self._offsets = layout(list(self.parts.values()))
        self.num_bytes = len(self.head) + sum(part.num_bytes for part in self.parts.values())
        own = {name: _block_of(tensor) for name, tensor in ring.tensors()}
        blocks: list[dict[str, Block]] = [{} for _ in range(world.size)]
        dist.all_gather_object(blocks, own)
        self._itemsizes = {name: part.dtype.itemsize for name, part in self.parts.items()}
        self.plan = plan(
            {name: part.shape for name, part in self.parts.items()}, self._itemsizes, blocks
        )

    def explain(self) -> str:
        """Who writes what."""
        return explain(self.plan, self._itemsizes)

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes, as the weights are now; a piece is good until the next one."""
        tensors = dict(self._ring.tensors())
        for share in self.plan[self._world.rank]:
            part = self.parts[share.name]
            local = _local(tensors[share.name]).reshape(-1)
            for run in share.runs:
                offset = self._offsets[share.name] + run.target * part.dtype.itemsize
                yield Piece(offset, local[run.source : run.source + run.size].to(part.dtype))


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
