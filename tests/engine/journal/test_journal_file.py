"""The journal's file: who may open it, what survives reopening, what size and faults do."""

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from everstep.engine.config import JournalConfig
from everstep.engine.errors import JournalError, JournalFull
from everstep.engine.journal.files import SCHEMA
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.ops import Accept, Ack, Append, End, Flip, Pause, RequestKey
from everstep.engine.rollout import RolloutState
from tests.engine.journal.disk import Disk, vfs
from tests.engine.journal.drawn import ORIGINS, end, make_grown, make_rollout
from tests.engine.journal.workloads import open_journal

ROOT = Path(__file__).resolve().parents[3]


def fill(journal, names="ab", steps=3):
    journal.commit([Accept([make_rollout(name) for name in names]), Flip(1, "aa")])
    for step in range(steps):
        origin = ORIGINS[step % 2]
        journal.commit([Append(origin, [make_grown(name, step, 1) for name in names], 1001.0)])


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_everything_is_there_again_after_reopening(tmp_path):
    path = tmp_path / "journal.db"
    key = RequestKey("h", "/rollouts", "k", "digest", created_s=1e12)
    journal = Journal.open(path)
    fill(journal)
    journal.commit(
        [Accept([make_rollout("c", state=RolloutState.PAUSED)], key, number=9), Pause(["a"])]
    )
    journal.commit([End(end(journal.read("b")))])
    before, ended = journal.recover(), journal.read("b")
    journal.close()
    journal = Journal.open(path)
    assert journal.recover() == before
    assert journal.read("b") == ended
    assert [s.num_output_tokens for s in (journal.summary("a"), journal.summary("b"))] == [3, 3]
    assert journal.num_rollouts == 3
    assert journal.check() == []
    journal.close()
    assert not os.path.exists(f"{path}-wal")


def killed(path):
    """A journal at `path` whose process just ended: all of it is in the WAL."""
    code = (
        "import os, sys; from everstep.engine.journal.journal import Journal; "
        "from tests.engine.journal.test_journal_file import fill; "
        f"journal = Journal.open({str(path)!r}); fill(journal); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT)
    assert done.returncode == 9
    return path.with_name(f"{path.name}-wal")


def test_what_was_committed_survives_a_process_that_just_ends(tmp_path):
    path = tmp_path / "journal.db"
    assert killed(path).stat().st_size > 0
    journal = Journal.open(path)
    assert [len(r.output_ids) for r in journal.recover().live] == [3, 3]
    journal.close()


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_commits_that_a_damaged_log_would_hide_are_missed(tmp_path, damage):
    """SQLite takes a damaged record of the WAL for its end."""
    path = tmp_path / "journal.db"
    log = killed(path)
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    for _ in range(2):
        with pytest.raises(JournalError, match=r"the last \d commits are missing; remove") as error:
            Journal.open(path)
        one_line(error)
    os.remove(f"{path}-lock")
    journal = Journal.open(path)
    assert all(len(r.output_ids) < 3 for r in journal.recover().live)
    journal.commit([Accept([make_rollout("c")])])
    journal.close()
    Journal.open(path).close()


def test_another_machine_start_asks_for_what_was_synced_only(tmp_path, monkeypatch):
    path = tmp_path / "journal.db"
    log = killed(path)
    monkeypatch.setattr("everstep.engine.journal.files._boot_id", lambda: "another")
    whole = log.read_bytes()
    log.write_bytes(whole[:-1])
    journal = Journal.open(path)
    assert [len(r.output_ids) for r in journal.recover().live] == [2, 2]
    journal.close()
    path2 = tmp_path / "other.db"
    log = killed(path2)
    log.write_bytes(whole[:100])
    with pytest.raises(JournalError, match="commits are missing"):
        Journal.open(path2)


def test_a_new_journal_at_the_old_place_misses_nothing(tmp_path):
    path = tmp_path / "journal.db"
    log = killed(path)
    path.unlink()
    log.unlink()
    Journal.open(path).close()


def test_a_journal_is_its_owners_alone(tmp_path):
    journal = Journal.open(tmp_path / "journal.db")
    fill(journal)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["journal.db", "journal.db-lock", "journal.db-wal"], 0o600)
    journal.close()


