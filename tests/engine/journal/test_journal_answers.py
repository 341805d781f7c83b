"""What any journal answers: the one in a file, and the one in memory."""

import pytest
from msgspec.structs import replace

from everstep.engine.config import JournalConfig
from everstep.engine.errors import Conflict, IllegalState, JournalError, JournalFull
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.ops import (
    Accept,
    Ack,
    Append,
    Budget,
    CloseBudget,
    End,
    Flip,
    OpenBudget,
    Pause,
    Query,
    RequestKey,
    Resume,
    grow,
)
from everstep.engine.rollout import RolloutState
from tests.engine.journal.drawn import ORIGINS, end, make_grown, make_rollout
from tests.fakes import FakeClock

KEY = RequestKey("", "/rollouts", "k-1", "digest", created_s=1000.0)


@pytest.fixture
def clock():
    clock = FakeClock()
    clock.advance(1000.0 - clock())
    return clock


@pytest.fixture(params=["file", "memory"])
def open_journal(request, tmp_path, clock):
    """A function (config) → journal; in a file it is the same journal each time."""
    opened = []

    def open_it(config):
        if request.param == "memory":
            return MemoryJournal(config, clock=clock)
        for journal in opened:
            journal.close()
        opened.append(Journal.open(tmp_path / "journal.db", config, clock=clock))
        return opened[-1]

    yield open_it
    for journal in opened:
        journal.close()


@pytest.fixture
def journal(open_journal):
    journal = open_journal(JournalConfig(retain_acked_s=10, retain_keys_s=20))
    journal.commit([Accept([make_rollout("a"), make_rollout("b")], KEY)])
    return journal


def append(journal, rollout_id, start, num, origin=ORIGINS[0], time_s=1001.0):
    journal.commit([Append(origin, [make_grown(rollout_id, start, num)], time_s)])


def test_live_rollouts_come_back_with_tokens_and_segments(journal):
    append(journal, "a", 0, 3)
    append(journal, "a", 3, 2, ORIGINS[1])
    append(journal, "a", 5, 1, ORIGINS[1])
    [a, b] = journal.recover().live
    assert (a.id, len(a.output_ids), b.output_ids) == ("a", 6, [])
    assert [(s.start, s.version) for s in a.segments] == [(0, 1), (3, 2)]
    assert a.versions == [1, 1, 1, 2, 2, 2]
    assert a.first_token_s == 1001.0
    assert journal.read("a") == a


def test_nothing_is_shared_with_the_caller(journal):
    rollout = make_rollout("c", metadata={"list": [1]})
    journal.commit([Accept([rollout])])
    rollout.metadata["list"].append(2)
    rollout.prompt_ids.append(9)
    seen = journal.read("c")
    assert (seen.metadata, seen.prompt_ids) == ({"list": [1]}, [1, 2, 3])
    seen.prompt_ids.append(8)
    assert journal.read("c").prompt_ids == [1, 2, 3]


def test_a_commit_is_all_or_nothing(journal):
    with pytest.raises(IllegalState, match="from 5 on do not follow the 0"):
        journal.commit([Flip(3, "cc"), Append(ORIGINS[0], [make_grown("a", 5, 1)])])
    assert journal.recover().flip is None
    with pytest.raises(Conflict):
        journal.commit([Accept([make_rollout("c"), make_rollout("a")])])
    assert journal.summary("c") is None
    with pytest.raises(Conflict, match="k-1"):
        journal.commit([Accept([make_rollout("c")], KEY)])
    assert journal.recover().num_accepted == 1


def test_an_ending_replaces_what_was_appended(journal):
    append(journal, "a", 0, 2)
    whole = end(journal.read("a"))
    whole.text, whole.text_offset = "ab", 2
    journal.commit([End(whole)])
    assert journal.read("a") == whole
    assert [r.id for r in journal.recover().live] == ["b"]
    for op in (End(whole), Append(ORIGINS[0], [make_grown("a", 2, 1)])):
        with pytest.raises(IllegalState):
            journal.commit([op])


def test_only_endings_are_acknowledged_and_then_only_their_name_is_kept(journal, clock):
    with pytest.raises(IllegalState, match="has not ended"):
        journal.commit([Ack(["a"])])
    journal.commit([End(end(journal.read("a"))), Ack(["a"])])
    journal.commit([Ack(["a", "unknown"])])
    assert journal.read("a") is None
    assert journal.summary("a").is_acked
    clock.advance(9)
    journal.compact()
    assert journal.summary("a") is not None
    clock.advance(2)
    journal.compact()
    assert journal.summary("a") is None


