"""The output file of a batch: whole lines only, one per id, whatever was killed on the way.

open      lock it, cut a torn last line, learn which ids are there (and with which fingerprint)
append    one record, one write; synced every few seconds and at the end
a retry   writes the file anew without its error records, and puts it in place by one rename
"""

import errno
import fcntl
import hashlib
import os
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct

from ...engine.errors import ConfigError

SYNC_EVERY_S = 5.0
# how every record of ours begins: what has not this beginning is not ours to repair
RECORD_START = b'{"id":"batch_req_'


class _Body(Struct):
    system_fingerprint: str | None = None


class _Response(Struct):
    body: _Body


class _Record(Struct):
    """What a resumed run needs of a record."""

    custom_id: str
    response: _Response | None = None
    error: Any = None


decode_record = msgspec.json.Decoder(_Record).decode


class IdSet:
    """A set of ids by 64-bit hashes, in one flat array: 16-32 bytes an id at most.

    Two of a million ids share a hash once in 40 million runs.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, custom_id: str) -> bool:
        key = _hash(custom_id)
        return self._slots[self._find(key)] == key

    def add(self, custom_id: str) -> bool:
        """Put it in; False if it was there."""
        key = _hash(custom_id)
        index = self._find(key)
        if self._slots[index] == key:
            return False
        self._slots[index] = key
        self._count += 1
        if 2 * self._count > len(self._slots):
            self._grow()
        return True

    def _find(self, key: int) -> int:
        """The slot that holds the key, or the empty one where it belongs."""
        mask = len(self._slots) - 1
        index = key & mask
        while self._slots[index] not in (0, key):
            index = (index + 1) & mask
        return index

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(8 * 2 * len(old)))
        for key in old:
            if key:
                self._slots[self._find(key)] = key


def _hash(custom_id: str) -> int:
    digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    # 0 marks an empty slot
    return int.from_bytes(digest, "little") or 1


class BatchOutput:
    """The file, open, locked and repaired; `ids` are those that have their line."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if it is locked, not ours, or cannot be written."""
        self.path = path
        self.ids = IdSet()
        self.num_errors = 0
        """Error records among them."""
        self.fingerprint: str | None = None
        """Of the first answered record: what it was made with."""
        self.is_synced = True
        """Whether every record is on the disk."""
        self._clock = clock
        self._synced_s = clock()
        self._fd = _open_locked(path)
        try:
            self._size = self._repair()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, record: bytes) -> None:
        """Add one record (without its newline). Raises ConfigError when the disk is full."""
        line = memoryview(record + b"\n")
        written = 0
        try:
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise _translated(error, self.path) from None
        self._size += written
        self.is_synced = False
        if self._clock() - self._synced_s >= SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._fd)
        self._synced_s = self._clock()
        self.is_synced = True

    def close(self) -> None:
        """Sync, and give the lock back."""
        self.sync()
        os.close(self._fd)

    def drop_errors(self) -> int:
        """Write the file anew without its error records; returns how many there were."""
        if not self.num_errors:
            return 0
        scratch = self.path.with_name(f"{self.path.name}.retry")
        try:
            # the new file is locked before it has the name: at no moment is the name unlocked
            fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ids = IdSet()
            with os.fdopen(os.dup(fd), "wb") as copy, self._lines() as lines:
                for line in lines:
                    record = decode_record(line)
                    if record.error is None:
                        copy.write(line)
                        ids.add(record.custom_id)
            os.fsync(fd)
            os.replace(scratch, self.path)
        except OSError as error:
            raise _translated(error, self.path) from None
        os.close(self._fd)
        dropped, self.num_errors = self.num_errors, 0
        self.ids, self._fd = ids, fd
        self._size = os.fstat(fd).st_size
        return dropped

    def _repair(self) -> int:
        """Read what is there, cut what a kill left half written; returns the size."""
        size = 0
        with self._lines() as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    self._check_ours(line, number)
                    os.ftruncate(self._fd, size)
                    break
                self._take(line, number)
                size += len(line)
        return size

    def _take(self, line: bytes, number: int) -> None:
        try:
            record = decode_record(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise _foreign(self.path, number) from None
        if not self.ids.add(record.custom_id):
            raise ConfigError(
                f"{self.path}: line {number} repeats the custom_id {record.custom_id!r}; "
                "name another output, or remove the line"
            )
        if record.error is not None:
            self.num_errors += 1
        elif self.fingerprint is None and record.response is not None:
            self.fingerprint = record.response.body.system_fingerprint

    def _check_ours(self, tail: bytes, number: int) -> None:
        length = min(len(tail), len(RECORD_START))
        if tail[:length] != RECORD_START[:length]:
            raise _foreign(self.path, number)

    def _lines(self) -> BinaryIO:
        return open(self.path, "rb", buffering=1 << 20)


def _foreign(path: Path, number: int) -> ConfigError:
    return ConfigError(
        f"{path}: line {number} is no batch record; name a new output, or an earlier run's"
    )


def _open_locked(path: Path) -> int:
    """A descriptor that holds the lock of the file that has this name."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _translated(error, path) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a retry may have put another file in its place since
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                return fd
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(
                f"{path}: another process is writing it; wait for that one, or name another output"
            ) from None
        except FileNotFoundError:
            pass
        os.close(fd)


def _translated(error: OSError, path: Path) -> ConfigError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(
            f"{path}: no space left on the disk; what is written is whole: make room and run the "
            "same command again"
        )
    return ConfigError(f"{path} cannot be written: {error.strerror}")
