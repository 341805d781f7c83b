"""The memory of versions: a version that fell out gives its file to the next one, which is written over
it through a map that stays from version to version. Torch-free.

To make a page of a tmpfs, to clear it and to map it takes several times as long as to fill it, so it is
done once. A file is written over only if it is in memory (there a map of pages that exist cannot
fail), was made by this process (of no other is it known that it has ended), has no other name, and is
not read by anybody (engine/checkpoint/reader_locks.py).
"""

import contextlib
import mmap
import os
import shutil
import threading
import weakref
from pathlib import Path

from ...engine.checkpoint.reader_locks import is_in_memory, is_read

FILE = "model.safetensors"
PARTIAL = ".partial-"
SPARE = ".spare-"
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system


class OpenFile:
    """A file of weights, open for writing as long as anybody has this object.

    fd     its descriptor
    pages  its bytes, where all of them have a place; else None: to write makes it
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.pages: mmap.mmap | None = None
        weakref.finalize(self, os.close, fd)

    def map(self) -> None:
        status = os.fstat(self.fd)
        is_whole = 0 < status.st_size <= status.st_blocks * _BLOCK_BYTES
        if self.pages is None and is_whole and is_in_memory(self.fd):
            # without address space for it, it is written as new files are
            with contextlib.suppress(OSError):
                self.pages = mmap.mmap(self.fd, status.st_size)


class Pages:
    """The files under `root` of this process's versions; safe for threads.

    The process that begins versions and finishes them decides what becomes of a file; others that
    write to them, ranks of the same trainer, find them by their paths.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._files: dict[tuple[int, int], OpenFile] = {}
        """By device and number, which nothing else has while it is open."""
        self._spare: Path | None = None

    def open(self, path: Path) -> OpenFile:
        """The file that `path` is now. Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        status = os.fstat(fd)
        with self._lock:
            self._let_go()
            file = self._files.get((status.st_dev, status.st_ino))
            if file is None:
                file = self._files[status.st_dev, status.st_ino] = OpenFile(fd)
            else:
                os.close(fd)
            file.map()
        return file

    def take(self, target: Path, num_bytes: int) -> bool:
        """Put a file of that size whose pages are there at `target`, if there is one; its bytes are
        those of an older version. Raises OSError."""
        spare, self._spare = self._spare, None
        if spare is None:
            return False
        file = self._known(spare / FILE)
        is_free = False
        if file is not None:
            status = os.fstat(file.fd)
            is_free = status.st_size == num_bytes and status.st_nlink == 1 and not is_read(file.fd)
        if is_free:
            (spare / FILE).rename(target)
        self.remove(spare)
        return is_free

    def retire(self, folder: Path) -> None:
        """The version in it is there no longer, all at once. Its file waits to be written over if it
        can be; one that is read now may be free by then."""
        spare = folder.with_name(f"{SPARE}{folder.name}")
        try:
            folder.rename(spare)
        except FileNotFoundError:
            return
        except OSError:
            self.remove(folder)
            return
        file = self._known(spare / FILE)
        if self._spare is None and file is not None and is_in_memory(file.fd):
            self._spare = spare
            for other in spare.iterdir():
                if other.name != FILE:
                    other.unlink(missing_ok=True)
        else:
            self.remove(spare)

    def clean(self) -> None:
        """What was never finished goes, and what waited for another process."""
        for folder in (*self.root.glob(f"{PARTIAL}*"), *self.root.glob(f"{SPARE}*")):
            if folder != self._spare:
                self.remove(folder)

    def remove(self, folder: Path) -> None:
        """With the memory that it takes, but for what others have mapped of it."""
        shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            self._let_go()

    def close(self) -> None:
        """Versions stay, and nothing else."""
        if self._spare is not None:
            shutil.rmtree(self._spare, ignore_errors=True)
        self._spare = None
        with self._lock:
            self._files.clear()

    def _known(self, path: Path) -> OpenFile | None:
        try:
            status = path.stat()
        except OSError:
            return None
        with self._lock:
            return self._files.get((status.st_dev, status.st_ino))

    def _let_go(self) -> None:
        """Of files that have no name any more: only we would keep their memory."""
        for key, file in list(self._files.items()):
            if not os.fstat(file.fd).st_nlink:
                del self._files[key]


def clean(root: Path) -> None:
    """Of a process that has ended: all but its versions goes."""
    Pages(root).clean()
