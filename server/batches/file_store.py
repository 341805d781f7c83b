"""Files that clients sent or may fetch: in one folder, whole or not at all.

    ID          the content
    ID.json     its description, written last: what has none is not there

A kill leaves at most a content without description; it is removed at the next start.
"""

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from ...engine.errors import EverstepError
from ...engine.journal.files import sync_folder
from .wire import FileObject, Purpose

T = TypeVar("T", bound=Struct)
_NAME = re.compile(r"file-[0-9a-f]{32}")


class UnknownFile(EverstepError):
    """No file has this id."""

    code = "file_not_found"
    status = 404


class FilesUnusable(EverstepError):
    """The folder of files cannot be used."""

    code = "files_unusable"
    status = 503


class FileStore:
    """Owns the folder. Nothing in it is trusted to be there: a lost file is an unknown one."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock

    def open(self) -> None:
        """Make the folder, and remove what a kill left half written. Raises FilesUnusable."""
        with writing(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._folder.glob("file-*"):
                if path.suffix == ".part" or not path.with_suffix(".json").exists():
                    path.unlink(missing_ok=True)

    def add(
        self, parts: Iterable[bytes], filename: str, purpose: Purpose, *, file_id: str | None = None
    ) -> FileObject:
        """Keep a file; on return it is on the disk. An id that is there already is written anew.

        Raises FilesUnusable where the disk has no room; nothing is kept then.
        """
        file_id = file_id or f"file-{uuid.uuid4().hex}"
        path, size = self._folder / file_id, 0
        part = path.with_suffix(f".{uuid.uuid4().hex}.part")
        with writing(self._folder):
            try:
                with open(part, "wb") as out:
                    for piece in parts:
                        out.write(piece)
                        size += len(piece)
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(part, path)
                found = FileObject(
                    id=file_id,
                    bytes=size,
                    created_at=int(self._clock()),
                    filename=filename,
                    purpose=purpose,
                )
                write_whole(path.with_suffix(".json"), found)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return found

    def get(self, file_id: str) -> FileObject:
        """Its description; raises UnknownFile."""
        if _NAME.fullmatch(file_id):
            found = read_whole(self._folder / f"{file_id}.json", FileObject)
            if found is not None:
                return found
        raise UnknownFile(f"no file has the id {file_id!r}")

    def path(self, file_id: str) -> Path:
        """Where its content is; raises UnknownFile."""
        self.get(file_id)
        return self._folder / file_id

    def list(self) -> list[FileObject]:
        """Oldest first."""
        found = [read_whole(path, FileObject) for path in self._folder.glob("file-*.json")]
        return sorted((f for f in found if f is not None), key=lambda f: (f.created_at, f.id))

    def remove(self, file_id: str) -> None:
        """Raises UnknownFile."""
        path = self.path(file_id)
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def write_whole(path: Path, value: Struct) -> None:
    """Put a JSON file in its place by one rename, synced."""
    part = path.with_suffix(".part")
    with open(part, "wb") as out:
        out.write(msgspec.json.encode(value))
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)
    sync_folder(path)


def read_whole(path: Path, kind: type[T]) -> T | None:
    """What `write_whole` wrote; None where there is nothing, or not that."""
    with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.json.decode(path.read_bytes(), type=kind)
    return None


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """An OSError in our words."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on the disk; nothing was kept" if full else error.strerror
        raise FilesUnusable(f"{folder} cannot be written: {reason}") from None
