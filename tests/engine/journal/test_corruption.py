"""A byte flips, an end is cut: found, or without any consequence, and never a traceback.

python -m pytest tests/engine/journal/test_corruption.py -m slow     every bit, every length
"""

import contextlib
import random

import pytest

from everstep.engine.errors import JournalError
from everstep.engine.journal import files as journal_files
from tests.engine.journal import workloads as w
from tests.engine.journal.disk import Disk
from tests.engine.journal.model import replace

STEPS = ("accept", "append", "import", "finish", "append", "flip", "append", "finish", "ack")
BITS = (1, 2, 4, 8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def small():
    """A closed journal of pages of 512 bytes, which has something of everything, and its model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_files, "PAGE_SIZE", 512)
        disk = Disk()
        run = w.Run(w.open_journal(disk))
        for name in STEPS:
            run.step(name)
        run.journal.close()
    return disk.snapshot(), run.model


@pytest.fixture(scope="module")
def unfinished(small):
    """The same, of a process that was killed: (files, models after each commit in the WAL)."""
    files, model = small
    disk = Disk.of(files)
    run = w.Run(w.open_journal(disk, "process"), model)
    models = [model]
    for name in ("append", "accept", "append", "finish"):
        run.step(name)
        models.append(run.model)
    files = disk.snapshot()
    run.journal.close()
    return files, models


def look(files, models):
    """found, harmless, or what is wrong."""
    try:
        journal = w.open_journal(Disk.of(files))
    except JournalError as error:
        return "found" if "\n" not in str(error) else f"two lines: {error}"
    try:
        seen = w.observe(journal)
        if not any(replace(seen, next_number=m.next_number) == m for m in models):
            return f"a wrong answer: {seen}"
        # what has no consequence now has none later
        wrong = w._goes_on(journal, seen)
        return f"wrong later: {wrong}" if wrong else "harmless"
    except JournalError as error:
        return "found" if "\n" not in str(error) else f"two lines: {error}"
    except AssertionError as error:
        return f"contradicts itself: {error!r}"
    finally:
        # damage that only writing meets
        with contextlib.suppress(JournalError):
            journal.close()


def sweep(files, name, changes, models):
    """changes: (offset, xor) of each flip. Counts of outcomes; fails at the first bad one."""
    counts = {"found": 0, "harmless": 0}
    whole = files[name]
    for offset, bits in changes:
        data = bytearray(whole)
        data[offset] ^= bits
        outcome = look({**files, name: bytes(data)}, models)
        assert outcome in counts, f"byte {offset} ^ {bits} of {name}: {outcome}"
        counts[outcome] += 1
    print(f"\n{name}: {len(whole)} bytes, {sum(counts.values())} flips, {counts}")
    return counts


def one_bit_per_byte(size, seed):
    rng = random.Random(seed)
    return [(offset, rng.choice(BITS)) for offset in range(size)]


@pytest.mark.timeout(1200)
def test_every_flipped_byte_is_found_or_harmless(small):
    files, model = small
    counts = sweep(files, w.PATH, one_bit_per_byte(len(files[w.PATH]), 1), [model])
    assert counts["found"] > len(files[w.PATH]) // 3


def test_every_bit_of_the_header_is_found_or_harmless(small):
    """Schema numbers below zero were met with a traceback."""
    files, model = small
    sweep(files, w.PATH, [(at, bits) for at in range(100) for bits in (*BITS, 255)], [model])


def test_a_flip_in_the_wal_of_a_killed_process_is_found_or_ends_the_log_there(unfinished):
    files, models = unfinished
    name = f"{w.PATH}-wal"
    flips = one_bit_per_byte(len(files[name]), 2)[::9]
    sweep(files, name, flips, models)


def test_every_cut_is_found_or_harmless(small, unfinished):
    files, model = small
    size = len(files[w.PATH])
    for length in sorted({*range(0, size, 61), *range(120), size - 1}):
        outcome = look(
            {w.PATH: files[w.PATH][:length]}, [model, w.m.Model()][: 2 if not length else 1]
        )
        assert outcome in ("found", "harmless"), f"cut at {length}: {outcome}"
    files, models = unfinished
    name = f"{w.PATH}-wal"
    for length in range(0, len(files[name]), 97):
        outcome = look({**files, name: files[name][:length]}, models)
        assert outcome in ("found", "harmless"), f"WAL cut at {length}: {outcome}"


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("bits", [*BITS, 255])
def test_every_flipped_bit(bits, small, unfinished):
    files, model = small
    sweep(files, w.PATH, [(at, bits) for at in range(len(files[w.PATH]))], [model])
    files, models = unfinished
    name = f"{w.PATH}-wal"
    sweep(files, name, [(at, bits) for at in range(len(files[name]))], models)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_every_cut(small):
    files, model = small
    for length in range(1, len(files[w.PATH])):
        outcome = look({w.PATH: files[w.PATH][:length]}, [model])
        assert outcome in ("found", "harmless"), f"cut at {length}: {outcome}"