def test_pause_all_holds_for_what_comes_later(journal):
    journal.commit([Pause(["a"])])
    assert [r.state for r in journal.recover().live] == ["paused", "queued"]
    journal.commit([Pause(None), Accept([make_rollout("c")]), Resume(["b"])])
    recovered = journal.recover()
    assert recovered.is_all_paused
    assert [r.state for r in recovered.live] == ["paused", "queued", "paused"]
    journal.commit([Resume(None), Accept([make_rollout("d")])])
    recovered = journal.recover()
    assert not recovered.is_all_paused
    assert {r.state for r in recovered.live} == {RolloutState.QUEUED}


def test_keys_are_kept_for_their_time(journal, clock):
    assert journal.recover().keys == [(KEY, ["a", "b"])]
    clock.advance(19)
    journal.compact()
    assert journal.recover().keys
    clock.advance(2)
    assert not journal.recover().keys
    journal.commit([Accept([make_rollout("c")], KEY)])


def test_what_only_its_key_reads_is_let_go_with_the_key(journal, clock):
    """/v1 knows no acknowledgement; what is live is not touched, nor what /rollouts gives."""
    chat = RequestKey("", "/v1/chat/completions", "k-1", "digest", created_s=1000.0)
    journal.commit([Accept([make_rollout("c"), make_rollout("d")], chat)])
    journal.commit([End(end(journal.read("a")))])
    journal.commit([End(end(journal.read("c")))])
    clock.advance(19)
    journal.compact()
    assert not journal.summary("c").is_acked
    clock.advance(2)
    journal.compact()
    assert journal.summary("c").is_acked
    assert not journal.summary("d").is_acked
    assert not journal.summary("a").is_acked
    journal.commit([End(end(journal.read("d")))])
    journal.compact()
    assert journal.summary("d").is_acked
    clock.advance(11)
    journal.compact()
    assert journal.summary("c") is journal.summary("d") is None
    assert journal.read("a") is not None
    # the key is free: the journal takes it again, with another body
    journal.commit([Accept([make_rollout("e")], replace(chat, body_digest="other"))])


def test_the_number_of_submissions_never_falls(journal):
    journal.commit([Accept([make_rollout("c")], number=7)])
    journal.commit([Accept([make_rollout("d")], number=5)])
    assert journal.recover().num_accepted == 8
    journal.commit([End(end(journal.read("d"))), Ack(["d"])])
    journal.compact()
    assert journal.recover().num_accepted == 8


def test_lists_go_by_order_of_acceptance(journal):
    journal.commit([Accept([make_rollout("c", group_id="grp-2", pool="p")]), Pause(["b"])])
    names = [s.id for s in journal.list(Query())]
    assert names == ["a", "b", "c"]
    [first] = journal.list(Query(limit=1))
    assert [s.id for s in journal.list(Query(after=first.number))] == ["b", "c"]
    assert [s.id for s in journal.list(Query(group_id="grp-2"))] == ["c"]
    assert [s.id for s in journal.list(Query(pool="p"))] == ["c"]
    assert [s.id for s in journal.list(Query(state=RolloutState.PAUSED))] == ["b"]


def test_full_means_no_new_rollouts_and_all_else_goes_on(open_journal):
    journal = open_journal(JournalConfig(max_bytes=2**20))
    journal.commit([Accept([make_rollout("a", prompt_ids=[1] * 2**18)])])
    with pytest.raises(JournalFull, match="1048576"):
        journal.commit([Accept([make_rollout("b")])])
    append(journal, "a", 0, 1)
    journal.commit([End(end(journal.read("a"))), Ack(["a"])])
    journal.commit([Accept([make_rollout("b")])])


def test_a_closed_journal_says_so(journal):
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.commit([])


# token budgets


def open_budget(journal, budget_id, pool, tokens, key=None):
    journal.commit([OpenBudget(Budget(id=budget_id, pool=pool, tokens=tokens), key)])


def budgets_of(journal):
    return {b.id: (b.tokens, b.used, str(b.state)) for b in journal.recover().budgets}


