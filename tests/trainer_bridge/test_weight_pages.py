"""Versions over the pages of older ones: whole to whoever reads, whoever is killed."""

import mmap
import os
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from everstep.engine.checkpoint.manifest import Manifest, read_manifest
from everstep.engine.checkpoint.reader_locks import is_in_memory, is_read, lock_for_reading
from everstep.engine.errors import CheckpointError
from everstep.trainer_bridge.run.folders import remove_versions, sizes_of
from everstep.trainer_bridge.weights import pages as weight_pages
from everstep.trainer_bridge.weights.folder import VersionFolder
from everstep.trainer_bridge.weights.pages import FILE, OpenFile, Pages, clean

from .memory import memory_folder
from .version_writer import begin, check_bytes, check_whole, fill, finish, publish, values_of

SIZE = 3 * mmap.PAGESIZE + 100


@pytest.fixture
def root() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def number_of(folder: Path) -> int:
    return (folder / FILE).stat().st_ino


class Reader:
    """As engines read: the file stays locked while it is mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE
        self._file = os.open(self.path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._file)
        self._map: mmap.mmap | None = None
        self._bytes = b""

    def lock(self) -> None:
        """Raises CheckpointError."""
        try:
            lock_for_reading(self._file, self.path)
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
            self._bytes = self._map[:]
        finally:
            self._close()

    def is_of(self, path: Path) -> bool:
        """Before `lock`."""
        return os.path.samestat(os.fstat(self._file), path.stat())

    def check(self) -> None:
        assert self._map is not None
        assert self._map[:] == self._bytes

    def check_against(self, manifest: Manifest) -> None:
        check_bytes(manifest, self._bytes)


def reader_of(folder: Path) -> Reader:
    reader = Reader(folder)
    reader.lock()
    return reader


def test_a_version_that_fell_out_is_the_place_of_the_next(root: Path) -> None:
    pages = Pages(root)
    numbers = []
    for version in range(1, 8):
        path = publish(pages, version, version, SIZE, keep=2)
        assert (path / FILE).read_bytes().endswith(values_of(version, SIZE))
        reader_of(path)
        numbers.append(number_of(path))
    assert len(set(numbers[:3])) == 3
    assert numbers[3:] == (numbers[:3] * 2)[:4]
    assert sorted(sizes_of(root)) == [".spare-v5", "v6", "v7"]
    for name in ("v6", "v7"):
        check_whole(root / name)
    pages.close()
    assert sorted(sizes_of(root)) == ["v6", "v7"]


def test_what_is_read_is_left_to_its_readers(root: Path) -> None:
    pages = Pages(root)
    first = publish(pages, 1, 1, SIZE, keep=1)
    number, reader = number_of(first), reader_of(first)
    for version in (2, 3, 4):
        assert number_of(publish(pages, version, version, SIZE, keep=1)) != number
        reader.check()
    # the third could not have its place, and made the fourth's in the second's
    assert len(sizes_of(root)) == 2


def test_a_reader_that_has_let_go_is_waited_for_until_the_next_begins(root: Path) -> None:
    pages = Pages(root)
    first = publish(pages, 1, 1, SIZE, keep=1)
    number, reader = number_of(first), reader_of(first)
    publish(pages, 2, 2, SIZE, keep=1)
    del reader
    assert number_of(publish(pages, 3, 3, SIZE, keep=1)) == number


def test_a_file_that_was_opened_before_its_version_went_is_not_read(root: Path) -> None:
    pages = Pages(root)
    early = [Reader(publish(pages, 1, 1, SIZE, keep=1)) for _ in range(4)]
    publish(pages, 2, 2, SIZE, keep=1)
    with pytest.raises(CheckpointError, match=r"v1/model\.safetensors is gone"):
        early.pop().lock()
    folder = begin(pages, 3, SIZE)
    with pytest.raises(CheckpointError, match="gone"):
        early.pop().lock()
    fill([folder], 3, SIZE)
    finish(folder, 3, SIZE, keep=2)
    with pytest.raises(CheckpointError, match="gone"):
        early.pop().lock()
    # the same file once more, under the same name: whole
    fill([again := begin(pages, 1, SIZE)], 9, SIZE)
    assert finish(again, 1, SIZE, keep=2)
    with suppress(CheckpointError):
        early[0].lock()
        early[0].check()


def test_between_the_looks_of_the_writer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that locks while the writer looks for locks has no name to read by."""
    pages = Pages(root)
    early = Reader(publish(pages, 1, 1, SIZE, keep=1))
    publish(pages, 2, 2, SIZE, keep=1)
    said: list[str] = []

    def looking(file: int) -> bool:
        found = is_read(file)
        with pytest.raises(CheckpointError, match="gone"):
            early.lock()
        said.append("gone")
        return found

    monkeypatch.setattr(weight_pages, "is_read", looking)
    publish(pages, 3, 3, SIZE, keep=1)
    assert said == ["gone"]


