"""everstep rollout what-if: from a journal to a recommendation."""

import pytest

from everstep.cli import run
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.ops import Accept, Ack, End
from everstep.engine.rollout import RolloutState
from everstep.rollout.trace import Span, read_trace, step_timing
from everstep.trainer_bridge.c3po.length_model import CappedLognormal
from everstep.trainer_bridge.c3po.words import Sample
from tests.engine.journal.drawn import ORIGINS, end, make_rollout

START_S = 1_800_000_000.0


def rollout(number: int, group: int, length: int, **fields):
    """A rollout with tokens, before its ending; a token takes 10 ms."""
    made = make_rollout(
        f"r{number}", group_id=f"g{group}", index=number % 4, created_s=START_S, **fields
    )
    made.output_ids = [1] * length
    made.lp_sampled = made.lp_temp = [-1.0] * length
    made.kept_mass = [1.0] * length
    made.flags = [1] * length
    made.versions = [1] * length
    made.segments = [ORIGINS[0].segment(0)]
    made.first_token_s = START_S + 1
    return made


def ended(made, state=RolloutState.FINISHED):
    end(made, state)
    made.ended_s = START_S + 1 + 0.01 * (len(made.output_ids) - 1)
    return made


@pytest.fixture
def path(tmp_path):
    """40 finished rollouts of 10 prompts, 8 of them acknowledged; one cut, one purged, one failed,
    one that has not begun."""
    lengths = CappedLognormal(median=40, ratio=8)
    path = tmp_path / "run.db"
    journal = Journal.open(path)
    for number in range(40):
        made = rollout(number, number // 4, lengths(Sample(str(number), 0)))
        journal.commit([Accept([make_rollout(made.id, group_id=made.group_id, index=made.index)])])
        journal.commit([End(ended(made))])
    journal.commit([Ack([f"r{number}" for number in range(8)])])
    journal.commit([Accept([rollout(40, 9, 33)])])
    for number, state in ((41, RolloutState.ABORTED), (42, RolloutState.FAILED)):
        made = rollout(number, 9, 12)
        journal.commit([Accept([make_rollout(made.id, group_id=made.group_id)])])
        journal.commit([End(ended(made, state))])
    journal.commit([Accept([make_rollout("r43", group_id="g9")])])
    journal.close()
    return path


def call(capsys, *words):
    code = run(["rollout", "what-if", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_journal_is_read_with_what_of_it_is_known(path):
    reading = read_trace(path)
    assert (reading.num_finished, reading.num_acked) == (40, 8)
    # under way with tokens, and aborted: at least so long
    assert (reading.num_unfinished, reading.num_failed) == (2, 1)
    assert sorted(length for group in reading.trace.unfinished for length in group) == [12, 33]
    assert reading.group == 4
    assert reading.trace.prompt_tokens == 3
    lengths = CappedLognormal(median=40, ratio=8)
    first = [lengths(Sample(str(number), 0)) for number in range(4)]
    # acknowledged ones are known by their length
    assert reading.trace.finished[0] == first


def test_it_recommends_and_says_what_it_stands_on(path, capsys):
    before = path.read_bytes()
    code, out, err = call(capsys, "--journal", path, "--batch", 4)
    assert (code, err) == (0, "")
    assert "40 finished rollouts of 10 prompts (8 acknowledged), 2 cut, 1 failed" in out
    assert "recommended: everstep rollout … --budget " in out
    assert "--group 4" in out
    assert path.read_bytes() == before


def test_what_is_fixed_is_evaluated_alone(path, capsys):
    words = ("--budget", 600, "--capacity", 8, "--retention", 2, "--step-ms", "20,0.5")
    code, out, _ = call(capsys, "--journal", path, *words)
    assert code == 0
    assert "step: 20 ms and 0.5 ms per rollout, as given" in out
    rows = [line.split() for line in out.splitlines() if "×" in line]
    assert [row[:3] for row in rows] == [["600", "8", "2"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", "0"), "budget is 0; accepted: an integer from 1"),
        (("--capacity", "0"), "capacity is 0"),
        (("--retention", "-1"), "retention is -1"),
        (("--group", "0"), "group is 0"),
        (("--batch", "0"), "batch is 0"),
        (("--step-ms", "5"), "step-ms is '5'; accepted: two numbers of milliseconds"),
        (("--step-ms", "nan,1"), "step-ms is 'nan,1'"),
        (("--pool", "rl"), "no finished rollout in pool 'rl'; accepted: '' (40)"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(path, capsys, words, message):
    code, out, err = call(capsys, "--journal", path, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_no_such_file_and_an_empty_journal_are_named(tmp_path, capsys):
    code, _, err = call(capsys, "--journal", tmp_path / "none.db")
    assert (code, "no such file" in err) == (2, True)
    Journal.open(tmp_path / "empty.db").close()
    code, _, err = call(capsys, "--journal", tmp_path / "empty.db")
    assert (code, "no finished rollout" in err) == (2, True)


def test_a_step_s_cost_is_found_in_the_times():
    """n rollouts that begin together and end one by one: a step of n rows takes 20 + 2n ms."""
    fixed_s, row_s, tokens = 0.020, 0.002, 50
    spans, now = [], 0.0
    for index in range(30):
        # the index-th ends after 50 more steps of those that are left
        now += tokens * (fixed_s + row_s * (30 - index))
        spans.append(Span(0.0, now, tokens * (index + 1)))
    timing = step_timing(spans)
    cost = timing.cost
    assert timing.error < 0.01
    assert timing.most == 30
    assert cost.fixed_s == pytest.approx(fixed_s, rel=0.05)
    assert cost.row_s == pytest.approx(row_s, rel=0.05)


def test_times_that_say_nothing_give_no_cost():
    alike = [Span(0.0, 1.0, 100)] * 30
    assert step_timing(alike) is None
    assert step_timing([Span(float(i), i + 1.0, 100) for i in range(5)]) is None
    # most were paused for most of their time
    paused = [Span(0.0, 1.0 + i % 7, 1 + 300 * (i % 5 == 0)) for i in range(40)]
    assert step_timing(paused) is None
