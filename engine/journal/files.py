"""The journal's file: one owner, its pragmas, its schema, and what its faults are called.

SQLite in WAL mode through apsw. One process with one connection reads, writes and checkpoints:
`locking_mode = EXCLUSIVE` keeps the WAL index in its memory, and a lock file beside the journal
names the owner to others. Nothing is mapped into memory. Checkpoints are made by us, since SQLite
would swallow the error of a failed fsync in one of its own.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw
import msgspec
from msgspec import Struct

from ..errors import JournalDamaged, JournalError, JournalFull
from .named_sql import load
from .rows import Books, DamagedRecord

APPLICATION_ID = 0x45565354  # "EVST"
SCHEMA = 4
_MAGIC = b"SQLite format 3\0"
_FOLDER = Path(__file__).parent
SQL = load(_FOLDER / "queries.sql")
PAGE_SIZE = 4096
_TABLES = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name"


class OwnerFile:
    """`PATH-lock`: a lock that names its owner's pid, and a note of how far the journal got.

    SQLite takes a damaged record of its WAL for the end of the log: commits would be missing and
    nobody would know. The note, written after each commit, knows. It is never synced: after a
    restart of the machine it may be old, but of the commits that it calls synced none may be
    missing. The lock ends with the process.
    """

    def __init__(self, path: str) -> None:
        self._journal, self._path = path, f"{path}-lock"
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"journal {path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            in_use = _owned(path, self._file)
            os.close(self._file)
            raise in_use from None
        self._boot = _boot_id()
        self._note = _Note("", "", 0, 0)
        self._read_note()
        os.pwrite(self._file, f"{os.getpid()}\n".encode().ljust(_NOTE_AT, b"\n"), 0)

    def check(self, books: Books) -> None:
        """Raise JournalError if commits are missing that the note knows of."""
        note = self._note
        least = note.num_commits if note.boot and note.boot == self._boot else note.num_synced
        if note.uid == books.uid and books.num_commits < least:
            raise JournalDamaged(
                f"journal {self._journal}: damaged: the last {least - books.num_commits} commits "
                f"are missing; remove {self._path} to go on without them"
            )
        num_synced = note.num_synced if note.uid == books.uid else 0
        self._note = _Note(books.uid, self._boot, books.num_commits, num_synced)

    def note(self, books: Books, *, is_synced: bool) -> None:
        """The books are committed; is_synced: and will survive a loss of power."""
        note = self._note
        note.num_commits = books.num_commits
        if is_synced:
            note.num_synced = books.num_commits
        data = msgspec.msgpack.encode(note)
        # without room the note is old, which only weakens it
        with contextlib.suppress(OSError):
            os.pwrite(self._file, _digest(data) + len(data).to_bytes(2, "little") + data, _NOTE_AT)

    def release(self) -> None:
        """The file stays: to remove it would let two owners lock two files of one name."""
        os.close(self._file)

    def _read_note(self) -> None:
        data = os.pread(self._file, 1024, _NOTE_AT)
        body = data[10 : 10 + int.from_bytes(data[8:10], "little")]
        if body and _digest(body) == data[:8]:
            self._note = msgspec.msgpack.decode(body, type=_Note)


def check_unowned(path: str) -> None:
    """Raise JournalError if a process has the journal open; nothing is written."""
    try:
        file = os.open(f"{path}-lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        raise _owned(path, file) from None
    finally:
        os.close(file)


def _owned(path: str, file: int) -> JournalError:
    owner = os.pread(file, 20, 0).split(b"\n")[0].decode(errors="replace") or "unknown"
    return JournalError(f"journal {path}: in use by process {owner}; stop it, or use another file")


class _Note(Struct, array_like=True):
    uid: str
    boot: str
    """A start of the machine; "" where it has no name."""
    num_commits: int
    num_synced: int


_NOTE_AT = 32


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def check_header(path: str) -> None:
    """Raise JournalError for a file that is no journal of ours, before SQLite could touch it."""
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        return
    except OSError as error:
        raise JournalError(f"journal {path}: cannot be read: {error.strerror}") from None
    if not head or os.path.exists(f"{path}-journal"):
        return  # not yet made, or its making was interrupted
    if len(head) < 100 or not head.startswith(_MAGIC):
        raise JournalError(f"journal {path}: not a journal (no SQLite file); it is left as it is")
    check_identity(path, int.from_bytes(head[68:72], "big"), int.from_bytes(head[60:64], "big"))


def check_identity(path: str, application_id: int, schema: int) -> None:
    """Raise JournalError for another program's database, or a newer schema than ours."""
    if application_id != APPLICATION_ID:
        raise JournalError(
            f"journal {path}: not a journal (SQLite application id {application_id:#x}, "
            f"expected {APPLICATION_ID:#x}); it is left as it is"
        )
    if schema < 1:
        raise JournalDamaged(f"journal {path}: damaged: its schema number is {schema}")
    if schema > SCHEMA:
        raise JournalError(
            f"journal {path}: schema {schema}, this version of everstep knows {SCHEMA}; "
            "use a newer one"
        )


