"""The crash harness on trial: bugs that only this file sows, each of which it must catch.

python -m pytest tests/engine/journal/test_harness_on_trial.py -s      bug → where → seconds
"""

import time

import pytest

from everstep.engine.journal import draft as journal_draft
from everstep.engine.journal.budgets import BudgetDraft
from everstep.engine.journal.draft import Draft
from everstep.engine.journal.journal import Journal
from tests.engine.journal import workloads as w


def ack_before_commit(patch):
    """A commit returns at once and is written with the next one."""
    commit, close = Journal.commit, Journal.close

    def late(self, ops):
        waiting, self.waiting = getattr(self, "waiting", []), list(ops)
        commit(self, waiting)

    def closing(self):
        if self._failure is None:
            commit(self, getattr(self, "waiting", []))
        close(self)

    def asking(name):
        real = getattr(Journal, name)

        def ask(self, *args):
            # as if memory already knew: whoever asks is told of it
            waiting, self.waiting = getattr(self, "waiting", []), []
            if waiting:
                commit(self, waiting)
            return real(self, *args)

        return ask

    patch.setattr(Journal, "commit", late)
    patch.setattr(Journal, "close", closing)
    for name in ("read", "recover", "list", "summary"):
        patch.setattr(Journal, name, asking(name))


def skip_fsync(patch):
    """Nothing waits for the disk."""
    set_level = Journal._set_synchronous
    patch.setattr(Journal, "_set_synchronous", lambda self, level: set_level(self, "OFF"))


def counter_reset(patch):
    """The number of submissions begins again with every start."""
    load = journal_draft.load_memory

    def forgetful(db):
        memory = load(db)
        memory.books.num_accepted = 0
        return memory

    patch.setattr("everstep.engine.journal.journal.load_memory", forgetful)


def lost_sibling(patch):
    """Of a group only the first sample is written."""
    accept = Draft._accept

    def careless(self, op):
        accept(self, type(op)(op.rollouts[:1], op.key, op.number))

    patch.setattr(Draft, "_accept", careless)


def half_a_group(patch):
    """A group is accepted in two transactions."""
    commit = Journal.commit

    def split(self, ops):
        for op in ops:
            rollouts = getattr(op, "rollouts", [])
            if len(rollouts) > 1:
                commit(self, [type(op)(rollouts[:1], None, op.number)])
                op = type(op)(rollouts[1:], op.key, op.number)
            commit(self, [op])

    patch.setattr(Journal, "commit", split)


def drop_version_stamp(patch):
    """Tokens are stored under whatever origin came first."""
    origin = Draft._origin

    def first(self, wanted):
        return min(self._memory.origins.values(), default=None) or origin(self, wanted)

    patch.setattr(Draft, "_origin", first)


def end_without_its_tokens(patch):
    """The ending is written as it stood at the last append of the file, not as it was given."""
    end = Draft._end

    def short(self, rollout):
        for name in ("output_ids", "lp_sampled", "lp_temp", "kept_mass", "flags", "versions"):
            setattr(rollout, name, getattr(rollout, name)[:1])
        rollout.segments = rollout.segments[:1]
        end(self, rollout)

    patch.setattr(Draft, "_end", short)


def pause_not_written(patch):
    """A pause is kept in memory only."""
    mark = Draft._mark

    def forget(self, rollout_ids, state):
        real, self._db = self._db, _NoWrites()
        mark(self, rollout_ids, state)
        self._db = real

    patch.setattr(Draft, "_mark", forget)


def budget_counted_in_memory(patch):
    """What a pool grew by is not written with its tokens."""
    write = BudgetDraft.write

    def only_new(self):
        changed, known = self._changed, self._books.by_id
        self._changed = {name: row for name, row in changed.items() if name not in known}
        write(self)
        self._changed = changed

    patch.setattr(BudgetDraft, "write", only_new)


class _NoWrites:
    def execute(self, *args):
        pass

    def changes(self):
        return 1


BUGS = [
    ack_before_commit,
    skip_fsync,
    counter_reset,
    lost_sibling,
    half_a_group,
    drop_version_stamp,
    end_without_its_tokens,
    pause_not_written,
    budget_counted_in_memory,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_seeded_bug_is_caught(bug, monkeypatch):
    start, model = w.prefaced()
    bug(monkeypatch)
    tally, began_s = w.Tally(), time.monotonic()
    for names in w.workloads([1, 2]):
        for level in w.LEVELS:
            try:
                recorded = w.record(names, level, start, model)
                w.crash_everywhere(recorded, tally, seed=1)
            except Exception as error:
                # a bug may already contradict itself without any crash
                tally.violations.append(f"{names}: {type(error).__name__}: {error}")
            if tally.violations:
                took_s = time.monotonic() - began_s
                print(f"\n{bug.__name__}: {tally.num_crashes} crash points, {took_s:.2f} s")
                print(f"  {tally.violations[0][:200]}")
                return
    pytest.fail(f"{bug.__name__} was not caught: {tally.line()}")
