"""A disk that can lose power: SQLite's files in memory, behind a VFS of apsw.

Every change is one entry of a log. What the disk holds after a crash is built from the log: all of
it up to some entry if only the process died; if the power went, what was synced, and of the rest
any sectors of 512 bytes, so that writes are lost, torn and reordered.
"""

import random
from dataclasses import dataclass, field

import apsw

SECTOR = 512
Files = dict[str, bytes]


@dataclass
class Change:
    """kind: write, truncate, sync, delete (synced or not), create."""

    kind: str
    name: str
    offset: int = 0
    data: bytes = b""
    is_synced: bool = False


@dataclass
class Disk:
    """The files as the process sees them, and the log of how they became so."""

    files: dict[str, bytearray] = field(default_factory=dict)
    log: list[Change] = field(default_factory=list)
    faults: dict[int, type[Exception]] = field(default_factory=dict)
    """Number of a change → what it fails with, instead of being made."""
    is_lasting: bool = False
    """A fault lasts: every later change fails too (a full disk)."""
    num_asked: int = 0

    @classmethod
    def of(cls, files: Files, **options) -> "Disk":
        return cls({name: bytearray(data) for name, data in files.items()}, **options)

    def change(self, change: Change) -> None:
        number, self.num_asked = self.num_asked, self.num_asked + 1
        if number in self.faults:
            error = self.faults[number]
            if self.is_lasting:
                self.faults[number + 1] = error
            raise error(f"change {number}: {change.kind} {change.name}")
        self.log.append(change)
        apply(self.files, change)

    def snapshot(self) -> Files:
        return {name: bytes(data) for name, data in self.files.items()}


def apply(files: dict[str, bytearray], change: Change) -> None:
    data = files.get(change.name)
    match change.kind:
        case "create":
            files.setdefault(change.name, bytearray())
        case "write":
            assert data is not None
            end = change.offset + len(change.data)
            if len(data) < end:
                data.extend(bytes(end - len(data)))
            data[change.offset : end] = change.data
        case "truncate":
            assert data is not None
            del data[change.offset :]
        case "delete":
            files.pop(change.name, None)


def after_kill(start: Files, log: list[Change], num: int) -> Files:
    """The process died after `num` changes; the system wrote all of them."""
    files = {name: bytearray(data) for name, data in start.items()}
    for change in log[:num]:
        apply(files, change)
    return {name: bytes(data) for name, data in files.items()}


def after_power_loss(start: Files, log: list[Change], num: int, rng: random.Random) -> Files:
    """The power went while change number `num` was under way.

    Of what was not synced a random part is there, in sectors; now and then none or all of it.
    """
    durable = {name: bytearray(data) for name, data in start.items()}
    pending: dict[str, list[Change]] = {}
    for change in log[:num]:
        _note(durable, pending, change)
    if num < len(log) and log[num].kind in ("write", "truncate"):
        pending.setdefault(log[num].name, []).append(log[num])
    share = rng.choice([0.0, 0.5, 0.9, 1.0])
    for name, changes in pending.items():
        # a file whose making was not synced may be missing
        if changes[0].kind == "create" and rng.random() >= share:
            continue
        for change in changes:
            for part in _sectors(change):
                if rng.random() < share:
                    durable.setdefault(name, bytearray())
                    apply(durable, part)
    return {name: bytes(data) for name, data in durable.items()}


def _note(durable: dict[str, bytearray], pending: dict[str, list[Change]], change: Change) -> None:
    """What a change makes durable, or leaves open."""
    if change.kind == "sync" or (change.kind == "delete" and change.is_synced):
        for earlier in pending.pop(change.name, []):
            apply(durable, earlier)
        if change.kind == "delete":
            apply(durable, change)
    else:
        pending.setdefault(change.name, []).append(change)


def _sectors(change: Change) -> list[Change]:
    if change.kind != "write":
        return [change]
    parts, at = [], 0
    while at < len(change.data):
        offset = change.offset + at
        size = SECTOR - offset % SECTOR
        parts.append(Change("write", change.name, offset, change.data[at : at + size]))
        at += size
    return parts


class DiskFile:
    """What SQLite opens. Reads see every change, as they do through a system's cache."""

    def __init__(self, disk: Disk, name: str) -> None:
        self._disk, self._name = disk, name

    def _data(self) -> bytearray:
        return self._disk.files.setdefault(self._name, bytearray())

    def xRead(self, amount, offset):  # noqa: N802
        return bytes(self._data()[offset : offset + amount])

    def xWrite(self, data, offset):  # noqa: N802
        self._disk.change(Change("write", self._name, offset, bytes(data)))

    def xTruncate(self, size):  # noqa: N802
        self._disk.change(Change("truncate", self._name, size))

    def xSync(self, flags):  # noqa: N802
        self._disk.change(Change("sync", self._name))

    def xFileSize(self):  # noqa: N802
        return len(self._data())

    def xLock(self, level):  # noqa: N802
        pass

    def xUnlock(self, level):  # noqa: N802
        pass

    def xCheckReservedLock(self):  # noqa: N802
        return False

    def xFileControl(self, op, pointer):  # noqa: N802
        return False

    def xSectorSize(self):  # noqa: N802
        return 4096

    def xDeviceCharacteristics(self):  # noqa: N802
        return apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE  # as SQLite's own on unix

    def xClose(self):  # noqa: N802
        pass


class DiskVFS(apsw.VFS):
    """One VFS for all tests. disk: where files are opened from now on."""

    NAME = "test-disk"

    def __init__(self) -> None:
        self.disk = Disk()
        super().__init__(self.NAME, base="")

    def xOpen(self, name, flags):  # noqa: N802
        path = name if isinstance(name, str) or name is None else name.filename()
        assert path is not None, "a temporary file: temp_store is not MEMORY"
        if path not in self.disk.files:
            if not flags[0] & apsw.SQLITE_OPEN_CREATE:
                raise apsw.CantOpenError(path)
            self.disk.change(Change("create", path))
        flags[1] = flags[0]
        return DiskFile(self.disk, path)

    def xDelete(self, name, sync_folder):  # noqa: N802
        if name in self.disk.files:
            self.disk.change(Change("delete", name, is_synced=bool(sync_folder)))

    def xAccess(self, name, flags):  # noqa: N802
        return name in self.disk.files

    def xFullPathname(self, name):  # noqa: N802
        return name


# SQLite knows it by its name: a second one would take the place of the first
vfs = DiskVFS()
