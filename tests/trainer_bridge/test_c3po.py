"""The controller, case by case: where the paper is silent, and what a driver meets."""

import pytest

from everstep.engine.errors import ConfigError, IllegalState, LedgerError
from everstep.trainer_bridge.c3po.c3po import C3po
from everstep.trainer_bridge.c3po.config import C3poConfig
from everstep.trainer_bridge.c3po.words import (
    Abandoned,
    Done,
    Open,
    Purge,
    Sample,
    Span,
    Stop,
    Submit,
    Train,
)


def make(*prompts: str, **values) -> C3po:
    """A machine whose stream holds `prompts` and has ended."""
    machine = C3po(C3poConfig(**{"budget": 100, "capacity": 4, **values}))
    machine.extend(prompts)
    machine.end_stream()
    return machine


def turn(machine: C3po, version: int | None = None) -> list:
    """The iteration ends, the trainer trains, the next begins: what that begins with."""
    machine.settled()
    done = machine.trained(machine.iteration + 1 if version is None else version)
    return done or machine.begin()


A, B, C, D = (Sample(name, 0) for name in "abcd")


def again(sample: Sample, attempt: int = 1) -> Sample:
    return Sample(sample.prompt, sample.index, attempt)


def test_the_budget_is_opened_before_anything_is_submitted():
    assert make("a", "b", capacity=1).begin() == [Open(0, 100), Submit(A)]


def test_mode_completed_has_no_bound_on_sampled_tokens():
    machine = make("a", mode="completed", budget=2)
    assert machine.begin() == [Open(0, None), Submit(A)]
    assert machine.grew(A, 50, 0) == []
    assert machine.ended(A, "stop", 50) == [Stop(0)]


def test_nothing_to_do_is_done_at_once():
    machine = make()
    assert machine.begin() == [Done()]
    assert machine.begin() == [Done()]


def test_a_pool_that_waits_for_prompts_goes_on_when_they_come():
    machine = C3po(C3poConfig(budget=9, capacity=2, group=2))
    assert machine.wants_prompts == 1
    assert machine.begin() == [Open(0, 9)]
    assert machine.extend(["a"]) == [Submit(Sample("a", 0)), Submit(Sample("a", 1))]
    machine.ended(Sample("a", 0), "stop", 0)
    machine.ended(Sample("a", 1), "stop", 0)
    assert machine.wants_prompts == 1
    assert machine.end_stream() == [Stop(0)]
    assert machine.wants_prompts == 0


def test_the_last_token_and_the_ending_that_it_brings_belong_to_the_iteration():
    machine = make("a", "b", budget=3, capacity=1)
    machine.begin()
    assert machine.grew(A, 3, 0) == [Stop(0)]
    # no place is filled once the budget is spent
    assert machine.ended(A, "stop", 3) == []
    (train,) = machine.settled()
    assert [group.prompt for group in train.groups] == ["a"]
    assert machine.trained(1) == []
    assert machine.begin() == [Open(1, 3), Submit(B)]


def test_resumed_rollouts_come_before_the_stream_in_admission_order():
    machine = make("a", "b", "c", "d", capacity=3)
    machine.begin()
    for sample in (C, A, B):
        machine.grew(sample, 1, 0)
    machine.ended(B, "stop", 1)
    assert list(machine.pool) == [A, C, D]
    turn(machine)
    assert list(machine.pool) == [A, C, D]


def test_a_purge_goes_to_the_tail_and_a_failure_to_the_head_of_the_stream():
    machine = make("a", "b", "c", "d", capacity=2, retention=0)
    machine.begin()
    machine.grew(A, 1, 0)
    assert machine.ended(B, "error", 0) == [Submit(again(B))]
    assert turn(machine) == [Purge(A, "age"), Open(1, 100), Submit(C)]
    assert machine.stream == [D, again(A)]


def test_a_loss_repeats_the_same_attempt_so_that_crashes_do_not_favour_short_rollouts():
    machine = make("a", "b")
    machine.begin()
    machine.grew(A, 7, 0)
    assert machine.lost(A) == [Submit(A)]
    assert machine.books.regenerated == 7
    assert machine.pool[A].spans == []


def test_a_failing_sample_is_tried_a_bounded_number_of_times():
    machine = make("a", "b", group=2, max_reissues=2)
    machine.begin()
    first, second = Sample("a", 0), Sample("a", 1)
    machine.grew(first, 4, 0)
    machine.ended(first, "stop", 4)
    tries = 0
    commands = []
    while not any(isinstance(command, Abandoned) for command in commands):
        machine.grew(again(second, tries), 1, 0)
        commands = machine.ended(again(second, tries), "error", 1)
        tries += 1
    assert tries == 3
    assert commands[0] == Purge(first, "abandoned")
    assert "failed at attempt 2" in commands[1].reason
    assert machine.num_abandoned == 1
    books = machine.books
    # the last attempt is not sampled again, and the finished sibling goes with it
    assert (books.regenerated, books.cancelled, books.held) == (2, 5, 0)


