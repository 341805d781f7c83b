"""The file in which a run of C3PO++ outlives its process: records by kind and key.

One SQLite file in WAL mode through apsw, every commit synced, locked for as long as it is open.
What an event changes is in one commit, so a process that is killed between any two statements
stands, when it is started again, before the event or behind it. A record carries a checksum of
its own, since SQLite has none.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import apsw
import msgspec
from msgspec import Struct

from ...engine.errors import ConfigError, JournalDamaged, JournalError, JournalFull

T = TypeVar("T")
Key = str | int

APPLICATION_ID = 0x45565352  # "EVSR"
FORMAT = 1
_CHECKSUM_SIZE = 8
_SCHEMA = """
CREATE TABLE records (
  kind TEXT NOT NULL,
  key NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (kind, key)
) WITHOUT ROWID
"""
_PUT = "INSERT OR REPLACE INTO records VALUES (?, ?, ?)"
_DELETE = "DELETE FROM records WHERE kind = ? AND key = ?"
_encode = msgspec.msgpack.Encoder().encode


class Changes:
    """What the next commit does. Of several writes of one record the last one counts."""

    def __init__(self) -> None:
        self.emptied: set[str] = set()
        self.records: dict[tuple[str, Key], bytes | None] = {}

    def __bool__(self) -> bool:
        return bool(self.emptied or self.records)

    def put(self, kind: str, key: Key, value: Struct | str) -> None:
        """Write a record, over one that has this kind and key."""
        self.records[kind, key] = _encode(value)

    def drop(self, kind: str, key: Key) -> None:
        self.records[kind, key] = None

    def drop_all(self, kind: str) -> None:
        self.emptied.add(kind)
        self.records = {name: body for name, body in self.records.items() if name[0] != kind}


class RunFile:
    """The open file. One process at a time, one thread at a time."""

    def __init__(self, path: Path, db: apsw.Connection) -> None:
        """Use `RunFile.open`."""
        self.path = path
        self.changes = Changes()
        """For the next `flush`."""
        self._db = db
        self._pid = os.getpid()

    @classmethod
    def open(cls, path: Path, *, vfs: str | None = None) -> Self:
        """Open the file, or make it.

        Raises ConfigError where another process has it or it cannot be written, JournalError where
        it is no such file, damaged, or of a newer format; it is then left as it is.

        vfs  of SQLite, for tests that crash it
        """
        if vfs is None:
            _check_file(path)
        with _translated(path):
            flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
            db = apsw.Connection(str(path), flags=flags, vfs=vfs)
            try:
                _prepare(db, path)
            except BaseException:
                db.close(True)
                raise
        return cls(path, db)

    def flush(self) -> None:
        """Make `changes` durable, all of them or none. Raises JournalFull, JournalError."""
        assert os.getpid() == self._pid, "a run file does not survive a fork"
        changes, self.changes = self.changes, Changes()
        if not changes:
            return
        with _translated(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for kind in changes.emptied:
                    self._db.execute("DELETE FROM records WHERE kind = ?", (kind,))
                for (kind, key), body in changes.records.items():
                    if body is None:
                        self._db.execute(_DELETE, (kind, key))
                    else:
                        self._db.execute(_PUT, (kind, key, _sealed(body)))
                self._db.execute("COMMIT")
            except BaseException:
                # SQLite may have rolled back by itself (a full disk)
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def read(self, kind: str, key: Key, type: type[T]) -> T | None:
        """A record as the next commit will leave it, or None. Raises JournalDamaged."""
        if (kind, key) in self.changes.records:
            body = self.changes.records[kind, key]
            return None if body is None else msgspec.msgpack.decode(body, type=type)
        if kind in self.changes.emptied:
            return None
        sql = "SELECT body FROM records WHERE kind = ? AND key = ?"
        with _translated(self.path):
            rows = self._db.execute(sql, (kind, key)).fetchall()
        return self._decoded(kind, key, rows[0][0], type) if rows else None

    def records(self, kind: str, type: type[T]) -> Iterator[tuple[Any, T]]:
        """(key, record) of a kind as committed, in order of their keys. Raises JournalDamaged."""
        sql = "SELECT key, body FROM records WHERE kind = ? ORDER BY key"
        with _translated(self.path):
            rows = self._db.execute(sql, (kind,)).fetchall()
        for key, body in rows:
            yield key, self._decoded(kind, key, body, type)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give it back. Idempotent."""
        with contextlib.suppress(apsw.ConnectionClosedError):
            self._db.close()

    def _decoded(self, kind: str, key: Any, sealed: Any, type: type[T]) -> T:
        body = sealed[:-_CHECKSUM_SIZE]
        place = f"{self.path}: damaged: record {kind} {key!r}"
        if _sealed(body) != sealed:
            raise JournalDamaged(f"{place} is not what was written")
        try:
            return msgspec.msgpack.decode(body, type=type)
        except msgspec.MsgspecError as error:
            raise JournalDamaged(f"{place}: {error}") from None


def _sealed(body: bytes) -> bytes:
    return body + hashlib.blake2b(body, digest_size=_CHECKSUM_SIZE).digest()


def _check_file(path: Path) -> None:
    """Raise ConfigError where there is no folder, or no right to write."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder")
    try:
        # it will hold prompts: its owner's alone. SQLite gives its log the same mode
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        # to open and close it here would drop the lock that this process may have on it
        return
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _prepare(db: apsw.Connection, path: Path) -> None:
    db.set_busy_timeout(0)
    db.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)
    for pragma in ("locking_mode = EXCLUSIVE", "synchronous = FULL", "mmap_size = 0"):
        db.execute(f"PRAGMA {pragma}")
    # the lock is taken by the first write, and kept
    db.execute("BEGIN EXCLUSIVE")
    try:
        application, number = _pragma(db, "application_id"), _pragma(db, "user_version")
        if not application and not db.execute("SELECT 1 FROM sqlite_schema").fetchall():
            db.execute(_SCHEMA)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {FORMAT}")
        elif application != APPLICATION_ID:
            raise JournalError(f"{path}: no file of a rollout run; name another output")
        elif number != FORMAT:
            raise JournalError(f"{path}: format {number}; this version of everstep reads {FORMAT}")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
    db.execute("PRAGMA journal_mode = WAL")


def _pragma(db: apsw.Connection, name: str) -> int:
    [[value]] = db.execute(f"PRAGMA {name}").fetchall()
    assert isinstance(value, int)
    return value


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, in one line that names the file."""
    try:
        yield
    except (apsw.BusyError, apsw.LockedError):
        raise ConfigError(
            f"{path}: another process runs with it; wait for that one, or name another output"
        ) from None
    except apsw.FullError:
        raise JournalFull(
            f"{path}: no space left on the disk; what is written is whole: make room and run the "
            "same command again"
        ) from None
    except (apsw.CorruptError, apsw.NotADBError, apsw.FormatError) as error:
        raise JournalDamaged(f"{path}: damaged, or no file of a rollout run: {error}") from None
    except (apsw.ReadOnlyError, apsw.CantOpenError, apsw.PermissionsError) as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None
    except apsw.Error as error:
        raise JournalError(f"{path}: {type(error).__name__}: {error}") from None