def test_a_budget_counts_what_its_pool_grows_by_while_it_is_open(journal):
    known = make_rollout("c", pool="train")
    journal.commit([Accept([known])])
    append(journal, "c", 0, 2)
    open_budget(journal, "x", "train", 7)
    with pytest.raises(Conflict, match="open budget"):
        open_budget(journal, "y", "train", 7)
    append(journal, "c", 2, 3)
    append(journal, "a", 0, 3)  # of no pool
    assert budgets_of(journal) == {"x": (7, 3, "open")}
    # imports and forks come with tokens that were not sampled here
    fork = journal.read("c")
    fork.id = "d"
    journal.commit([Accept([fork])])
    with pytest.raises(IllegalState, match="x"):
        append(journal, "d", 5, 5)
    assert len(journal.read("d").output_ids) == 5
    # an ending brings its last tokens itself
    grow(fork, ORIGINS[0], make_grown("d", 5, 4))
    journal.commit([End(end(fork))])
    [budget] = journal.recover().budgets
    assert (budget.used, budget.state, budget.ended_s) == (7, "spent", 1000.0)
    append(journal, "c", 5, 1)
    open_budget(journal, "y", "train", 1)
    assert budgets_of(journal) == {"x": (7, 7, "spent"), "y": (1, 0, "open")}


def test_places_of_a_budget_stay(journal):
    journal.commit([OpenBudget(Budget(id="x", pool="train", tokens=7, places=3))])
    open_budget(journal, "y", "eval", 7)
    assert [b.places for b in journal.recover().budgets] == [3, None]
    journal.commit([CloseBudget("x")])
    assert [b.places for b in journal.recover().budgets] == [3, None]


def test_a_closed_budget_counts_no_more_and_is_closed_once(journal, clock):
    journal.commit([Accept([make_rollout("c", pool="train")])])
    open_budget(journal, "x", "train", 7)
    append(journal, "c", 0, 2)
    journal.commit([CloseBudget("x")])
    clock.advance(5)
    journal.commit([CloseBudget("x")])
    append(journal, "c", 2, 2)
    [budget] = journal.recover().budgets
    assert (budget.used, budget.state, budget.ended_s) == (2, "closed", 1000.0)
    with pytest.raises(IllegalState, match="unknown"):
        journal.commit([CloseBudget("unknown")])
    with pytest.raises(Conflict, match="already"):
        open_budget(journal, "x", "other", 7)


def test_a_budget_is_opened_once_under_a_key(journal):
    key = RequestKey("", "/rollouts/budget", "k-2", "digest", created_s=1000.0)
    open_budget(journal, "x", "train", 7, key)
    assert (key, ["x"]) in journal.recover().keys
    with pytest.raises(Conflict, match="k-2"):
        open_budget(journal, "y", "other", 7, key)
    assert budgets_of(journal) == {"x": (7, 0, "open")}


def test_old_budgets_are_forgotten_but_the_newest_of_a_pool(journal, clock):
    for number in range(3):
        open_budget(journal, f"x{number}", "train", 7)
        journal.commit([CloseBudget(f"x{number}")])
        clock.advance(9)
    open_budget(journal, "y", "other", 7)
    clock.advance(1)
    journal.compact()
    # x0 ended 28 s ago, x1 19: keys are retained for 20
    assert list(budgets_of(journal)) == ["x1", "x2", "y"]
    clock.advance(100)
    journal.compact()
    assert list(budgets_of(journal)) == ["x2", "y"]
    open_budget(journal, "z", "train", 1)
    assert list(budgets_of(journal)) == ["x2", "y", "z"]


def test_a_file_has_its_budgets_when_it_is_opened_again(open_journal):
    config = JournalConfig()
    journal = open_journal(config)
    journal.commit([Accept([make_rollout("c", pool="train")])])
    open_budget(journal, "x", "train", 7)
    append(journal, "c", 0, 2)
    open_budget(journal, "y", "other", 7)
    journal.commit([CloseBudget("y")])
    if isinstance(journal, Journal):
        journal = open_journal(config)
    assert budgets_of(journal) == {"x": (7, 2, "open"), "y": (7, 0, "closed")}
    append(journal, "c", 2, 5)
    assert budgets_of(journal)["x"] == (7, 7, "spent")
    assert journal.check() == []