def test_losses_are_bounded_too():
    machine = make("a", max_reissues=1)
    machine.begin()
    assert machine.lost(A) == [Submit(A)]
    _, stop = machine.lost(A)
    assert stop == Stop(0)
    assert turn(machine) == [Done()]


def test_max_reissues_0_removes_what_is_purged_as_the_paper_s_listing_does():
    machine = make("a", "b", retention=0, max_reissues=0)
    machine.begin()
    machine.grew(A, 1, 0)
    purge, abandoned, *rest = turn(machine)
    assert purge == Purge(A, "age")
    assert abandoned.prompt == "a"
    assert rest == [Open(1, 100)]
    assert list(machine.pool) == [B]


def test_siblings_that_are_too_old_together_are_purged_once_when_the_group_is_given_up():
    machine = make("a", group=3, retention=0, max_reissues=0)
    machine.begin()
    for index in range(3):
        machine.grew(Sample("a", index), 1, 0)
    commands = turn(machine)
    purges = [(command.sample.index, command.reason) for command in commands[:3]]
    assert purges == [(0, "age"), (1, "abandoned"), (2, "abandoned")]
    assert isinstance(commands[3], Abandoned)
    assert commands[4:] == [Open(1, 100), Stop(1)]
    assert turn(machine) == [Done()]
    assert machine.total.purged == 1
    assert machine.total.cancelled == 2


def test_tokens_of_a_rollout_that_was_given_up_meanwhile_still_count():
    machine = make("a", group=2, budget=10, max_reissues=0)
    machine.begin()
    first, second = Sample("a", 0), Sample("a", 1)
    machine.grew(first, 3, 0)
    machine.ended(second, "abort", 0)
    assert machine.grew(first, 2, 0) == []
    assert machine.counted == 5
    assert machine.books.cancelled == 5
    assert machine.ended(first, "abort", 5) == []


def test_a_group_whose_oldest_token_lags_too_far_is_sampled_anew():
    machine = make("a", "b", group=2, capacity=3, max_lag=1, retention=9)
    machine.begin()
    done, live, untouched = Sample("a", 0), Sample("a", 1), Sample("b", 0)
    machine.grew(done, 2, 0)
    machine.ended(done, "stop", 2)
    machine.grew(live, 1, 0)
    assert turn(machine) == [Open(1, 100)]
    commands = turn(machine)
    assert commands[:2] == [Purge(live, "lag"), Purge(done, "lag")]
    assert next(iter(machine.pool)) == untouched
    assert list(machine.pool)[-1] == again(done)
    assert machine.stream == [again(live)]
    assert machine.books.purged == 3


def test_admission_is_paced_by_what_the_trainer_takes():
    machine = make(*"abcdef", max_staleness=1, consumer_batch=2, capacity=6)
    assert [c.sample.prompt for c in machine.begin() if isinstance(c, Submit)] == list("abcd")
    machine.ended(A, "stop", 0)
    assert machine.stream == [Sample("e", 0), Sample("f", 0)]
    assert turn(machine) == [Open(1, 100), Submit(Sample("e", 0)), Submit(Sample("f", 0))]


def test_an_iteration_that_may_admit_nobody_ends_and_the_next_may():
    machine = make("a", "b", "c", max_staleness=0, consumer_batch=1)
    machine.begin()
    assert machine.ended(A, "stop", 0) == [Stop(0)]
    assert turn(machine) == [Open(1, 100), Submit(B)]


def test_what_the_trainer_gets_says_under_which_versions_it_was_sampled():
    machine = make("a", group=2)
    machine.begin()
    first, second = Sample("a", 0), Sample("a", 1)
    machine.grew(second, 1, 0)
    machine.ended(second, "stop", 1)
    machine.grew(first, 2, 0)
    turn(machine, version=4)
    machine.grew(first, 3, 4)
    machine.grew(first, 1, 4)
    machine.ended(first, "length", 6)
    ((train),) = machine.settled()
    assert isinstance(train, Train)
    (group,) = train.groups
    assert [member.sample for member in group.samples] == [first, second]
    assert group.samples[0].spans == (Span(2, 0), Span(4, 4))
    assert (group.num_tokens, group.oldest_version) == (7, 0)


def test_a_member_that_the_trainer_has_cannot_be_lost():
    machine = make("a")
    machine.begin()
    machine.ended(A, "stop", 0)
    machine.settled()
    with pytest.raises(IllegalState, match="with the trainer"):
        machine.lost(A)


