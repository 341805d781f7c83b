"""The trainer's weights as versions that engines can load: checkpoint folders in shared memory here,
or on the engines' hosts, written by all ranks at once.

    layout    who writes what, made once (layout.py, reshard.py)
    write     each rank brings its shards, in the stored type, to their places in the file
    digest    of every tensor, as it is there
    manifest  and the folder gets its name: it is there whole, or not at all

No rank ever holds a tensor whole that is sharded, let alone the model.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from msgspec import Struct

from ...engine import log
from ...engine.checkpoint.manifest import Canary, Manifest, TensorRecord, combine_digests
from ...engine.checkpoint.stored_format import StoredFormat
from ...engine.errors import BridgeError, CheckpointError, EverstepError, PeerMissing, PeerRefused
from ..trainer.sharding import World
from ..trainer.trainable import TrainableRing
from .layout import WeightLayout
from .link import VersionLost
from .targets import Target

ATTEMPTS = 3
Result = TypeVar("Result")


class Published(Struct, frozen=True, kw_only=True):
    """A version that is there, and the seconds that each part took on this rank.

    path  its folder, on the engines' hosts
    """

    path: str
    version: int
    digest: str
    num_bytes: int
    write_s: float
    digest_s: float
    finish_s: float


class WeightSender:
    """Publishes versions of one model, from every rank; all calls are collective: what fails on one
    rank fails on all of them, with the same line.

    source   the checkpoint that was trained on: configuration and tokenizer
    target   where versions go
    stored   how the model is stored; not as it is trained, where engines run FP8
    """

    def __init__(
        self,
        ring: TrainableRing,
        world: World,
        target: Target,
        *,
        source: Path,
        stored: StoredFormat,
        lineage: str,
    ) -> None:
        """Raises BridgeError for shards that do not make whole tensors."""
        self.layout = WeightLayout(ring, world, stored)
        self._world, self._target = world, target
        self._source, self._stored = source, stored
        self._lineage = lineage
        self._parent: str | None = None
        self._num_attempts = 0

    @torch.no_grad()
    def publish(self, version: int, canaries: Sequence[Canary] = ()) -> Published:
        """Write the weights as they are now.

        Raises CheckpointError where there is no room, BridgeError where receivers are missing.
        """
        for left in reversed(range(ATTEMPTS)):
            self._num_attempts += 1
            try:
                published = self._publish(version, self._num_attempts, canaries)
            except VersionLost as error:
                # on all ranks: a receiver that was started again gets it from the beginning
                if not left:
                    raise
                log.event("weights.again", level="warning", version=version, reason=str(error))
            else:
                self._parent = published.digest
                return published
        raise AssertionError

    def close(self) -> None:
        self._target.close()

    def _publish(self, version: int, attempt: int, canaries: Sequence[Canary]) -> Published:
        target, layout = self._target, self.layout
        times = [time.perf_counter()]
        self._together(lambda: target.open(version, attempt))
        self._together(self._begin, first_only=True)
        self._together(lambda: target.write(layout.pieces()))
        times.append(time.perf_counter())
        shares = self._together(lambda: target.records(layout.head))
        found = {name: record for share in shares for name, record in (share or {}).items()}
        manifest = self._manifest(version, found, canaries)
        times.append(time.perf_counter())
        [path, *_] = self._together(lambda: target.finish(manifest), first_only=True)
        times.append(time.perf_counter())
        assert path is not None
        return Published(
            path=path,
            version=version,
            digest=manifest.digest,
            num_bytes=layout.num_bytes,
            write_s=times[1] - times[0],
            digest_s=times[2] - times[1],
            finish_s=times[3] - times[2],
        )

    def _begin(self) -> None:
        files = self._stored.companions(self._source)
        self._target.begin(self.layout.head, self.layout.num_bytes, files)

    def _manifest(
        self, version: int, records: dict[str, TensorRecord], canaries: Sequence[Canary]
    ) -> Manifest:
        return Manifest(
            version=version,
            digest=combine_digests({name: record.digest for name, record in records.items()}),
            parent=self._parent,
            lineage=self._lineage,
            weights=self._stored.kind,
            tensors={name: records[name] for name in self.layout.parts},
            canaries=list(canaries),
        )

    def _together(
        self, work: Callable[[], Result], *, first_only: bool = False
    ) -> list[Result | None]:
        """Do it on every rank, or on the first; the results of all. Raises on all of them what was
        raised on one, what can be tried again only where nothing else was."""
        result: Result | None = None
        fault: EverstepError | None = None
        if self._world.is_first or not first_only:
            try:
                result = work()
            except EverstepError as error:
                fault = error
        said: list[tuple[Result | None, tuple[str, str] | None]] = [(None, None)] * self._world.size
        try:
            own = None if fault is None else (type(fault).__name__, str(fault))
            dist.all_gather_object(said, (result, own))
        except RuntimeError:
            # whoever made the world finds out who is gone
            self._target.give_up("a rank is gone")
            raise
        faults = [(rank, *one) for rank, (_, one) in enumerate(said) if one is not None]
        if faults:
            faults.sort(key=lambda one: one[1] == VersionLost.__name__)
            rank, name, message = faults[0]
            self._target.give_up(message)
            raise _FAULTS.get(name, BridgeError)(
                message if self._world.size == 1 else f"rank {rank}: {message}"
            )
        return [result for result, _ in said]


_FAULTS: dict[str, type[EverstepError]] = {
    kind.__name__: kind for kind in (VersionLost, CheckpointError, PeerMissing, PeerRefused)
}