def connect(path: str, *, vfs: str | None = None, is_read_only: bool = False) -> apsw.Connection:
    """An open connection with our pragmas; raises JournalError. A missing file is made."""
    name, flags = path, apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    if is_read_only:
        flags = apsw.SQLITE_OPEN_READONLY
        if not os.path.exists(f"{path}-wal"):
            # without a WAL nothing need be made beside the file, not even for locks
            name, flags = f"file:{quote(path)}?immutable=1", flags | apsw.SQLITE_OPEN_URI
    elif vfs is None:
        _make_private(path)
    with translated(path):
        db = apsw.Connection(name, flags=flags, vfs=vfs)
        try:
            # an error on the way must leave the file as it was: no checkpoint at close
            db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            db.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
            db.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)
            db.wal_autocheckpoint(0)
            db.set_busy_timeout(0)
            pragmas = ["cell_size_check = ON", "mmap_size = 0", "temp_store = MEMORY"]
            if sys.platform == "darwin":
                pragmas += ["fullfsync = ON", "checkpoint_fullfsync = ON"]
            if not is_read_only:
                pragmas.append("locking_mode = EXCLUSIVE")
            for pragma in pragmas:
                db.execute(f"PRAGMA {pragma}")
            if not is_read_only:
                _prepare(db, path, is_real_file=vfs is None)
            check_identity(path, _pragma(db, "application_id"), _pragma(db, "user_version"))
            _check_schema(db, path)
        except BaseException:
            db.close(True)
            raise
    return db


