"""A front's disk: what of its journal is there after a crash.

`FastDisk` keeps the states that a journal in memory went through; `SqliteDisk` is the real file
over the file system of tests/engine/journal, which loses, tears and reorders sectors. Both promise
what a durability level promises, and not more: a commit that was not synced may be gone.
"""

import random
from collections.abc import Callable, Sequence
from typing import Protocol

import apsw
import msgspec

from everstep.engine.config import JournalConfig
from everstep.engine.errors import JournalFull
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.memory import MemoryJournal, _State
from everstep.engine.journal.ops import Append, JournalStore, Op, Query
from tests.engine.journal.disk import Change, Disk, DiskVFS, Files, after_kill, after_power_loss
from tests.engine.journal.disk import vfs as _vfs

Clock = Callable[[], float]


class SimDisk(Protocol):
    """is_full: there is room for nothing."""

    is_full: bool
    config: JournalConfig

    def open(self) -> JournalStore:
        """The journal, as the last crash left it."""

    def crash(self, *, is_power: bool, in_commit: bool) -> None:
        """Who had it open is gone. in_commit: in the middle of the newest commit."""

    def lengths(self) -> dict[str, int]:
        """Live rollout → tokens, as whoever opens it will find them; counted while it is closed."""


class FastDisk:
    def __init__(self, config: JournalConfig, clock: Clock, rng: random.Random) -> None:
        self.config, self._clock, self._rng = config, clock, rng
        self.is_full = False
        self._store: _FastStore | None = None
        self._state = _State({}, {})
        self._unsynced = [self._state]
        """States that a loss of power may fall back to, the synced one first."""
        self._before = self._state, self._unsynced
        """Both as they were before the newest commit."""

    def open(self) -> JournalStore:
        self._store = _FastStore(self, self.config, self._clock)
        self._store._state = self._state
        self._unsynced = [self._state]
        self._before = self._state, self._unsynced
        return self._store

    def note(self, store: "_FastStore", ops: Sequence[Op]) -> None:
        """A commit came to its end."""
        if store is not self._store:
            return  # of a process that has died
        self._before = self._state, self._unsynced
        self._state = store._state
        level = self.config.durability
        is_growth = all(isinstance(op, Append) for op in ops)
        is_synced = level == "power" or (level == "accepts" and not is_growth)
        self._unsynced = [self._state] if is_synced else [*self._unsynced, self._state]

    def crash(self, *, is_power: bool, in_commit: bool) -> None:
        self._store = None
        state, unsynced = self._before
        if is_power:
            choices = [*unsynced, self._state] if in_commit else self._unsynced
        else:
            choices = [state, self._state] if in_commit else [self._state]
        self._state = self._rng.choice(choices)

    def lengths(self) -> dict[str, int]:
        entries = self._state.entries.values()
        return {
            e.summary.id: e.summary.num_output_tokens for e in entries if not e.summary.is_acked
        }


class _FastStore(MemoryJournal):
    def __init__(self, disk: FastDisk, config: JournalConfig, clock: Clock) -> None:
        super().__init__(config, clock=clock)
        self._disk = disk

    def commit(self, ops: Sequence[Op]) -> None:
        if self._disk.is_full:
            raise JournalFull("journal: the disk is full")
        super().commit(ops)
        self._disk.note(self, ops)

    def compact(self) -> bool:
        if self._disk.is_full:
            raise JournalFull("journal: the disk is full")
        before = self._state
        self._state = msgspec.structs.replace(before)
        is_more = super().compact()
        if self._state != before:
            self._disk.note(self, [])
        return is_more


class SqliteDisk:
    PATH = "journal.db"

    def __init__(self, config: JournalConfig, clock: Clock, rng: random.Random) -> None:
        self.config, self._clock, self._rng = config, clock, rng
        self._files: Files = {}
        self._disk = _FillingDisk()
        self._from = 0
        """Number of changes when the newest commit began."""

    @property
    def is_full(self) -> bool:
        return self._disk.is_full

    @is_full.setter
    def is_full(self, value: bool) -> None:
        self._disk.is_full = value

    def open(self) -> JournalStore:
        is_full = self._disk.is_full
        self._disk = _FillingDisk.of(self._files)
        self._from = 0
        _vfs.disk = self._disk
        store = _SqliteStore.open(self.PATH, self.config, vfs=DiskVFS.NAME, clock=self._clock)
        self._disk.is_full = is_full
        store.disk = self
        return store

    def note(self) -> None:
        """A commit begins."""
        self._from = len(self._disk.log)

    def crash(self, *, is_power: bool, in_commit: bool) -> None:
        log = self._disk.log
        num = self._rng.randint(self._from, len(log)) if in_commit else len(log)
        if is_power:
            self._files = after_power_loss(self._files, log, num, self._rng)
        else:
            self._files = after_kill(self._files, log, num)
        # whoever still holds the old file writes to nowhere
        self._disk = _FillingDisk.of(self._files)

    def lengths(self) -> dict[str, int]:
        _vfs.disk = Disk.of(self._files)
        journal = Journal.open(self.PATH, self.config, vfs=DiskVFS.NAME, clock=self._clock)
        found = {s.id: s.num_output_tokens for s in journal.list(Query(limit=10**6))}
        journal._db.close(True)
        return found


class _FillingDisk(Disk):
    is_full = False

    def change(self, change: Change) -> None:
        if self.is_full and change.kind == "write":
            raise apsw.FullError("no room")
        super().change(change)


class _SqliteStore(Journal):
    """The VFS is one for all: it is told whose files are meant."""

    disk: SqliteDisk

    def commit(self, ops: Sequence[Op]) -> None:
        _vfs.disk = self.disk._disk
        self.disk.note()
        super().commit(ops)

    def compact(self, *, is_thorough: bool = False) -> bool:
        _vfs.disk = self.disk._disk
        return super().compact(is_thorough=is_thorough)

    def close(self) -> None:
        _vfs.disk = self.disk._disk
        super().close()