def test_a_token_beyond_the_budget_is_refused():
    machine = make("a", budget=5)
    machine.begin()
    machine.grew(A, 3, 0)
    with pytest.raises(LedgerError, match="beyond the budget of 5"):
        machine.grew(A, 3, 0)
    assert machine.counted == 3


def test_a_driver_that_was_restarted_is_told_again_what_to_do():
    machine = make("a", "b", "c", capacity=2, retention=0)
    machine.begin()
    machine.grew(A, 1, 0)
    assert machine.outstanding() == [Open(0, 100), Submit(A), Submit(B)]
    turn(machine)
    assert machine.outstanding() == [Purge(A, "age"), Open(1, 100), Submit(B), Submit(C)]
    machine.ended(B, "stop", 0)
    (train,) = machine.settled()
    assert machine.outstanding()[-1] == train
    assert C3po.restore(machine.snapshot()).outstanding() == machine.outstanding()


@pytest.mark.parametrize("name", ["group", "budget", "mode"])
def test_a_run_cannot_change_in_the_middle_what_it_stands_on(name):
    machine = make("a", "b")
    machine.begin()
    other = {"group": 2, "budget": 7, "mode": "completed"}[name]
    config = C3poConfig(**{"budget": 100, "capacity": 4, name: other})
    with pytest.raises(ConfigError, match=f"^{name} is {other!r}; accepted: "):
        C3po.restore(machine.snapshot(), config)


def test_a_trainer_that_goes_back_takes_the_version_with_it():
    machine = make("a", "b", group=1, capacity=2)
    machine.begin()
    machine.grew(A, 3, 0)
    turn(machine, 4)
    machine.grew(A, 2, 4)
    turn(machine, 5)
    machine.grew(A, 1, 5)
    with pytest.raises(IllegalState, match="version 5 after 5: that is not back"):
        machine.turned(5)
    machine.turned(2)
    assert machine.version == 2
    assert machine.pool[A].spans == [Span(3, 0), Span(2, 2, 2), Span(1, 2, 3)]
    # a token that version 5 sampled before it was gone back from is told late
    machine.grew(A, 1, 5)
    machine.grew(A, 4, 2)
    assert str(machine.pool[A].spans[-1]) == "4@2"
    assert str(machine.pool[A].spans[-2]) == "2@2+3"
    with pytest.raises(IllegalState, match="unless a trainer went back"):
        machine.grew(A, 1, 1)
    assert machine.books.sampled == 6
    machine.settled()
    # what was undone is trained again: the iteration's own version is the next that comes
    machine.trained(6)
    machine.begin()
    machine.settled()
    with pytest.raises(IllegalState, match="versions never decrease"):
        machine.trained(5)


def test_lag_counts_the_updates_there_and_back():
    """Undone weights are as far away as the way back to where they parted, and on from there."""
    for back, is_purged in ((4, False), (3, True)):
        machine = make("a", "b", max_lag=1, capacity=1)
        machine.begin()
        turn(machine, 5)
        machine.grew(A, 3, 5)
        machine.turned(back)
        commands = turn(machine, back)
        assert (Purge(A, "lag") in commands) == is_purged


def test_going_back_twice_adds_up_and_outlives_the_process():
    machine = make("a")
    machine.begin()
    turn(machine, 9)
    machine.grew(A, 1, 9)
    machine.turned(6)
    machine = C3po.restore(machine.snapshot())
    machine.grew(A, 1, 9)
    machine.turned(2)
    assert machine.pool[A].spans == [Span(2, 2, 7)]
    assert machine.pool[A].spans[0].standing == -5


def test_admission_counts_iterations_which_never_go_back():
    machine = make(*"abcd", max_staleness=0, consumer_batch=1, capacity=4)
    machine.begin()
    assert list(machine.pool) == [A]
    turn(machine, 7)
    machine.turned(1)
    # nothing has ended, so one more iteration lets one more in
    assert list(machine.pool) == [A, B]
    turn(machine, 8)
    assert list(machine.pool) == [A, B, C]


def test_between_iterations_the_budget_may_change():
    machine = make("a", "b")
    machine.begin()
    machine.settled()
    machine.trained(1)
    other = C3po.restore(machine.snapshot(), C3poConfig(budget=7, capacity=1, retention=0))
    assert other.begin()[0] == Open(1, 7)


def test_a_state_that_does_not_balance_is_refused():
    machine = make("a")
    machine.begin()
    machine.grew(A, 3, 0)
    state = machine.snapshot()
    state.pool[0].spans[0] = Span(2, 0)
    with pytest.raises(LedgerError, match="iteration 0: account carried says 3 tokens, counted"):
        C3po.restore(state)


def test_a_state_of_another_format_is_refused():
    state = make("a").snapshot()
    state.format = 99
    with pytest.raises(ConfigError, match="format is 99; accepted: 1"):
        C3po.restore(state)
