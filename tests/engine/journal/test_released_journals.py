"""Journals of every released schema: this version takes them up and finishes them identically."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from everstep.engine.journal.files import SCHEMA
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.ops import Append, End
from tests.engine.journal.drawn import ORIGINS, end, make_grown

FOLDER = Path(__file__).parents[2] / "data" / "journals"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_journals", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(value):
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(value))


def test_there_is_one_for_every_schema():
    assert sorted(p.stem for p in FOLDER.glob("*.db")) == [
        f"schema-{number}" for number in range(1, SCHEMA + 1)
    ]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.db")), ids=lambda path: path.stem)
def test_an_old_journal_is_read_and_finished_identically(path, make, tmp_path):
    expected = json.loads(path.with_suffix(".json").read_text())
    # what a later schema has brought
    expected.setdefault("budgets", [])
    expected.setdefault("flips", [])
    for budget in expected["budgets"]:
        budget.setdefault("places", None)
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    journal = Journal.open(copy, clock=lambda: 2e9)
    assert plain(make.described(journal)) == expected
    assert journal.check() == []
    # the live ones go on, and end
    for number, rollout in enumerate(journal.recover().live):
        start = len(rollout.output_ids)
        news = make_grown(rollout.id, start, 2)
        if rollout.sampling.record:
            continue
        journal.commit([Append(ORIGINS[0], [news], 1_800_000_100.0)])
        grown = journal.read(rollout.id)
        before = expected["live"][number]
        assert grown.output_ids == before["output_ids"] + news.ids
        assert grown.lp_temp == before["lp_temp"] + news.lp_temp
        journal.commit([End(end(grown))])
    journal.close()
    journal = Journal.open(copy, clock=lambda: 2e9)
    assert [rollout.id for rollout in journal.recover().live] == ["ro-2"]
    assert expected["ended"][0] in plain(make.described(journal))["ended"]
    journal.close()
