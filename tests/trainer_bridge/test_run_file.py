"""The run file: what is committed is there, whole or not at all, and what is wrong is said."""

import os
import subprocess
import sys
from pathlib import Path

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from everstep.engine.errors import ConfigError, JournalDamaged, JournalError
from everstep.trainer_bridge.c3po.leases import emptiest, left_of, slices
from everstep.trainer_bridge.run.file import RunFile
from everstep.trainer_bridge.run.words import Lease


class Thing(Struct):
    number: int


def test_records_come_back_in_order_of_their_keys(tmp_path: Path) -> None:
    with RunFile.open(tmp_path / "run") as file:
        for key in (10, 2, 1):
            file.changes.put("thing", key, Thing(key))
        file.changes.put("thing", 3, Thing(0))
        file.changes.put("thing", 3, Thing(3))
        file.changes.put("other", "a", Thing(7))
        file.changes.drop("thing", 2)
        # what is not committed is seen by the one who wrote it
        assert file.read("thing", 3, Thing) == Thing(3)
        assert file.read("thing", 2, Thing) is None
        file.flush()
        assert list(file.records("thing", Thing)) == [(n, Thing(n)) for n in (1, 3, 10)]
    with RunFile.open(tmp_path / "run") as file:
        assert file.read("other", "a", Thing) == Thing(7)
        assert file.read("other", "b", Thing) is None
        file.changes.put("thing", 4, Thing(4))
        file.changes.drop_all("thing")
        file.changes.put("thing", 5, Thing(5))
        assert file.read("thing", 1, Thing) is None
        file.flush()
        assert list(file.records("thing", Thing)) == [(5, Thing(5))]


def test_what_was_not_flushed_was_never_written(tmp_path: Path) -> None:
    with RunFile.open(tmp_path / "run") as file:
        file.changes.put("thing", 1, Thing(1))
        file.flush()
        file.changes.put("thing", 1, Thing(2))
        file.changes.put("thing", 2, Thing(2))
    with RunFile.open(tmp_path / "run") as file:
        assert list(file.records("thing", Thing)) == [(1, Thing(1))]


def test_one_process_has_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    code = (
        "from pathlib import Path; from everstep.trainer_bridge.run.file import RunFile; "
        f"RunFile.open(Path({str(path)!r}))"
    )
    with RunFile.open(path):
        with pytest.raises(ConfigError, match="another process runs with it"):
            RunFile.open(path)
        # a failed try of this process must not give the lock away
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process runs with it" in other.stderr
    RunFile.open(path).close()


def test_it_is_its_owners_alone(tmp_path: Path) -> None:
    with RunFile.open(tmp_path / "run"):
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o600


def test_every_byte_of_a_record_counts(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFile.open(path) as file:
        file.changes.put("thing", 1, Thing(123456))
        file.flush()
    db = apsw.Connection(str(path))
    [[body]] = db.execute("SELECT body FROM records").fetchall()
    for i in range(len(body)):
        wrong = bytes([*body[:i], body[i] ^ 1, *body[i + 1 :]])
        db.execute("UPDATE records SET body = ?", (wrong,))
        db.close()
        with RunFile.open(path) as file, pytest.raises(JournalDamaged, match="record thing 1 is"):
            file.read("thing", 1, Thing)
        db = apsw.Connection(str(path))
    db.close()


def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, table = tmp_path / "text", tmp_path / "table"
    text.write_text("some notes of mine, long enough to be no header of a database" * 20)
    db = apsw.Connection(str(table))
    db.execute("CREATE TABLE mine (a)")
    db.close()
    for path in (text, table):
        before = path.read_bytes()
        with pytest.raises(JournalError):
            RunFile.open(path)
        assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="is a folder"):
        RunFile.open(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFile.open(tmp_path / "none" / "run")


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    RunFile.open(tmp_path / "run").close()
    db = apsw.Connection(str(tmp_path / "run"))
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(JournalError, match="format 9; this version of everstep reads 1"):
        RunFile.open(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_without_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").touch(mode=0o400)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFile.open(tmp_path / "run")


# --- leases


@given(
    st.integers(1, 10**6),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 300), min_size=1),
    st.data(),
)
def test_slices_never_add_up_to_more_than_is_left_and_in_the_end_to_all_of_it(left, live, data):
    total, given_out = left, 0
    for _ in range(10_000):
        if not left or not any(live.values()):
            break
        idle = data.draw(st.sets(st.sampled_from(sorted(live)), min_size=1)) if left > 64 else live
        found = slices(left, live, idle)
        assert set(found) <= set(idle)
        assert all(size > 0 and live[engine] for engine, size in found.items())
        left -= sum(found.values())
        given_out += sum(found.values())
        assert left >= 0
    assert not any(live.values()) or given_out == total


def test_one_busy_engine_gets_all_at_once():
    assert slices(1000, {"a": 5, "b": 0}, ["a", "b"]) == {"a": 1000}
    assert slices(1000, {"a": 5, "b": 5}, ["a", "b"]) == {"a": 250, "b": 187}


def test_what_was_not_used_is_left_and_what_is_lost_is_not():
    def lease(number: int, state: str, tokens: int, used: int = 0) -> Lease:
        return Lease(
            number=number,
            iteration=0,
            engine="a",
            tokens=tokens,
            key="",
            used=used,
            state=state,  # type: ignore[arg-type]
        )

    leases = [lease(0, "over", 30, 10), lease(1, "open", 20), lease(2, "lost", 25, 5)]
    assert left_of(100, leases) == 100 - 10 - 20 - 25


def test_a_new_rollout_goes_where_there_are_fewest_and_then_to_its_siblings():
    assert emptiest({"a": 2, "b": 1}, {"a": 1}) == "b"
    assert emptiest({"a": 1, "b": 1}, {"b": 1}) == "b"
    assert emptiest({"a": 1, "b": 1}, {}) == "a"