def test_a_second_owner_is_told_who_the_first_is(tmp_path):
    path = tmp_path / "journal.db"
    journal = Journal.open(path)
    with pytest.raises(JournalError, match=f"in use by process {os.getpid()};") as error:
        Journal.open(path)
    one_line(error)
    journal.commit([Flip(1, "aa")])
    journal.close()
    Journal.open(path).close()


def make_foreign(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE t (x)")
    db.close()


def make_newer(path):
    Journal.open(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def make_altered(path):
    Journal.open(path).close()
    db = sqlite3.connect(path)
    db.execute("ALTER TABLE rollouts ADD COLUMN x TEXT")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("no database" * 100), "not a journal"),
        (lambda path: path.write_bytes(b"SQLite format 3\0"), "not a journal"),
        (make_foreign, "not a journal .SQLite application id 0x0"),
        (make_newer, f"schema {SCHEMA + 1}, this version of everstep knows {SCHEMA}"),
        (make_altered, "damaged: table sqlite_schema"),
    ],
)
def test_a_file_that_is_not_ours_is_left_as_it_is(tmp_path, make, words):
    path = tmp_path / "journal.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(JournalError, match=words) as error:
        Journal.open(path)
    assert str(path) in one_line(error)
    assert path.read_bytes() == before
    assert not os.path.exists(f"{path}-wal") or not os.path.getsize(f"{path}-wal")


def test_a_folder_that_is_not_there_or_cannot_be_written_is_said(tmp_path):
    with pytest.raises(JournalError, match="No such file"):
        Journal.open(tmp_path / "nowhere" / "journal.db")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(JournalError, match="Is a directory"):
        Journal.open(tmp_path / "folder.db")


def test_a_damaged_record_is_named_and_never_an_answer(tmp_path):
    path = tmp_path / "journal.db"
    journal = Journal.open(path)
    fill(journal)
    journal.commit([End(end(journal.read("b")))])
    journal.close()
    whole = path.read_bytes()
    db = sqlite3.connect(path)
    [[data]] = db.execute("SELECT trajectory FROM rollouts WHERE number = 2")
    altered = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
    db.execute("UPDATE rollouts SET trajectory = ? WHERE number = 2", (altered,))
    db.commit()
    db.close()
    journal = Journal.open(path)
    with pytest.raises(JournalError, match="table rollouts, row 2: its trajectory"):
        journal.read("b")
    assert len(journal.read("a").output_ids) == 3
    assert any("rollouts, row 2" in line for line in journal.check())
    journal.close()
    for change, words in [
        ("UPDATE tokens SET ids = zeroblob(8) WHERE row = 2", "table tokens, row 2: its checksum"),
        ("DELETE FROM tokens WHERE row = 3", "table tokens, row -: 2 rows, the books have 3"),
        ("UPDATE rollouts SET state = 'paused' WHERE number = 1", "table rollouts, row 1"),
        ("DELETE FROM rollouts WHERE number = 1", "table rollouts, row -: 1 rows"),
        ("DELETE FROM books", "table books"),
    ]:
        path.write_bytes(whole)
        db = sqlite3.connect(path)
        db.execute(change)
        db.commit()
        db.close()
        with pytest.raises(JournalError, match=words) as error:
            Journal.open(path)
        one_line(error)


def test_it_is_not_used_after_a_fork(tmp_path, monkeypatch):
    journal = Journal.open(tmp_path / "journal.db")
    real = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: real + 1)
    with pytest.raises(JournalError, match="fork"):
        journal.commit([Flip(1, "aa")])
    monkeypatch.undo()
    journal.close()


def test_full_names_bytes_limit_and_who_is_waited_for(tmp_path):
    journal = Journal.open(tmp_path / "journal.db", JournalConfig(max_bytes=2**20))
    journal.commit([Accept([make_rollout("a", prompt_ids=[1] * 2**18), make_rollout("b")])])
    journal.commit([End(end(journal.read("a")))])
    with pytest.raises(
        JournalFull,
        match=r"1\d{6} bytes, the limit is 1048576 .*; 1 finished rollouts wait for "
        r"acknowledgement, the oldest since 2027-01-15",
    ) as error:
        journal.commit([Accept([make_rollout("c")])])
    one_line(error)
    journal.commit([Append(ORIGINS[0], [make_grown("b", 0, 3)])])
    journal.commit([Ack(["a"])])
    # the pages are free, and count as such at once
    journal.commit([Accept([make_rollout("c")])])
    journal.close()


