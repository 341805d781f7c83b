"""The disk of the machine on which a run is driven: run file, output and spool, as a crash leaves them.

The run file is the real one over what can lose, tear and reorder sectors, or, cheaper, its records
in memory: every commit of it is synced, so a crash leaves it before a commit or behind it. The
output is written by the shipped code, through calls of a system that writes less than it is asked
to and keeps what is synced.
"""

import contextlib
import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import apsw
import msgspec

from everstep.engine.errors import JournalFull
from everstep.rollout.output import RolloutOutput
from everstep.trainer_bridge.run.file import Changes, Key, RunFile
from tests.engine.journal.disk import DiskVFS, Files, after_kill, after_power_loss
from tests.engine.journal.disk import vfs as _vfs

from .disk import _FillingDisk

T = TypeVar("T")
Records = dict[str, dict[Key, bytes]]
OUTPUT = Path("out.jsonl")
RUN = Path("out.jsonl.run")
SECTOR = 512


class DriverDisk:
    """on_commit: called when a commit of the run file came to its end, with what it changed."""

    def __init__(self, rng: random.Random, *, is_sqlite: bool) -> None:
        self.is_full = False
        self.on_commit: Callable[[Changes], None] = lambda _: None
        self.on_write: Callable[[], None] = lambda: None
        self.rng, self._is_sqlite = rng, is_sqlite
        self.spool: dict[int, Any] = {}
        self.serving: Any = None
        self.output = _Bytes()
        self.file: RunFile | None = None
        """Who has it open; whoever else holds one is dead."""
        self.records: Records = {}
        self._before: Records = {}
        self.files: Files = {}
        self.blocks = _FillingDisk()
        self._from = 0
        self._dead: list[RunFile] = []

    def open(self) -> RunFile:
        """The run file, as the last crash left it. Raises JournalFull."""
        if self._is_sqlite:
            self.begin(self.files)
            self.file = SqliteRunFile.on(self)
        else:
            self.file = MemoryRunFile(self)
        return self.file

    def begin(self, files: Files) -> None:
        """Nothing was written since these were all there is."""
        # whoever still holds the old file writes to nowhere, without an error
        self.blocks.is_full = False
        self.files, self.blocks = files, _FillingDisk.of(files)
        self.blocks.is_full = self.is_full
        self._from = 0
        _vfs.disk = self.blocks

    def fill(self, is_full: bool) -> None:
        """There is room for nothing, or for all."""
        self.is_full = self.blocks.is_full = is_full

    def crash(self, *, is_power: bool, in_commit: bool) -> None:
        """Who had it open is gone. in_commit: in the middle of the newest commit."""
        if self.file is not None:
            # it is not to be closed by the collector, which would write
            self._dead.append(self.file)
        self.file = None
        log = self.blocks.log
        num = self.rng.randint(self._from, len(log)) if in_commit else len(log)
        if is_power:
            self.begin(after_power_loss(self.files, log, num, self.rng))
        else:
            self.begin(after_kill(self.files, log, num))
        if in_commit and self.rng.random() < 0.5:
            self.records = self._before
        self.output.crash(self.rng if is_power else None)

    def begins(self) -> None:
        """A commit over SQLite."""
        self._from = len(self.blocks.log)

    def commit(self, changes: Changes) -> None:
        """A commit of records."""
        before = self.records
        after = {kind: dict(found) for kind, found in before.items() if kind not in changes.emptied}
        for (kind, key), body in changes.records.items():
            table = after.setdefault(kind, {})
            if body is None:
                table.pop(key, None)
            else:
                table[key] = body
        self._before, self.records = before, after