def _make_private(path: str) -> None:
    """A file that is not there yet is its owner's alone: it will hold prompts. SQLite gives its
    log the same mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise JournalError(f"journal {path}: cannot be written: {error.strerror}") from None


def _prepare(db: apsw.Connection, path: str, *, is_real_file: bool) -> None:
    """Make the tables of a new file, bring an older schema up to date, switch to WAL."""
    db.execute("PRAGMA synchronous = FULL")
    is_new = not db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
    if is_new and _pragma(db, "application_id") in (0, APPLICATION_ID):
        # in rollback mode, so that the file has its identity before there ever is a WAL
        db.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        with transaction(db):
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            _migrate(db, 0)
            db.execute(SQL["put-books"], Books(uid=os.urandom(8).hex()).columns())
        if is_real_file:
            sync_folder(path)
    check_identity(path, _pragma(db, "application_id"), _pragma(db, "user_version"))
    if (schema := _pragma(db, "user_version")) < SCHEMA:
        with transaction(db):
            _migrate(db, schema)
    [[mode]] = db.execute("PRAGMA journal_mode = WAL").fetchall()
    if mode != "wal":
        raise JournalError(f"journal {path}: this place has no write-ahead log (mode {mode})")


def _migrate(db: apsw.Connection, schema: int, to: int = SCHEMA) -> None:
    for number in range(schema + 1, to + 1):
        db.execute((_FOLDER / f"schema_{number}.sql").read_text(encoding="utf-8"))
    db.execute(f"PRAGMA user_version = {to}")


def schema_of(db: apsw.Connection) -> int:
    """Ours, but of an older file that is only read."""
    return _pragma(db, "user_version")


def _check_schema(db: apsw.Connection, path: str) -> None:
    """The tables must be the ones that the migrations make: SQLite trusts their text."""
    if db.execute(_TABLES).fetchall() != _expected_tables(schema_of(db)):
        raise JournalDamaged(f"journal {path}: damaged: table sqlite_schema: not our schema")


@functools.cache
def _expected_tables(schema: int) -> list[tuple[Any, ...]]:
    with contextlib.closing(apsw.Connection(":memory:")) as model:
        _migrate(model, 0, schema)
        return model.execute(_TABLES).fetchall()


@contextlib.contextmanager
def transaction(db: apsw.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE … COMMIT; ROLLBACK on any error."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # SQLite may have rolled back by itself (a full disk)
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def translated(path: str, db: apsw.Connection | None = None) -> Iterator[None]:
    """SQLite's errors and damaged records as ours, in one line that names the file.

    db  asked why the last write failed: a quota is no more than a disk that is full
    """
    try:
        yield
    except (DamagedRecord, UnicodeDecodeError) as error:
        raise JournalDamaged(f"journal {path}: damaged: {_one_line(error)}") from None
    except apsw.FullError:
        raise JournalFull(
            f"journal {path}: the disk is full; what was accepted is kept and written when there "
            "is room"
        ) from None
    except (apsw.CorruptError, apsw.NotADBError, apsw.FormatError) as error:
        raise JournalDamaged(f"journal {path}: damaged: {_one_line(error)}") from None
    except (apsw.ReadOnlyError, apsw.CantOpenError, apsw.PermissionsError) as error:
        raise JournalError(f"journal {path}: cannot be written: {error}") from None
    except (apsw.BusyError, apsw.LockedError):
        raise JournalError(f"journal {path}: in use by another process") from None
    except (apsw.IOError, apsw.Error) as error:
        if db is not None and _is_over_quota(error, db):
            raise JournalFull(
                f"journal {path}: the disk quota is used up; what was accepted is kept and written "
                "when there is room"
            ) from None
        raise JournalError(f"journal {path}: {type(error).__name__}: {_one_line(error)}") from None


def _is_over_quota(error: apsw.Error, db: apsw.Connection) -> bool:
    """SQLite knows a full disk and takes a quota for a broken one. Of a sync that fails nobody
    knows what it wrote, so that it stays a fault."""
    is_write = getattr(error, "extendedresult", None) == apsw.SQLITE_IOERR_WRITE
    return is_write and db.system_errno == errno.EDQUOT


def _one_line(error: Exception) -> str:
    """SQLite quotes the SQL that it stumbled over."""
    return " ".join(str(error).split())[:200]


def _pragma(db: apsw.Connection, name: str) -> int:
    value: Any = db.execute(f"PRAGMA {name}").fetchall()[0][0]
    return int(value)


def pages(db: apsw.Connection) -> tuple[int, int]:
    """How many the file has, and how many of them are free."""
    return _pragma(db, "page_count"), _pragma(db, "freelist_count")


def used_bytes(db: apsw.Connection) -> int:
    """Of pages that hold something; free ones are used again."""
    num_pages, num_free = pages(db)
    return (num_pages - num_free) * PAGE_SIZE


def finish(db: apsw.Connection) -> None:
    """Write the WAL into the file and remove it."""
    if not db.readonly("main"):
        db.execute("PRAGMA synchronous = FULL")
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make the name of a new file durable."""
    file = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
