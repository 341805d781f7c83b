"""A version that is arriving: which bytes are there, and what the tensors' digests are."""

import bisect
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import msgspec

from ...engine.checkpoint.manifest import FILE as MANIFEST
from ...engine.checkpoint.manifest import Manifest
from ...engine.errors import CheckpointError, EverstepError, WeightsRefused
from .checksum import piece_crc
from .folder import Span, StoredTensor, VersionFolder, stored_tensors
from .pages import FILE, Pages
from .protocol import Offer, Piece

# hashing is what the rest of the machine does not need the processor for
HASH_NICENESS = 10


class Workers:
    """Threads of a receiver: some put bytes in their places, others hash, and give way to those."""

    def __init__(self) -> None:
        cores = os.cpu_count() or 1
        self.writing = ThreadPoolExecutor(max(1, min(4, cores // 2)), "write")
        self.hashing = ThreadPoolExecutor(cores, "hash", initializer=_give_way)

    def close(self) -> None:
        self.writing.shutdown()
        self.hashing.shutdown()


class _Write(NamedTuple):
    """A piece that is being put in its places."""

    rank: int
    spans: list[Span]
    done: Future[None]


def _give_way() -> None:
    if sys.platform == "linux":
        # of this thread alone
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), HASH_NICENESS)


def _done(work: Callable[..., None], *arguments: object) -> Future[None]:
    """Do it now."""
    done: Future[None] = Future()
    try:
        work(*arguments)
    except EverstepError as error:
        done.set_exception(error)
    else:
        done.set_result(None)
    return done


class Arrival:
    """One attempt at a version. Raises CheckpointError for an offer that cannot be taken.

    taken    pieces of each rank that have come
    have     and those that are in their places, as far as `settle` has looked
    on_done  called on another thread when bytes are in their places, and when all tensors that were
             to be hashed are
    """

    def __init__(
        self,
        pages: Pages,
        offer: Offer,
        world: int,
        workers: Workers,
        on_done: Callable[[], None],
    ) -> None:
        self.offer = offer
        self.taken = [0] * world
        self.have = [0] * world
        self.num_bytes = len(offer.head)
        """Of the file, that are there."""
        self._tensors = stored_tensors(offer.head)
        self._check()
        self._ends = [tensor.span.end for tensor in self._tensors]
        self._spans: list[list[Span]] = [[] for _ in self._tensors]
        self._lacks = [tensor.span.size for tensor in self._tensors]
        self._workers, self._on_done = workers, on_done
        self._writes: deque[_Write] = deque()
        self._digests: dict[str, Future[str]] = {}
        self._whole: deque[int] = deque()
        """Tensors that are there, and not hashed yet."""
        self._num_hashing = 0
        self._hashing = threading.Lock()
        self.folder = VersionFolder(pages, offer.version)
        self.folder.begin(offer.head, offer.num_bytes, offer.files)
        self.folder.open()
        for index, tensor in enumerate(self._tensors):
            if not tensor.span.size:
                self._whole.append(index)

    @property
    def is_complete(self) -> bool:
        """Every byte is there."""
        return self.num_bytes == self.offer.num_bytes

    @property
    def doing(self) -> str:
        """In a few words."""
        if self.is_complete:
            left = self._num_hashing + len(self._whole)
            return f"hashes version {self.offer.version}, {left} tensors are left"
        return (
            f"has {self.num_bytes / 1e6:.1f} of {self.offer.num_bytes / 1e6:.1f} MB of version "
            f"{self.offer.version}"
        )

    def take(self, rank: int, piece: Piece, data: memoryview) -> None:
        """The rank's next piece, on its way to its places. Raises CheckpointError for one that
        belongs nowhere."""
        flat = piece.spans
        if len(flat) % 2 or not flat or sum(flat[1::2]) != len(data):
            raise CheckpointError(f"a piece of rank {rank} has {len(data)} bytes for {flat[1::2]}")
        spans = [Span(offset, size) for offset, size in zip(flat[::2], flat[1::2], strict=True)]
        for span in spans:
            if span.offset < len(self.offer.head) or span.end > self.offer.num_bytes:
                raise CheckpointError(f"a piece of rank {rank} belongs outside of {FILE}: {span}")
        self.taken[rank] += 1
        if self.folder.target is not None:
            # to memory that is there: sooner done than said to a thread
            done = _done(self._place, rank, piece, spans, data)
        else:
            done = self._workers.writing.submit(self._place, rank, piece, spans, data)
            done.add_done_callback(lambda _: self._on_done())
        self._writes.append(_Write(rank, spans, done))

    def settle(self) -> set[int]:
        """Ranks of which more is in its places than the last time.

        Raises WeightsRefused naming the tensor of a piece that is not what was sent, or came twice;
        CheckpointError where it could not be written.
        """
        found: set[int] = set()
        while self._writes and self._writes[0].done.done():
            rank, spans, done = self._writes.popleft()
            done.result()
            for span in spans:
                self._note(rank, span)
            self.have[rank] += 1
            found.add(rank)
        return found

    def digests(self) -> dict[str, str] | None:
        """Of every tensor; None while there are some to come. Raises CheckpointError where the file
        cannot be read."""
        if not self.is_complete:
            return None
        self.hash()
        if self._num_hashing:
            return None
        return {name: digest.result() for name, digest in self._digests.items()}

    @property
    def has_whole(self) -> bool:
        """There are tensors to be hashed."""
        return bool(self._whole)

    def hash(self) -> None:
        """Begin with the tensors that are there. What comes meanwhile comes more slowly, where cores
        are few: `digests` begins at the latest, when every byte is there."""
        with self._hashing:
            self._num_hashing += len(self._whole)
        while self._whole:
            tensor: StoredTensor = self._tensors[self._whole.popleft()]
            digest = self._workers.hashing.submit(self.folder.digest, tensor)
            self._digests[tensor.name] = digest
            digest.add_done_callback(self._note_hashed)

    def _note_hashed(self, _: Future[str]) -> None:
        """On a thread of its own."""
        with self._hashing:
            self._num_hashing -= 1
            is_last = not self._num_hashing
        if is_last:
            self._on_done()

    def publish(self, manifest: bytes) -> Path:
        """The folder gets its name. Raises WeightsRefused for a manifest of other bytes."""
        own = self.digests()
        if own is None:
            raise CheckpointError(f"version {self.offer.version} is not complete: {self.doing}")
        try:
            said = msgspec.json.decode(manifest, type=Manifest)
        except msgspec.MsgspecError as error:
            raise CheckpointError(f"{MANIFEST} of version {self.offer.version}: {error}") from None
        if said.version != self.offer.version:
            raise CheckpointError(
                f"{MANIFEST} is of version {said.version}, not {self.offer.version}"
            )
        for name in sorted(own.keys() | said.tensors.keys()):
            record = said.tensors.get(name)
            if record is None or record.digest != own.get(name):
                raise WeightsRefused(
                    f"{name} arrived with the digest {own.get(name, '(none)')[:12]}, {MANIFEST} says "
                    f"{record.digest[:12] if record else '(none)'}",
                    tensor=name,
                )
        self.folder.finish(said, self.offer.keep)
        return self.folder.path

    def discard(self) -> None:
        """Nothing is left of it."""
        for digest in self._digests.values():
            digest.cancel()
        writes = [write.done for write in self._writes]
        for done in writes:
            done.cancel()
        # whoever is still writing has the file open
        wait(writes)
        self.folder.discard()

    def _check(self) -> None:
        offer = self.offer
        end = self._tensors[-1].span.end if self._tensors else len(offer.head)
        if end != offer.num_bytes:
            raise CheckpointError(f"{FILE} would have {end} bytes, {offer.num_bytes} are offered")
        for name in offer.files:
            is_plain = Path(name).name == name and not name.startswith(".") and "\0" not in name
            if not is_plain or name in (FILE, MANIFEST):
                raise CheckpointError(f"{name!r} cannot be a file of a version")

    def _place(self, rank: int, piece: Piece, spans: list[Span], data: memoryview) -> None:
        """On a thread of its own, where that may take long."""
        target = self.folder.target
        # what is wrong with it costs the version in any case
        found = piece_crc(piece.spans, data, target)
        if found != piece.crc:
            name = self._tensors[self._index(spans[0].offset)].name
            raise WeightsRefused(
                f"a piece of rank {rank} with {name} has the checksum {found:08x}, it was sent "
                f"with {piece.crc:08x}",
                tensor=name,
            )
        if target is None:
            self.folder.write(spans, data)

    def _index(self, offset: int) -> int:
        """Of the tensor with this byte."""
        return bisect.bisect_right(self._ends, offset)

    def _note(self, rank: int, span: Span) -> None:
        """These bytes are there; tensors that are complete by them can be hashed."""
        offset = span.offset
        while offset < span.end:
            index = self._index(offset)
            end = min(span.end, self._ends[index])
            self._spans[index].append(Span(offset, end - offset))
            self._lacks[index] -= end - offset
            if self._lacks[index] <= 0:
                self._check_once(rank, index)
                self._whole.append(index)
            offset = end
        self.num_bytes += span.size

    def _check_once(self, rank: int, index: int) -> None:
        """As many bytes as it has are those that it has."""
        tensor = self._tensors[index]
        end = tensor.span.offset
        for span in sorted(self._spans[index]):
            if span.offset != end:
                raise WeightsRefused(
                    f"bytes of {tensor.name} came twice, the last from rank {rank}",
                    tensor=tensor.name,
                )
            end = span.end
        self._spans[index].clear()