class MemoryRunFile(RunFile):
    """Its records in memory."""

    def __init__(self, disk: DriverDisk) -> None:
        self.path, self.changes = RUN, Changes()
        self._disk = disk

    def flush(self) -> None:
        changes, self.changes = self.changes, Changes()
        if not changes or self._disk.file is not self:
            return
        if self._disk.is_full:
            raise JournalFull(f"{self.path}: no space left on the disk")
        self._disk.commit(changes)
        self._disk.on_commit(changes)

    def read(self, kind: str, key: Key, type: type[T]) -> T | None:
        if (kind, key) in self.changes.records:
            body = self.changes.records[kind, key]
        elif kind in self.changes.emptied:
            body = None
        else:
            body = self._disk.records.get(kind, {}).get(key)
        return None if body is None else msgspec.msgpack.decode(body, type=type)

    def records(self, kind: str, type: type[T]) -> Iterator[tuple[Any, T]]:
        for key, body in sorted(self._disk.records.get(kind, {}).items(), key=lambda item: item[0]):
            yield key, msgspec.msgpack.decode(body, type=type)

    def close(self) -> None:
        return None


class SqliteRunFile(RunFile):
    """The real one. The VFS is one for all: it is told whose files are meant."""

    disk: DriverDisk

    @classmethod
    def on(cls, disk: DriverDisk) -> Self:
        file = cls.open(RUN, vfs=DiskVFS.NAME)
        file.disk = disk
        return file

    def flush(self) -> None:
        changes = self.changes
        if self.disk.file is not self:
            self.changes = Changes()
            return
        _vfs.disk = self.disk.blocks
        self.disk.begins()
        super().flush()
        if changes:
            self.disk.on_commit(changes)

    def close(self) -> None:
        """In order, by the one who has it: the next one begins with what is there then."""
        if self.disk.file is self:
            _vfs.disk = self.disk.blocks
            # its log goes into the file at the end, if there is room; SQLite minds that as little
            with contextlib.suppress(apsw.FullError):
                super().close()
            self.disk.file = None
            self.disk.begin(self.disk.blocks.snapshot())


class _Bytes:
    """A file: what readers see, and what is on the disk for certain."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self._synced = b""

    def sync(self) -> None:
        self._synced = bytes(self.seen)

    def crash(self, rng: random.Random | None) -> None:
        """rng: the power went, and of what was not synced some is there."""
        if rng is not None and self.seen != self._synced:
            seen, synced = bytes(self.seen), self._synced
            pairs = zip(seen, synced, strict=False)
            start = next((at for at, (one, other) in enumerate(pairs) if one != other), len(synced))
            start = min(start, len(seen))
            cut = rng.randint(start, len(seen))
            torn = bytearray(seen[:cut])
            at = start + (-start) % SECTOR
            while at < len(torn):
                if rng.random() < 0.3:
                    torn[at : at + SECTOR] = bytes(len(torn[at : at + SECTOR]))
                at += SECTOR
            self.seen = bytearray(rng.choice([seen, synced, bytes(torn)]))
        self.sync()


class SimOutput(RolloutOutput):
    """The shipped one, over a file of the simulation: calls of the system go to `SYSTEM`."""

    def __init__(self, disk: DriverDisk) -> None:
        self.path = self.lines = OUTPUT
        self.is_parquet = False
        self._fd: Any = _Handle(disk)
        self._size = len(disk.output.seen)


class _Handle:
    """An open output; one of a process that has died writes to nowhere."""

    def __init__(self, disk: DriverDisk) -> None:
        self.disk, self._owner = disk, disk.file

    @property
    def is_live(self) -> bool:
        return self.disk.file is self._owner


class _System:
    """What the output asks of the system."""

    def write(self, fd: _Handle, data: memoryview) -> int:
        disk = fd.disk
        if not fd.is_live:
            return len(data)
        if disk.is_full:
            raise OSError(errno.ENOSPC, "no space left on the disk")
        num = disk.rng.choice([len(data), len(data), disk.rng.randint(1, len(data))])
        disk.output.seen += data[:num]
        disk.on_write()
        return num

    def fsync(self, fd: _Handle) -> None:
        if fd.is_live:
            fd.disk.output.sync()

    def ftruncate(self, fd: _Handle, size: int) -> None:
        if fd.is_live:
            del fd.disk.output.seen[size:]

    def close(self, fd: _Handle) -> None:
        return None


SYSTEM = _System()