@pytest.mark.parametrize("change", ["linked", "another size", "taken away", "of another process"])
def test_pages_that_cannot_be_had_are_new(root: Path, change: str) -> None:
    pages = Pages(root)
    first = publish(pages, 1, 1, SIZE, keep=1)
    number = number_of(first)
    kept = root / "kept"
    size = SIZE + 1 if change == "another size" else SIZE
    if change == "linked":
        kept.hardlink_to(first / FILE)
    if change == "of another process":
        pages = Pages(root)
    before = (first / FILE).read_bytes()
    publish(pages, 2, 2, SIZE, keep=1)
    if change == "taken away":
        remove_versions(root, [str(root / "v2")])
    third = publish(pages, 3, 3, size, keep=1)
    assert number_of(third) != number
    check_whole(third)
    if change == "linked":
        assert kept.read_bytes() == before


def test_no_memory_is_kept_of_files_that_are_gone(root: Path) -> None:
    """Of two ranks, the second of which only writes."""
    first, second = Pages(root), Pages(root)
    for version in range(1, 6):
        folders = [begin(first, version, SIZE), VersionFolder(second, version)]
        fill(folders, version, SIZE)
        check_whole(finish(folders[0], version, SIZE, keep=1))
    folders = [begin(first, 6, SIZE + 9), VersionFolder(second, 6)]
    fill(folders, 6, SIZE + 9)
    for pages in (first, second):
        assert sorted(os.fstat(f.fd).st_nlink for f in files_of(pages)) == [1, 1]
    second.close()
    folders[1].close()
    assert not list(files_of(second))


def files_of(pages: Pages) -> list[OpenFile]:
    return list(pages._files.values())


