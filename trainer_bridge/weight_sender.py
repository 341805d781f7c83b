"""The trainer's weights as a version that engines on this host can load: a checkpoint folder in
shared memory, written by all ranks at once.

    layout    who writes what, made once (weight_layout.py, reshard.py)
    write     each rank copies its shards, in the stored type, to their places in the mapped file;
              FP8 is made on the way
    digest    tensors are hashed by the ranks in turn
    manifest  and the folder gets its name: it is there whole, or not at all (weight_folder.py)

No rank ever holds a tensor whole that is sharded, let alone the model.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from msgspec import Struct

from ..engine.errors import CheckpointError
from ..engine.manifest import Canary, Manifest, TensorRecord, combine_digests
from ..engine.stored_format import StoredFormat
from .dealing import deal
from .sharding import World
from .trainable import TrainableRing
from .weight_folder import VersionFolder
from .weight_layout import WeightLayout


class Published(Struct, frozen=True, kw_only=True):
    """A version that is there, and the seconds that each part took on this rank."""

    path: str
    version: int
    digest: str
    num_bytes: int
    write_s: float
    digest_s: float


class WeightSender:
    """Publishes versions of one model, from every rank; all calls are collective.

    source   the checkpoint that was trained on: configuration and tokenizer
    root     where folders appear, v1, v2, …; a directory in shared memory by default
    stored   how the model is stored; not as it is trained, where engines run FP8
    keep     versions that stay; an engine that was killed starts from the newest again
    """

    def __init__(
        self,
        ring: TrainableRing,
        world: World,
        *,
        source: Path,
        root: Path,
        stored: StoredFormat,
        lineage: str,
        keep: int = 2,
    ) -> None:
        """Raises BridgeError for shards that do not make whole tensors."""
        self.layout = WeightLayout(ring, world, stored)
        self._world = world
        self._source, self._root, self._stored = source, root, stored
        self._lineage, self._keep = lineage, keep
        self._parent: str | None = None

    @torch.no_grad()
    def publish(self, version: int, canaries: Sequence[Canary] = ()) -> Published:
        """Write the weights as they are now. Raises CheckpointError where there is no room."""
        folder = VersionFolder(self._root, version)
        began = time.perf_counter()
        self._begin(folder)
        folder.write(self.layout.pieces())
        self._world.barrier()
        written = time.perf_counter()
        records = self._digests(folder)
        digest = combine_digests({name: record.digest for name, record in records.items()})
        hashed = time.perf_counter()
        if self._world.is_first:
            manifest = Manifest(
                version=version,
                digest=digest,
                parent=self._parent,
                lineage=self._lineage,
                weights=self._stored.kind,
                tensors=records,
                canaries=list(canaries),
            )
            folder.finish(manifest, self._keep)
        self._world.barrier()
        self._parent = digest
        return Published(
            path=str(folder.path),
            version=version,
            digest=digest,
            num_bytes=self.layout.num_bytes,
            write_s=written - began,
            digest_s=hashed - written,
        )

    def _begin(self, folder: VersionFolder) -> None:
        """The first rank makes a file of the whole size for all to write into."""
        said = [""]
        if self._world.is_first:
            try:
                folder.begin(self.layout.head, self.layout.num_bytes, self._source, self._stored)
            except CheckpointError as error:
                said = [str(error)]
        dist.broadcast_object_list(said, src=0)
        if said[0]:
            raise CheckpointError(said[0])

    def _digests(self, folder: VersionFolder) -> dict[str, TensorRecord]:
        """Of every tensor; each rank hashes a share of the bytes."""
        parts = list(self.layout.parts.values())
        own = deal([part.num_bytes for part in parts], self._world.size)[self._world.rank]
        found: list[dict[str, TensorRecord]] = [{} for _ in range(self._world.size)]
        dist.all_gather_object(found, folder.digests(parts[index].name for index in own))
        records = {name: record for one in found for name, record in one.items()}
        return {part.name: records[part.name] for part in parts}
