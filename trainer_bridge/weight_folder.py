"""A version as a folder on this host, filled by several processes at once and there whole or not at
all."""

import contextlib
import mmap
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..engine.checkpoint import Checkpoint
from ..engine.errors import CheckpointError
from ..engine.manifest import Manifest, TensorRecord, write_manifest
from ..engine.stored_format import StoredFormat
from .weight_layout import Piece

FILE = "model.safetensors"
SHARED_MEMORY = Path("/dev/shm")


class VersionFolder:
    """`root/vN`; while it is being written it has another name.

    One process begins and finishes it, all write and digest.
    """

    def __init__(self, root: Path, version: int) -> None:
        self.path = root / f"v{version}"
        self._partial = root / f".partial-v{version}"
        self._version = version

    def begin(self, head: bytes, num_bytes: int, source: Path, stored: StoredFormat) -> None:
        """Make the file in its whole size. Raises CheckpointError where there is no room."""
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            self._check_room(num_bytes)
            with (self._partial / FILE).open("wb") as file:
                file.write(head)
                file.truncate(num_bytes)
            for name, content in stored.companions(source).items():
                (self._partial / name).write_bytes(content)
        except OSError as error:
            raise CheckpointError(f"{self._partial}: {error}") from None

    def write(self, pieces: Iterable[Piece]) -> None:
        with _mapped(self._partial / FILE) as data:
            for piece in pieces:
                place = torch.frombuffer(
                    data, dtype=piece.data.dtype, count=piece.data.numel(), offset=piece.offset
                )
                place.copy_(piece.data)
                del place

    def digests(self, names: Iterable[str]) -> dict[str, TensorRecord]:
        """Of these tensors, as they are in the file."""
        checkpoint = Checkpoint.open(self._partial)
        return {
            name: TensorRecord(
                checkpoint.entries[name].dtype,
                checkpoint.entries[name].shape,
                checkpoint.tensor_digest(name),
            )
            for name in names
        }

    def finish(self, manifest: Manifest, keep: int) -> None:
        """It gets its name; older ones than the newest `keep` go, and what was never finished."""
        write_manifest(self._partial, manifest)
        shutil.rmtree(self.path, ignore_errors=True)
        self._partial.rename(self.path)
        for folder in self.path.parent.iterdir():
            number = folder.name.removeprefix("v")
            is_old = number.isdecimal() and int(number) <= self._version - keep
            if is_old or folder.name.startswith(".partial-"):
                shutil.rmtree(folder, ignore_errors=True)

    def _check_room(self, num_bytes: int) -> None:
        """A write to a mapped file that the disk has no room for is a SIGBUS, not an error."""
        free = shutil.disk_usage(self.path.parent).free
        if num_bytes > free:
            raise CheckpointError(
                f"{self._partial}: a version takes {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB "
                "are free"
            )


@contextlib.contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap]:
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as data:
        yield data