def test_what_a_killed_process_left_goes(root: Path) -> None:
    pages = Pages(root)
    for version in (1, 2):
        publish(pages, version, version, SIZE, keep=1)
    half = begin(pages, 3, SIZE)
    fill([half], 3, SIZE // 2)
    pages = Pages(root)
    check_whole(publish(pages, 3, 4, SIZE, keep=1))
    assert sorted(sizes_of(root)) == ["v3"]
    publish(pages, 4, 5, SIZE, keep=1)
    assert sorted(sizes_of(root)) == [".spare-v3", "v4"]
    clean(root)
    assert sorted(sizes_of(root)) == ["v4"]


def test_on_a_disk_every_version_is_new(tmp_path: Path) -> None:
    if is_in_memory(os.open(tmp_path, os.O_RDONLY)) is not False:
        pytest.skip("the folder of the tests is in memory")
    pages = Pages(tmp_path)
    for version in range(1, 5):
        check_whole(publish(pages, version, version, SIZE, keep=1))
    assert sorted(sizes_of(tmp_path)) == ["v4"]


class Rotation(RuleBasedStateMachine):
    """Versions of two ranks; readers open, lock, hold and let go at any time; writers die.

    What is read never changes, what has a version's name is whole, and there is no more than the
    newest `keep` and one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._context = memory_folder()
        self.root = self._context.__enter__()
        self.first, self.second = Pages(self.root), Pages(self.root)
        self.half: tuple[list[VersionFolder], int, int] | None = None
        self.orphans: list[tuple[VersionFolder, int]] = []
        self.early: list[Reader] = []
        self.readers: list[Reader] = []
        self.version = self.seed = 0
        self.keep = 2

    @rule(size=st.sampled_from([SIZE, SIZE, SIZE, SIZE + 1]), is_next=st.sampled_from([1, 1, 1, 0]))
    @precondition(lambda self: self.half is None)
    def begin(self, size: int, is_next: int) -> None:
        self.version += is_next
        self.seed += 1
        folder = begin(self.first, self.version, size)
        self.half = [folder, VersionFolder(self.second, self.version)], self.seed, size

    @rule()
    @precondition(lambda self: self.half is not None)
    def fill(self) -> None:
        assert self.half
        fill(*self.half)

    @rule(keep=st.sampled_from([2, 1, 3]))
    @precondition(lambda self: self.half is not None)
    def finish(self, keep: int) -> None:
        assert self.half
        folders, seed, size = self.half
        fill(*self.half)
        self.half, self.keep = None, max(self.keep, keep)
        path = finish(folders[0], self.version, size, keep)
        assert (path / FILE).read_bytes().endswith(values_of(seed, size))

    @rule()
    @precondition(lambda self: self.half is not None)
    def discard(self) -> None:
        assert self.half
        for folder in reversed(self.half[0]):
            folder.close()
        self.half[0][0].discard()
        self.half = None

    @rule(first=st.booleans(), second=st.booleans())
    def die(self, first: bool, second: bool) -> None:
        """What the new ones know is what is on the disk; one that did not die may not know yet."""
        if self.half is not None and not second and self.half[0][1]._file:
            self.orphans.append((self.half[0][1], self.half[2]))
        self.half = None
        self.first = Pages(self.root) if first else self.first
        self.second = Pages(self.root) if second else self.second

    @rule()
    @precondition(lambda self: self.orphans)
    def write_on(self) -> None:
        """What the first rank had begun before it died."""
        fill([self.orphans[-1][0]], 250, self.orphans[-1][1])

    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        versions = self.versions()
        if versions:
            self.early.append(Reader(data.draw(st.sampled_from(versions))))

    @rule(data=st.data())
    @precondition(lambda self: self.early)
    def lock(self, data: st.DataObject) -> None:
        reader = self.early.pop(data.draw(st.integers(0, len(self.early) - 1)))
        manifest = read_manifest(reader.folder) if reader.folder.is_dir() else None
        is_there = manifest is not None and reader.is_of(reader.path)
        try:
            reader.lock()
        except CheckpointError:
            assert not is_there
            return
        assert manifest is not None
        reader.check_against(manifest)
        self.readers.append(reader)

    @rule(data=st.data())
    @precondition(lambda self: self.readers)
    def let_go(self, data: st.DataObject) -> None:
        del self.readers[data.draw(st.integers(0, len(self.readers) - 1))]

    @invariant()
    def what_is_read_stays(self) -> None:
        for reader in self.readers:
            reader.check()

    @invariant()
    def versions_are_whole(self) -> None:
        versions = self.versions()
        assert len(sizes_of(self.root)) <= self.keep + 1
        for folder in versions:
            check_whole(folder)

    def versions(self) -> list[Path]:
        return sorted(path for path in self.root.iterdir() if path.name.startswith("v"))

    def teardown(self) -> None:
        self._context.__exit__(None, None, None)


TestRotation: Any = Rotation.TestCase
TestRotation.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_killed_writers_leave_whole_versions(root: Path) -> None:
    """Real processes, killed at any moment, while this one reads whatever is there."""
    size, rng = 60 * mmap.PAGESIZE, random.Random(7)
    read = first = 0
    for kills in range(4):
        with writing(root, first, size):
            until = time.monotonic() + rng.uniform(0.2, 0.5)
            while time.monotonic() < until or read < 5 * kills:
                for folder in sorted(root.glob("v*")):
                    read += read_as_engines_do(folder)
        versions = sorted(root.glob("v*"), key=lambda path: int(path.name[1:]))
        assert versions
        for folder in versions:
            check_whole(folder)
        first = int(versions[-1].name[1:]) + 1
    check_whole(publish(Pages(root), first, first, size, keep=2))
    assert all(name.startswith("v") for name in sizes_of(root))


def read_as_engines_do(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
        reader = Reader(folder)
        reader.lock()
    except (FileNotFoundError, CheckpointError):
        return False
    if manifest is None:
        return False
    reader.check_against(manifest)
    # it may have fallen out meanwhile
    time.sleep(0.003)
    reader.check()
    return True


@contextmanager
def writing(root: Path, first: int, size: int) -> Iterator[subprocess.Popen[str]]:
    """A trainer in a process of its own, that has published a version."""
    arguments = [str(root), str(first), "2", str(size)]
    command = [sys.executable, "-m", "tests.trainer_bridge.version_writer", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert int(process.stdout.readline()) == first
            yield process
        finally:
            process.kill()


def test_a_killed_reader_holds_nothing(root: Path) -> None:
    pages = Pages(root)
    first = publish(pages, 1, 1, SIZE, keep=1)
    number = number_of(first)
    program = (
        "import sys, pathlib; from everstep.engine.checkpoint.reader_locks import lock_for_reading\n"
        "path = pathlib.Path(sys.argv[1]); file = path.open('rb')\n"
        "lock_for_reading(file.fileno(), path); print('read', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(first / FILE)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "read\n"
        publish(pages, 2, 2, SIZE, keep=1)
        file = os.open(root / ".spare-v1" / FILE, os.O_RDWR)
        assert is_read(file)
        process.kill()
        process.wait()
        assert not is_read(file)
        os.close(file)
    assert number_of(publish(pages, 3, 3, SIZE, keep=1)) == number
