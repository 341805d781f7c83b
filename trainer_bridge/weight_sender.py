"""The trainer's weights as a version that engines on this host can load: a checkpoint folder in
shared memory, written by all ranks at once.

    plan      who writes what, made once (reshard.py)
    write     each rank copies its shards, in the stored type, to their places in the mapped file
    digest    tensors are hashed by the ranks in turn
    manifest  and the folder gets its name: it is there whole, or not at all

No rank ever holds a tensor whole that is sharded, let alone the model.
"""

import contextlib
import mmap
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from msgspec import Struct
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..engine.checkpoint import Checkpoint
from ..engine.errors import BridgeError, CheckpointError
from ..engine.manifest import (
    Canary,
    Manifest,
    TensorRecord,
    combine_digests,
    write_manifest,
)
from ..engine.safetensors_writer import Part, layout
from .dealing import deal
from .export import copy_companions, stored_dtype
from .reshard import Block, Plan, explain, plan, rows_of
from .sharding import World
from .trainable import TrainableRing

FILE = "model.safetensors"
SHARED_MEMORY = Path("/dev/shm")


class Published(Struct, frozen=True, kw_only=True):
    """A version that is there, and the seconds that each part took on this rank."""

    path: str
    version: int
    digest: str
    num_bytes: int
    write_s: float
    digest_s: float


@dataclass(frozen=True)
class _Layout:
    head: bytes
    offsets: dict[str, int]
    parts: dict[str, Part]
    num_bytes: int


class WeightSender:
    """Publishes versions of one model, from every rank; all calls are collective.

    source   the checkpoint that was trained on: configuration and tokenizer
    root     where folders appear, v1, v2, …; a directory in shared memory by default
    dtype    in which weights are stored
    keep     versions that stay; an engine that was killed starts from the newest again
    """

    def __init__(
        self,
        ring: TrainableRing,
        world: World,
        *,
        source: Path,
        root: Path,
        dtype: torch.dtype,
        lineage: str,
        keep: int = 2,
    ) -> None:
        """Raises BridgeError for shards that do not make whole tensors."""
        self._ring, self._world = ring, world
        self._source, self._root, self._dtype = source, root, dtype
        self._lineage, self._keep = lineage, keep
        self._parent: str | None = None
        self._layout = _layout_of(ring, dtype)
        self.plan = self._make_plan()

    def explain(self) -> str:
        """Who writes what."""
        sizes = {name: part.dtype.itemsize for name, part in self._layout.parts.items()}
        return explain(self.plan, sizes)

    @torch.no_grad()
    def publish(self, version: int, canaries: Sequence[Canary] = ()) -> Published:
        """Write the weights as they are now. Raises CheckpointError where there is no room."""
        target, partial = self._root / f"v{version}", self._root / f".partial-v{version}"
        began = time.perf_counter()
        self._prepare(partial)
        self._write(partial / FILE)
        self._world.barrier()
        written = time.perf_counter()
        records = self._digests(partial)
        digest = combine_digests({name: record.digest for name, record in records.items()})
        hashed = time.perf_counter()
        if self._world.is_first:
            manifest = Manifest(
                version=version,
                digest=digest,
                parent=self._parent,
                lineage=self._lineage,
                tensors=records,
                canaries=list(canaries),
            )
            write_manifest(partial, manifest)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            self._forget(version)
        self._world.barrier()
        self._parent = digest
        return Published(
            path=str(target),
            version=version,
            digest=digest,
            num_bytes=self._layout.num_bytes,
            write_s=written - began,
            digest_s=hashed - written,
        )

    # parts of it ----------------------------------------------------------------------------------

    def _make_plan(self) -> Plan:
        own = {name: _block_of(tensor) for name, tensor in self._ring.tensors()}
        blocks: list[dict[str, Block]] = [{} for _ in range(self._world.size)]
        dist.all_gather_object(blocks, own)
        parts = self._layout.parts
        return plan(
            {name: part.shape for name, part in parts.items()},
            {name: part.dtype.itemsize for name, part in parts.items()},
            blocks,
        )

    def _prepare(self, folder: Path) -> None:
        """The first rank makes the folder, and a file of the whole size for all to write into."""
        fault = ""
        if self._world.is_first:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                self._check_room()
                with (folder / FILE).open("wb") as file:
                    file.write(self._layout.head)
                    file.truncate(self._layout.num_bytes)
                copy_companions(self._source, folder, self._dtype)
            except (OSError, CheckpointError) as error:
                fault = f"{folder}: {error}"
        said = [fault]
        dist.broadcast_object_list(said, src=0)
        if said[0]:
            raise CheckpointError(said[0])

    def _check_room(self) -> None:
        """A write to a mapped file that the disk has no room for is a SIGBUS, not an error."""
        free = shutil.disk_usage(self._root).free
        if self._layout.num_bytes > free:
            raise CheckpointError(
                f"a version takes {self._layout.num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            )

    def _write(self, file: Path) -> None:
        """This rank's shards, straight into the mapped file, in the stored type."""
        tensors = dict(self._ring.tensors())
        with _mapped(file) as data:
            for share in self.plan[self._world.rank]:
                part = self._layout.parts[share.name]
                local = _local(tensors[share.name]).reshape(-1)
                start = self._layout.offsets[share.name]
                for run in share.runs:
                    place = torch.frombuffer(
                        data,
                        dtype=part.dtype,
                        count=run.size,
                        offset=start + run.target * part.dtype.itemsize,
                    )
                    place.copy_(local[run.source : run.source + run.size])
                    del place

    def _digests(self, folder: Path) -> dict[str, TensorRecord]:
        """Of every tensor; each rank hashes a share of the bytes."""
        checkpoint = Checkpoint.open(folder)
        names = list(self._layout.parts)
        sizes = [part.num_bytes for part in self._layout.parts.values()]
        own = {
            names[index]: checkpoint.tensor_digest(names[index])
            for index in deal(sizes, self._world.size)[self._world.rank]
        }
        found: list[dict[str, str]] = [{} for _ in range(self._world.size)]
        dist.all_gather_object(found, own)
        digests = {name: digest for one in found for name, digest in one.items()}
        return {
            name: TensorRecord(entry.dtype, entry.shape, digests[name])
            for name, entry in checkpoint.entries.items()
        }

    def _forget(self, version: int) -> None:
        """Folders of all but the newest versions, and what a killed trainer left half written."""
        for folder in self._root.iterdir():
            number = folder.name.removeprefix("v")
            is_old = number.isdecimal() and int(number) <= version - self._keep
            if is_old or folder.name.startswith(".partial-"):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap]:
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as data:
        yield data


def _layout_of(ring: TrainableRing, dtype: torch.dtype) -> _Layout:
    parts = {
        name: Part(name, stored_dtype(name, dtype), tuple(tensor.shape))
        for name, tensor in ring.tensors()
    }
    head, offsets = layout(list(parts.values()))
    num_bytes = len(head) + sum(part.num_bytes for part in parts.values())
    return _Layout(head, offsets, parts, num_bytes)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _block_of(tensor: torch.Tensor) -> Block:
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
