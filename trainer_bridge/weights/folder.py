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

from ...engine.checkpoint.manifest import Manifest, TensorRecord, tensor_hash, write_manifest
from ...engine.errors import CheckpointError

FILE = "model.safetensors"
SHARED_MEMORY = Path("/dev/shm")
_PARTIAL = ".partial-"
# of the folders of versions, half-written ones too
VERSION_NAME = re.compile(rf"({re.escape(_PARTIAL)})?v\d+")
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

    One process begins and finishes it; any number of them write and digest.
    """

    def __init__(self, root: Path, version: int) -> None:
        self.path = root / f"v{version}"
        self.partial = root / f"{_PARTIAL}v{version}"
        self._version = version
        self._file: int | None = None

    def begin(self, head: bytes, num_bytes: int, files: Mapping[str, bytes]) -> None:
        """Make the weights' file in its whole size, and the other files.

        Raises CheckpointError where there is no room.
        """
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            self._check_room(num_bytes + sum(map(len, files.values())))
            with (self.partial / FILE).open("wb") as file:
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

    def write(self, spans: Sequence[Span], data: memoryview) -> None:
        """Put the bytes of `data`, one span after the other, in their places; on any thread.

        Written by the system and not through a map: where the disk has no room for a page, that is
        an error and no SIGBUS, and a page that is new is not cleared before. Raises CheckpointError.
        """
        if self._file is None:
            self.open()
        assert self._file is not None
        start = 0
        try:
            for offset, size in spans:
                end = start + size
                while start < end:
                    done = os.pwrite(self._file, data[start:end], offset)
                    start, offset = start + done, offset + done
        except OSError as error:
            raise self._fault(error) from None

    def open(self) -> None:
        """Before several threads write. Raises CheckpointError where nobody has begun it."""
        try:
            self._file = os.open(self.partial / FILE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self._fault(error) from None

    def digest(self, tensor: StoredTensor) -> str:
        """sha256 (hex) of a tensor as it is in the file; other threads run meanwhile."""
        with self._mapped() as data:
            return self._digest(data, tensor)

    def records(self, tensors: Sequence[StoredTensor], threads: int = 1) -> dict[str, TensorRecord]:
        """Of these tensors, as they are in the file."""
        with self._mapped() as data, ThreadPoolExecutor(threads) as pool:
            digests = pool.map(lambda tensor: self._digest(data, tensor), tensors)
            return {
                tensor.name: TensorRecord(tensor.dtype, tensor.shape, digest)
                for tensor, digest in zip(tensors, digests, strict=True)
            }

    def finish(self, manifest: Manifest, keep: int) -> None:
        """It gets its name; older ones than the newest `keep` go, and what was never finished."""
        self.close()
        write_manifest(self.partial, manifest)
        shutil.rmtree(self.path, ignore_errors=True)
        self.partial.rename(self.path)
        for folder in self.path.parent.iterdir():
            number = folder.name.removeprefix("v")
            if number.isdecimal() and int(number) <= self._version - keep:
                shutil.rmtree(folder, ignore_errors=True)
        clean(self.path.parent)

    def close(self) -> None:
        """Nothing is written from now on."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def discard(self) -> None:
        """Nothing is left of what was not finished."""
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    @staticmethod
    def _digest(data: mmap.mmap, tensor: StoredTensor) -> str:
        hashing: hashlib._Hash = tensor_hash(tensor.name, tensor.dtype, tensor.shape)
        with memoryview(data) as view, view[tensor.span.offset : tensor.span.end] as own:
            hashing.update(own)
        return hashing.hexdigest()

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[mmap.mmap]:
        try:
            file = os.open(self.partial / FILE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._fault(error) from None
        try:
            with mmap.mmap(file, 0, prot=mmap.PROT_READ) as data:
                yield data
        finally:
            os.close(file)

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


def clean(root: Path) -> None:
    """What was never finished goes."""
    for folder in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(folder, ignore_errors=True)