class QuotaError(apsw.IOError):
    """As SQLite has it of a write that the system refused with EDQUOT."""

    extendedresult = apsw.SQLITE_IOERR_WRITE


@pytest.mark.parametrize(("number", "kind"), [(errno.EDQUOT, JournalFull), (errno.EIO, None)])
def test_a_quota_is_a_full_disk_and_a_broken_one_is_not(monkeypatch, number, kind):
    disk = Disk()
    journal = open_journal(disk, "accepts")
    journal.commit([Accept([make_rollout("a")])])
    monkeypatch.setattr(type(vfs), "xGetLastError", lambda self: (number, "refused"), raising=False)
    disk.faults, disk.is_lasting = {disk.num_asked: QuotaError}, True
    with pytest.raises(JournalError) as error:
        journal.commit([Accept([make_rollout("b")])])
    one_line(error)
    assert isinstance(error.value, JournalFull) == (kind is JournalFull)
    disk.faults = {}
    if kind is None:
        with pytest.raises(JournalError, match="QuotaError"):
            journal.commit([Accept([make_rollout("b")])])
        return
    assert "quota" in str(error.value)
    journal.commit([Append(ORIGINS[0], [make_grown("a", 0, 3)]), Accept([make_rollout("c")])])
    journal.close()
    again = open_journal(disk, "accepts")
    assert [one.id for one in again.recover().live] == ["a", "c"]
    assert again.read("a").output_ids == [*make_grown("a", 0, 3).ids]
    again.close()


def test_compaction_shrinks_the_file_and_keeps_what_live_ones_need(tmp_path):
    path = tmp_path / "journal.db"
    journal = Journal.open(path, JournalConfig(retain_acked_s=0))
    journal.commit([Accept([make_rollout("slow"), make_rollout("later")])])
    journal.commit([Append(ORIGINS[0], [make_grown("slow", 0, 2)])])
    for number in range(8):
        name = f"r{number}"
        journal.commit([Accept([make_rollout(name)])])
        for step in range(0, 4000, 400):
            origin = ORIGINS[number % 3]
            news = [
                make_grown(name, step, 400),
                make_grown("slow", 2 + number * 10 + step // 400, 1),
            ]
            journal.commit([Append(origin, news)])
        journal.commit([End(end(journal.read(name))), Ack([name])])
    before = journal.recover()
    size = journal.num_bytes
    # what lies behind the slow one is dead, but for its own tokens
    journal.compact()
    assert journal.recover() == before
    assert journal.num_bytes < size / 4
    journal.commit([Append(ORIGINS[2], [make_grown("later", 0, 1), make_grown("slow", 82, 1)])])
    before = journal.recover()
    journal.compact(is_thorough=True)
    assert journal.recover() == before
    assert journal.summary("r0") is None
    assert journal.read("slow") == before.live[0]
    journal.close()
    assert os.path.getsize(path) < 100_000
    journal = Journal.open(path)
    assert journal.recover() == before
    assert journal.check() == []
    journal.commit([End(end(journal.read("slow"))), End(end(journal.read("later")))])
    assert journal._db.execute("SELECT count(*) FROM tokens").fetchall() == [(0,)]
    journal.close()


def test_a_copy_can_be_read_while_nobody_writes_it(tmp_path):
    path = tmp_path / "journal.db"
    journal = Journal.open(path)
    fill(journal)
    recovered = journal.recover()
    journal.close()
    copy = tmp_path / "copy.db"
    shutil.copy(path, copy)
    os.chmod(copy, 0o400)
    journal = Journal.open(copy, is_read_only=True)
    assert journal.recover() == recovered
    assert journal.check() == []
    journal.close()
    assert sorted(p.name for p in tmp_path.glob("copy*")) == ["copy.db"]
