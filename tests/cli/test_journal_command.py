"""everstep journal: what a user sees of a file, whole, damaged, foreign, or in use."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from everstep.cli import run
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.ops import Accept, Ack, End
from everstep.engine.trajectory import unpack, unseal
from tests.engine.journal.drawn import end, make_rollout
from tests.engine.journal.test_journal_file import fill, killed

JOURNALS = Path(__file__).parents[1] / "data" / "journals"


@pytest.fixture
def path(tmp_path):
    """A journal with a live rollout, an ended and an acknowledged one."""
    path = tmp_path / "run.db"
    journal = Journal.open(path)
    fill(journal, "abc")
    journal.commit([End(end(journal.read("b"))), End(end(journal.read("c"))), Ack(["c"])])
    journal.close()
    return path


def call(capsys, *words):
    code = run(["journal", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def files_of(path):
    return {p.name: p.read_bytes() for p in path.parent.iterdir()}


def test_check_says_what_is_in_it_and_changes_nothing(path, capsys):
    before = files_of(path)
    code, out, err = call(capsys, "check", path)
    assert (code, err) == (0, "")
    assert "1 live rollouts, 1 ended, 1 acknowledged, 6 output tokens, 0 budgets, 0 damaged" in out
    assert files_of(path) == before


@pytest.mark.parametrize("old", sorted(JOURNALS.glob("*.db")), ids=lambda old: old.stem)
def test_check_reads_an_older_schema_and_leaves_it_as_it_is(old, tmp_path, capsys):
    path = tmp_path / "run.db"
    shutil.copy(old, path)
    before = files_of(path)
    code, out, err = call(capsys, "check", path)
    assert (code, err) == (0, "")
    assert f"schema {old.stem.removeprefix('schema-')}, " in out
    assert ", 0 damaged records" in out
    assert files_of(path) == before


def test_check_reads_what_a_killed_process_left_and_changes_nothing(tmp_path, capsys):
    path = tmp_path / "run.db"
    killed(path)
    before = files_of(path)
    code, out, _ = call(capsys, "check", path)
    assert (code, "2 live rollouts, 0 ended" in out) == (0, True)
    assert files_of(path) == before


def test_check_names_damaged_records(path, capsys):
    db = sqlite3.connect(path)
    db.execute("UPDATE rollouts SET trajectory = zeroblob(10) WHERE id = 'b'")
    db.commit()
    code, out, err = call(capsys, "check", path)
    assert (code, err) == (1, "")
    assert "damaged: table rollouts, row 2: its trajectory" in out
    db.execute("DELETE FROM tokens")
    db.commit()
    db.close()
    code, out, err = call(capsys, "check", path)
    assert (code, err) == (1, "")
    assert "damaged: table tokens, row -: 0 rows, the books have 3" in out
    assert len(out.splitlines()) == 1


def test_export_writes_lines_or_sealed_files(path, capsys, tmp_path):
    code, out, _ = call(capsys, "export", path)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(line["id"], line["state"]) for line in lines] == [("a", "queued"), ("b", "finished")]
    assert len(lines[0]["output_ids"]) == 3
    target = tmp_path / "lines.jsonl"
    assert call(capsys, "export", path, "-o", target, "--ended")[:2] == (
        0,
        f"{target}: 1 rollout\n",
    )
    assert [json.loads(line)["id"] for line in target.read_text().splitlines()] == ["b"]
    folder = tmp_path / "sealed"
    code, out, _ = call(capsys, "export", path, "-o", folder, "--format", "trajectory")
    assert (code, out) == (0, f"{folder}: 2 rollouts\n")
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["00000001-a.evst", "00000002-b.evst"]
    rollout = unpack(unseal((folder / names[1]).read_bytes()))
    assert rollout.output_ids == lines[1]["output_ids"]


def test_export_saves_what_can_be_read(path, capsys):
    db = sqlite3.connect(path)
    db.execute("UPDATE rollouts SET trajectory = zeroblob(10) WHERE id = 'b'")
    db.commit()
    db.close()
    code, out, err = call(capsys, "export", path)
    assert code == 1
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["a"]
    assert "table rollouts, row 2" in err


def test_an_id_from_elsewhere_names_no_file_outside_the_folder(tmp_path, capsys):
    path = tmp_path / "run.db"
    journal = Journal.open(path)
    journal.commit([Accept([make_rollout("../../x")])])
    journal.close()
    folder = tmp_path / "out"
    assert call(capsys, "export", path, "-o", folder, "--format", "trajectory")[0] == 0
    assert [p.name for p in folder.iterdir()] == ["00000001-rollout.evst"]


def test_compact_says_what_it_gave_back(path, capsys):
    journal = Journal.open(path)
    journal.commit([Accept([make_rollout("d", prompt_ids=[1] * 100_000)])])
    journal.commit([End(end(journal.read("d"))), Ack(["d"])])
    journal.close()
    code, out, _ = call(capsys, "compact", path)
    before, after = (int(word) for word in out.split() if word.isdigit())
    assert (code, before > 400_000, after < 100_000) == (0, True, True)
    assert call(capsys, "check", path)[0] == 0


def test_mistakes_end_in_one_line(path, capsys, tmp_path):
    foreign = tmp_path / "foreign.db"
    foreign.write_text("x" * 200)
    journal = Journal.open(path)
    for words, message in [
        (("check", tmp_path / "none.db"), "no such file"),
        (("compact", tmp_path / "none.db"), "no such file"),
        (("check", foreign), "not a journal"),
        (("export", foreign), "not a journal"),
        (("check", path), "in use by process"),
        (("compact", path), "in use by process"),
        (("export", path, "--format", "trajectory"), "name a folder"),
        (("export", path, "--format", "xml"), "xml"),
    ]:
        code, out, err = call(capsys, *words)
        assert (code, out) == (2, ""), words
        assert message in err
        assert len(err.splitlines()) == 1
    journal.close()
