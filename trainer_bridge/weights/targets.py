"""Where versions go: a folder on this host, or receivers on others. Every rank has a target, and all
of them do the same at the same time; what only the first rank does says so."""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec
import torch

from ...engine.checkpoint.manifest import Manifest, TensorRecord
from ...engine.errors import BridgeError
from ...kernels.torch_threads import one_thread
from ..curve import Keys
from ..trainer.sharding import World
from ..trajectories.dealing import deal
from .chunks import Memory, chunks
from .folder import VersionFolder, stored_tensors
from .layout import Piece
from .link import WeightLink
from .pages import Pages
from .protocol import Offer, Publish

Item = TypeVar("Item")


class Target(Protocol):
    """What a version is written to. All calls raise CheckpointError and BridgeError, in one line."""

    def open(self, version: int, attempt: int, /) -> None:
        """Every rank, before anything else of a version; an earlier attempt is over."""

    def begin(self, head: bytes, num_bytes: int, files: Mapping[str, bytes]) -> None:
        """The first rank: make room."""

    def write(self, pieces: Iterable[Piece]) -> None:
        """Every rank, after `begin`: return when they are all there."""

    def records(self, head: bytes) -> dict[str, TensorRecord]:
        """Every rank, after `write` on all: of tensors, as they are there; together, of all."""

    def finish(self, manifest: Manifest) -> str:
        """The first rank: the folder gets its name; returns it."""

    def give_up(self, reason: str, /) -> None:
        """Every rank, where something failed anywhere. Never fails."""

    def close(self) -> None: ...


class Here:
    """Folders on this host, in shared memory say, filled by all ranks.

    keep  versions that stay; an engine that was killed starts from the newest again. In memory there
          is one more: the one that is being written, and between versions its place (pages.py)
    """

    def __init__(self, world: World, root: Path, keep: int = 2) -> None:
        self._world, self._keep = world, keep
        self._pages = Pages(root.resolve())
        self._threads = max(1, len(os.sched_getaffinity(0)) // _ranks_here(world))
        self._folder: VersionFolder | None = None

    def open(self, version: int, _attempt: int, /) -> None:
        self._folder = VersionFolder(self._pages, version)

    def begin(self, head: bytes, num_bytes: int, files: Mapping[str, bytes]) -> None:
        self._own.begin(head, num_bytes, files)

    def write(self, pieces: Iterable[Piece]) -> None:
        """Each thread converts its pieces straight to their places, where those are there."""
        folder = self._own
        folder.open()
        target = folder.target
        file = None if target is None else torch.frombuffer(target, dtype=torch.uint8)
        shared = _Shared(pieces)

        def work() -> None:
            for piece in shared:
                if file is not None:
                    piece.put(file)
                else:
                    data = piece.data().view(torch.uint8).numpy().data
                    folder.write(piece.spans(), data)

        with one_thread(), ThreadPoolExecutor(self._threads, "write") as pool:
            for done in [pool.submit(work) for _ in range(self._threads)]:
                done.result()
        folder.close()

    def records(self, head: bytes) -> dict[str, TensorRecord]:
        tensors = stored_tensors(head)
        share = deal([t.span.size for t in tensors], self._world.size)[self._world.rank]
        return self._own.records([tensors[index] for index in share], self._threads)

    def finish(self, manifest: Manifest) -> str:
        self._own.finish(manifest, self._keep)
        return str(self._own.path)

    def give_up(self, _reason: str, /) -> None:
        if self._folder is not None:
            self._folder.close()
            if self._world.is_first:
                self._folder.discard()

    def close(self) -> None:
        """Versions stay, and no memory beside them."""
        self._pages.close()

    @property
    def _own(self) -> VersionFolder:
        assert self._folder is not None
        return self._folder


class Elsewhere:
    """Receivers on other hosts (receiver.py); each rank sends its own bytes to each of them.

    run, lineage  as on the bridge
    deadline_s    how long a receiver may say nothing
    """

    def __init__(
        self,
        world: World,
        endpoints: Sequence[str],
        *,
        run: str,
        lineage: str,
        keys: Keys | None = None,
        keep: int = 2,
        deadline_s: float = 60.0,
    ) -> None:
        """Raises ConfigError for an endpoint that is none, or needs keys."""
        self._world, self._keep = world, keep
        self._links = [
            WeightLink(
                endpoint,
                run=run,
                lineage=lineage,
                rank=world.rank,
                world=world.size,
                keys=keys,
                deadline_s=deadline_s,
            )
            for endpoint in endpoints
        ]
        self._version = (0, 0)
        self._memory: Memory | None = None

    def open(self, version: int, attempt: int, /) -> None:
        self._version = (version, attempt)
        for link in self._links:
            link.begin(version, attempt)
        window = min(link.window for link in self._links)
        if self._memory is None or self._memory.window != window:
            self._memory = Memory(window)

    def begin(self, head: bytes, num_bytes: int, files: Mapping[str, bytes]) -> None:
        version, attempt = self._version
        offer = Offer(
            version=version,
            attempt=attempt,
            num_bytes=num_bytes,
            head=head,
            files=dict(files),
            keep=self._keep,
        )
        for link in self._links:
            link.offer(offer)

    def write(self, pieces: Iterable[Piece]) -> None:
        assert self._memory is not None
        number = -1
        for chunk in chunks(pieces, self._memory):
            number = chunk.number
            for link in self._links:
                link.send(chunk)
        for link in self._links:
            link.settle(number)

    def records(self, head: bytes) -> dict[str, TensorRecord]:
        """The first rank's links tell them; they must be the same everywhere."""
        if not self._world.is_first:
            return {}
        found = [link.digests() for link in self._links]
        for link, digests in zip(self._links, found, strict=True):
            for tensor in stored_tensors(head):
                if digests.get(tensor.name) != found[0].get(tensor.name):
                    raise BridgeError(
                        f"{tensor.name} arrived with other bytes at {link.endpoint} than at "
                        f"{self._links[0].endpoint}"
                    )
        return {
            tensor.name: TensorRecord(tensor.dtype, tensor.shape, found[0][tensor.name])
            for tensor in stored_tensors(head)
        }

    def finish(self, manifest: Manifest) -> str:
        publish = Publish(*self._version, msgspec.json.encode(manifest))
        paths = {link.endpoint: link.publish(publish) for link in self._links}
        if len(set(paths.values())) > 1:
            said = ", ".join(f"{endpoint} has it in {path}" for endpoint, path in paths.items())
            raise BridgeError(
                f"version {self._version[0]} must be in the same folder on every host: {said}; "
                "start the receivers with the same --root"
            )
        return paths[self._links[0].endpoint]

    def give_up(self, reason: str, /) -> None:
        for link in self._links:
            link.withdraw(reason)

    def close(self) -> None:
        for link in self._links:
            link.close()


class _Shared(Generic[Item]):
    """An iterator that several threads take from; after an error there is nothing more."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items, self._lock = iter(items), threading.Lock()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._lock:
            return next(self._items)


def _ranks_here(world: World) -> int:
    """Ranks that share this host's processors."""
    return min(world.size, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
