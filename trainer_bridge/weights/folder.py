"""A version as a folder on this host, filled by several threads or processes at once and there whole
or not at all. Torch-free."""

import contextlib
import hashlib
import math
import mmap
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from ...engine.checkpoint.manifest import Manifest, TensorRecord, tensor_hash, write_manifest
from ...engine.errors import CheckpointError
from .pages import FILE, PARTIAL, SPARE, OpenFile, Pages

SHARED_MEMORY = Path("/dev/shm")
# of the folders of versions, half-written ones too, and what is left of old ones
VERSION_NAME = re.compile(rf"({re.escape(PARTIAL)}|{re.escape(SPARE)})?v\d+")
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}


def default_root(run: str) -> Path:
    """Where the versions of a run are, unless another place is named."""
    return SHARED_MEMORY / f"everstep-{run}"


class Span(NamedTuple):
    """`size` bytes of the file, from `offset` on."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


class StoredTensor(NamedTuple):
    """A tensor of the file: safetensors type, shape, where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    span: Span


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def stored_tensors(head: bytes) -> list[StoredTensor]:
    """What the head of a safetensors file lists, in the order of their bytes.

    Raises CheckpointError for a head that is none, and tensors that do not fill the file once.
    """
    try:
        [length] = struct.unpack_from("<Q", head)
        if length != len(head) - 8:
            raise ValueError(f"it says {length} bytes and has {len(head) - 8}")
        items = msgspec.json.decode(head[8:], type=dict[str, msgspec.Raw])
        items.pop("__metadata__", None)
        entries = {n: msgspec.json.decode(raw, type=_Entry) for n, raw in items.items()}
        found = [_stored(name, entry, len(head)) for name, entry in entries.items()]
        found.sort(key=lambda tensor: tensor.span)
        end = len(head)
        for tensor in found:
            if tensor.span.offset != end:
                raise ValueError(f"{tensor.name} begins at {tensor.span.offset}, expected {end}")
            end = tensor.span.end
    except (ValueError, struct.error, msgspec.MsgspecError) as error:
        raise CheckpointError(f"the head of a safetensors file is malformed: {error}") from None
    return found


def _stored(name: str, entry: _Entry, start: int) -> StoredTensor:
    begin, end = entry.data_offsets
    if entry.dtype not in _ITEM_BYTES:
        raise ValueError(f"{name} has type {entry.dtype}; accepted: {', '.join(_ITEM_BYTES)}")
    if begin < 0 or end - begin != math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]:
        raise ValueError(f"{name} has {end - begin} bytes, which is not what its shape needs")
    return StoredTensor(name, entry.dtype, entry.shape, Span(start + begin, end - begin))


