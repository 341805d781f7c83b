"""The journal: durable rollouts in one SQLite file (docs/explain/journal.md)."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Self

import apsw
from msgspec.structs import replace

from ..config import JournalConfig
from ..errors import InvalidTrajectory, JournalError, JournalFull
from ..rollout import Rollout, RolloutState
from ..trajectory import decode, unpack
from . import files
from .draft import Draft, load_memory, rows_of
from .merge import Compaction
from .ops import Accept, Ack, Append, Op, Query, Recovered, Summary, grow
from .rows import DamagedRecord, Entry, TokenRow, checksum

# pages of the WAL after which it is written into the file
_CHECKPOINT_PAGES = 1000
# how long one call of `compact` holds up commits
_COMPACT_S = 0.05


class Journal:
    """A `JournalStore` in a file. One process at a time, one thread at a time."""

    def __init__(
        self,
        path: str,
        config: JournalConfig,
        db: apsw.Connection,
        lock: files.OwnerFile | None,
        clock: Callable[[], float],
    ) -> None:
        """Use `Journal.open`."""
        self._path, self._config, self._db, self._lock = path, config, db, lock
        self._clock = clock
        self._pid = os.getpid()
        self._failure: str | None = None
        self._synchronous = ""
        self._wal_pages = 0
        self._db.set_wal_hook(self._note_wal_pages)
        with files.translated(path):
            self._memory = load_memory(db)
            self._num_bytes = files.used_bytes(db)
        if lock is not None:
            lock.check(self._memory.books)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: JournalConfig | None = None,
        *,
        vfs: str | None = None,
        is_read_only: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open or make the file, and verify its records (trajectories when they are read).

        Raises JournalError: foreign file, newer schema, damaged record, no way to write, or
        another owner (named by its pid). The file is then left as it is.

        vfs           of SQLite, for the crash harness; no lock file is made then
        is_read_only  nothing is written, not even the lock; the caller sees to it that nobody
                      else writes
        """
        path = os.fspath(path)
        lock = None
        if vfs is None:
            # first, since to open and close a file drops the locks that this process has on it
            files.check_unowned(path)
            files.check_header(path)
            lock = None if is_read_only else files.OwnerFile(path)
        try:
            db = files.connect(path, vfs=vfs, is_read_only=is_read_only)
            try:
                return cls(path, config or JournalConfig(), db, lock, clock)
            except BaseException:
                db.close(True)
                raise
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    def close(self) -> None:
        """Write the WAL into the file and let go of it. Idempotent; after a failure just let go."""
        try:
            if self._failure is None:
                self._failure = f"journal {self._path}: closed"
                with files.translated(self._path):
                    files.finish(self._db)
        finally:
            self._db.close(True)
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    # --- what it knows -----------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def schema(self) -> int:
        """Number of its schema: ours, but of an older file that is only read."""
        return files.schema_of(self._db)

    @property
    def num_budgets(self) -> int:
        return len(self._memory.budgets.by_id)

    @property
    def num_rollouts(self) -> int:
        return self._memory.num_unacked

    def recover(self) -> Recovered:
        self._check_usable()
        memory, now_s = self._memory, self._clock()
        live: dict[int, Rollout] = {}
        with files.translated(self._path):
            for entry in memory.entries.values():
                if entry.is_live:
                    live[entry.number] = self._trajectory(entry)
            self._grow(live, memory.low_row)
        return Recovered(
            live=[*live.values()],
            is_all_paused=memory.books.is_all_paused,
            keys=[
                (known.key, [*known.rollout_ids])
                for known in memory.keys.values()
                if known.key.created_s + self._config.retain_keys_s > now_s
            ],
            flip=memory.books.flip,
            num_accepted=memory.books.num_accepted,
            flips=list(memory.flips),
            budgets=[replace(row.budget) for row in memory.budgets.by_id.values()],
        )

    def read(self, rollout_id: str) -> Rollout | None:
        self._check_usable()
        entry = self._memory.entries.get(rollout_id)
        if entry is None or entry.acked_s is not None:
            return None
        with files.translated(self._path):
            rollout = self._trajectory(entry)
            if entry.is_live:
                first_row = self._memory.first_rows.get(entry.number, self._memory.books.next_row)
                self._grow({entry.number: rollout}, first_row)
        return rollout

    def summary(self, rollout_id: str) -> Summary | None:
        self._check_usable()
        entry = self._memory.entries.get(rollout_id)
        return None if entry is None else entry.summary()

    def check(self) -> list[str]:
        """Reads everything; a line for each record that is not what was written."""
        self._check_usable()
        found: list[str] = []
        for entry in self._memory.entries.values():
            if entry.acked_s is None:
                try:
                    self._trajectory(entry)
                except (DamagedRecord, apsw.Error) as error:
                    found.append(str(error))
        try:
            load_memory(self._db)
            lines = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check(20)")]
            found += [f"integrity_check: {line}" for line in lines if line != "ok"]
        except (DamagedRecord, apsw.Error) as error:
            found.append(str(error))
        return found

    def list(self, query: Query) -> list[Summary]:
        self._check_usable()
        by_number = self._memory.by_number
        first = max(query.after + 1, next(iter(by_number), 1))
        matching = (
            entry.summary()
            for number in range(first, self._memory.books.next_rollout)
            if (entry := by_number.get(number)) is not None
            and query.state in (None, entry.state)
            and query.group_id in (None, entry.group_id)
            and query.pool in (None, entry.pool)
        )
        return [*islice(matching, query.limit)]

    # --- what it is told ---------------------------------------------------------------

    def commit(self, ops: Sequence[Op]) -> None:
        self._check_usable()
        is_growth = all(isinstance(op, Append) for op in ops)
        with self._writing(is_growth=is_growth):
            draft = Draft(self._db, self._memory, self._config, self._clock())
            with files.transaction(self._db):
                for op in ops:
                    if isinstance(op, Accept):
                        self._check_room()
                    draft.apply(op)
                draft.write()
                num_bytes = files.used_bytes(self._db)
            draft.take_over()
            self._num_bytes = num_bytes
            self._note()
        self._checkpoint()

    def compact(self, *, is_thorough: bool = False) -> bool:
        """A part of the work, for 50 ms and a slice; is_thorough: all there is. True: more is left.

        Forgets tombstones and keys whose time is over, rewrites rows of tokens that mostly hold
        ended rollouts, and gives free pages back to the file system.
        """
        self._check_usable()
        if unread := self._memory.unread(self._clock() - self._config.retain_keys_s):
            self.commit([Ack(unread)])
        with self._writing(is_growth=True):
            compaction = Compaction(
                self._db, self._memory, self._config, self._clock(), is_thorough=is_thorough
            )
            until_s = time.monotonic() + _COMPACT_S
            while is_more := compaction.work():
                if not is_thorough and time.monotonic() > until_s:
                    break
            self._num_bytes = files.used_bytes(self._db)
            self._note()
        self._checkpoint()
        return is_more

    def _check_room(self) -> None:
        if self._num_bytes <= self._config.max_bytes:
            return
        waiting = [
            entry.ended_s or 0.0
            for entry in self._memory.entries.values()
            if not entry.is_live and entry.acked_s is None
        ]
        since = f", the oldest since {datetime.fromtimestamp(min(waiting), UTC)}" if waiting else ""
        raise JournalFull(
            f"journal {self._path}: {self._num_bytes} bytes, the limit is {self._config.max_bytes} "
            f"(max_bytes); {len(waiting)} finished rollouts wait for acknowledgement{since}"
        )

    # --- helpers -----------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise JournalError(self._failure)
        if os.getpid() != self._pid:
            raise JournalError(f"journal {self._path}: opened before a fork; open it in the child")

    @contextlib.contextmanager
    def _writing(self, *, is_growth: bool) -> Iterator[None]:
        """Under the level that such a commit asks for; a fault of the file ends it for good.

        FULL waits for the disk at COMMIT, NORMAL at checkpoints only: a kill then loses nothing,
        a power loss the newest commits. Under the level `accepts` new tokens may be lost so: under
        the same weights they are sampled again, to the bit.
        """
        durability = self._config.durability
        is_full = durability == "power" or (durability == "accepts" and not is_growth)
        try:
            with files.translated(self._path, self._db):
                self._set_synchronous("FULL" if is_full else "NORMAL")
                yield
        except JournalFull:
            raise
        except JournalError as error:
            self._failure = str(error)
            raise

    def _set_synchronous(self, level: str) -> None:
        if level != self._synchronous:
            self._db.execute(f"PRAGMA synchronous = {level}")
            self._synchronous = level

    def _note(self) -> None:
        if self._lock is not None:
            self._lock.note(self._memory.books, is_synced=self._synchronous == "FULL")

    def _note_wal_pages(self, _db: apsw.Connection, _name: str, count: int) -> int:
        self._wal_pages = count
        return apsw.SQLITE_OK

    def _checkpoint(self) -> None:
        """Write a long WAL into the file.

        What was committed is durable without it, so nothing is raised here: a full disk means that
        it is tried again later, any other fault that the next call fails.
        """
        if self._wal_pages < _CHECKPOINT_PAGES:
            return
        try:
            with files.translated(self._path, self._db):
                self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            self._wal_pages = 0
        except JournalFull:
            self._wal_pages = 0
        except JournalError as error:
            self._failure = str(error)

    def _trajectory(self, entry: Entry) -> Rollout:
        """What the table `rollouts` has of it; raises DamagedRecord."""
        rows: Any = self._db.execute(files.SQL["trajectory"], (entry.number,)).fetchall()
        if len(rows) != 1 or checksum("trajectory", rows[0][0]) != entry.digest:
            raise DamagedRecord("rollouts", entry.number, "its trajectory is not what was written")
        try:
            rollout = unpack(decode(rows[0][0]))
        except InvalidTrajectory as error:
            raise DamagedRecord("rollouts", entry.number, str(error)) from None
        if entry.is_live:
            rollout.state = RolloutState(entry.state)
        return rollout

    def _grow(self, live: dict[int, Rollout], first_row: int) -> None:
        """Add what the table `tokens` has of them."""
        origins = {number: origin for origin, number in self._memory.origins.items()}
        rows = rows_of(self._db, "tokens", first_row, self._memory.books.next_row)
        for row in map(TokenRow.of, rows):
            for number, grown, rest in row.entries():
                rollout = live.get(number)
                if rollout is None:
                    continue
                grown.start = len(rollout.output_ids)
                time_s = 0.0
                if rest is not None:
                    time_s = rest.first_token_s or 0.0
                    grown.num_cached_tokens = rest.num_cached_tokens
                    grown.extra = None if rest.extra is None else rest.extra.unpacked()
                grow(rollout, origins[row.origin], grown, time_s)
        for number, rollout in live.items():
            entry = self._memory.by_number[number]
            if len(rollout.output_ids) != entry.num_tokens + entry.num_appended:
                raise DamagedRecord("tokens", "-", f"rows of rollout {rollout.id} are missing")
