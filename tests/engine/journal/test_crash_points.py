"""Every crash of every small workload, over a disk that loses, tears and reorders.

    python -m pytest tests/engine/journal/test_crash_points.py -m slow -s     all up to 4 operations

With a loss of power, what may be missing is what the durability level says; after a kill, nothing.
"""

import random

import pytest

from everstep.engine.journal import journal as journal_module
from tests.engine.journal import workloads as w
from tests.engine.journal.disk import Disk
from tests.engine.journal.model import Model

# pages of the WAL before a checkpoint: after nearly every commit, and never
CHECKPOINTS = (3, 1000)


@pytest.fixture(scope="module")
def prefaced():
    return w.prefaced()


def run_all(names_of_all, prefaced, monkeypatch, *, images=1):
    start, model = prefaced
    tally = w.Tally()
    for pages in CHECKPOINTS:
        monkeypatch.setattr(journal_module, "_CHECKPOINT_PAGES", pages)
        for names in names_of_all:
            for level in w.LEVELS:
                recorded = w.record(names, level, start, model)
                w.crash_everywhere(recorded, tally, seed=1, images=images)
    return tally


def judge(tally):
    print(f"\n{tally.line()}")
    assert not tally.violations, "\n".join(tally.violations[:20])


@pytest.mark.timeout(1200)
def test_every_workload_of_up_to_two_operations(prefaced, monkeypatch):
    tally = run_all(list(w.workloads([1, 2])), prefaced, monkeypatch)
    judge(tally)
    assert tally.num_workloads == 2 * 3 * (10 + 100)
    assert tally.num_crashes > 8_000


@pytest.mark.timeout(1200)
def test_some_workloads_of_three_and_four(prefaced, monkeypatch):
    chosen = random.Random(7).sample(list(w.workloads([3, 4])), 30)
    judge(run_all(chosen, prefaced, monkeypatch))


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("first", w.OPERATIONS)
def test_every_workload_of_three_and_four(first, prefaced, monkeypatch):
    chosen = [names for names in w.workloads([3, 4]) if names[0] == first]
    judge(run_all(chosen, prefaced, monkeypatch, images=2))


def test_every_crash_while_the_file_is_made():
    tally = w.Tally()
    for level in w.LEVELS:
        w.crash_everywhere(w.record((), level, {}, Model()), tally, seed=1, images=8)
    judge(tally)
    assert len(tally.seen) > 20


@pytest.mark.parametrize("pages", CHECKPOINTS)
def test_every_change_of_the_disk_fails_once(pages, prefaced, monkeypatch):
    monkeypatch.setattr(journal_module, "_CHECKPOINT_PAGES", pages)
    tally = w.Tally()
    for names in w.workloads([1]):
        for level in w.LEVELS:
            w.fail_everywhere(names, level, *prefaced, tally)
    chosen = random.Random(7).sample(list(w.workloads([2, 3])), 20)
    for names in chosen:
        w.fail_everywhere(names, "accepts", *prefaced, tally)
    judge(tally)
    assert tally.num_faults > 300


def test_the_disk_loses_tears_and_reorders(prefaced):
    """The harness itself: among the images are ones with a torn, and with a reordered write."""
    start, model = prefaced
    recorded = w.record(("accept",), "process", start, model)
    num = len(recorded.log)
    whole = w.after_kill(start, recorded.log, num)
    size = len(whole["journal.db-wal"])
    kinds = set()
    for seed in range(200):
        files = w.after_power_loss(start, recorded.log, num, random.Random(seed))
        wal = files.get("journal.db-wal", b"").ljust(size, b"\0")
        there = [
            wal[at : at + 512] == whole["journal.db-wal"][at : at + 512]
            for at in range(0, size, 512)
            if any(whole["journal.db-wal"][at : at + 512])
        ]
        if all(there):
            kinds.add("all")
        elif not any(there):
            kinds.add("none")
        elif there != sorted(there, reverse=True):
            kinds.add("reordered")
        else:
            kinds.add("prefix")
    assert {"all", "none", "reordered"} <= kinds


def test_a_run_without_crash_is_the_model(prefaced):
    start, model = prefaced
    disk = Disk.of(start)
    run = w.Run(w.open_journal(disk), model)
    rng = random.Random(3)
    for _ in range(60):
        run.step(rng.choice(w.OPERATIONS))
        seen = w.observe(run.journal)
        assert w.m.replace(seen, next_number=run.model.next_number) == run.model
    run.journal.close()