class VersionFolder:
    """`root/vN`; while it is being filled it has another name.

    One process begins and finishes it; any number of them write and digest. Each has the `pages` of
    that root, which are the same from version to version.
    """

    def __init__(self, pages: Pages, version: int) -> None:
        self.path = pages.root / f"v{version}"
        self.partial = pages.root / f"{PARTIAL}v{version}"
        self._pages = pages
        self._version = version
        self._file: OpenFile | None = None

    def begin(self, head: bytes, num_bytes: int, files: Mapping[str, bytes]) -> None:
        """Make the weights' file in its whole size, and the other files.

        Raises CheckpointError where there is no room.
        """
        try:
            self._pages.clean()
            self.partial.mkdir(parents=True)
            target = self.partial / FILE
            is_there = self._pages.take(target, num_bytes)
            self._check_room((0 if is_there else num_bytes) + sum(map(len, files.values())))
            with target.open("r+b" if is_there else "wb") as file:
                file.write(head)
                file.truncate(num_bytes)
            for name, content in files.items():
                (self.partial / name).write_bytes(content)
        except OSError as error:
            self.discard()
            raise self._fault(error) from None
        except CheckpointError:
            self.discard()
            raise

    def open(self) -> None:
        """Before several threads write. Raises CheckpointError where nobody has begun it."""
        try:
            self._file = self._pages.open(self.partial / FILE)
        except OSError as error:
            raise self._fault(error) from None

    @property
    def target(self) -> mmap.mmap | None:
        """After `open`: the file's bytes, to be changed in place by any thread; None where they have no
        place yet, and `write` makes it."""
        assert self._file is not None
        return self._file.pages

    def write(self, spans: Sequence[Span], data: memoryview) -> None:
        """Put the bytes of `data`, one span after the other, in their places; on any thread.

        New pages are made by the system and not through a map: where there is no room for one, that
        is an error and no SIGBUS, and it is not cleared before. Raises CheckpointError.
        """
        if self._file is None:
            self.open()
        assert self._file is not None
        start = 0
        if self._file.pages is not None:
            # without the interpreter's lock, which a memoryview would keep
            source, target = (np.frombuffer(b, np.uint8) for b in (data, self._file.pages))
            for offset, size in spans:
                target[offset : offset + size] = source[start : start + size]
                start += size
            return
        try:
            for offset, size in spans:
                end = start + size
                while start < end:
                    done = os.pwrite(self._file.fd, data[start:end], offset)
                    start, offset = start + done, offset + done
        except OSError as error:
            raise self._fault(error) from None

    def digest(self, tensor: StoredTensor) -> str:
        """sha256 (hex) of a tensor as it is in the file; other threads run meanwhile."""
        with self._mapped() as data:
            return self._digest(data, tensor)

    def records(self, tensors: Sequence[StoredTensor], threads: int = 1) -> dict[str, TensorRecord]:
        """Of these tensors, as they are in the file; the largest first, so that threads end together."""
        with self._mapped() as data, ThreadPoolExecutor(threads) as pool:
            found = {
                tensor: pool.submit(self._digest, data, tensor)
                for tensor in sorted(tensors, key=lambda tensor: -tensor.span.size)
            }
            return {
                tensor.name: TensorRecord(tensor.dtype, tensor.shape, found[tensor].result())
                for tensor in tensors
            }

    def finish(self, manifest: Manifest, keep: int) -> None:
        """It gets its name; older ones than the newest `keep` go, and what was never finished.

        One that goes may stay as memory, for the next version to be written over it.
        """
        self.close()
        write_manifest(self.partial, manifest)
        self._pages.retire(self.path)
        self.partial.rename(self.path)
        for folder in sorted(self.path.parent.iterdir()):
            number = folder.name.removeprefix("v")
            if number.isdecimal() and int(number) <= self._version - keep:
                self._pages.retire(folder)
        self._pages.clean()

    def close(self) -> None:
        """Nothing is written from now on."""
        self._file = None

    def discard(self) -> None:
        """Nothing is left of what was not finished."""
        self.close()
        self._pages.remove(self.partial)

    @staticmethod
    def _digest(data: mmap.mmap, tensor: StoredTensor) -> str:
        hashing: hashlib._Hash = tensor_hash(tensor.name, tensor.dtype, tensor.shape)
        with memoryview(data) as view, view[tensor.span.offset : tensor.span.end] as own:
            hashing.update(own)
        return hashing.hexdigest()

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[mmap.mmap]:
        try:
            file = self._pages.open(self.partial / FILE)
            if file.pages is not None:
                yield file.pages
                return
            with mmap.mmap(file.fd, 0, prot=mmap.PROT_READ) as data:
                yield data
        except OSError as error:
            raise self._fault(error) from None

    def _check_room(self, num_bytes: int) -> None:
        """Before any byte is moved, and with the figures."""
        free = shutil.disk_usage(self.path.parent).free
        if num_bytes > free:
            raise CheckpointError(
                f"{self.path}: a version takes {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB "
                "are free"
            )

    def _fault(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path}: {error.strerror or error}")
