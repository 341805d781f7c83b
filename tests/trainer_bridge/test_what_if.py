"""What is recommended for lengths that were seen."""

import pytest

from everstep.engine.errors import ConfigError
from everstep.trainer_bridge.c3po.length_model import CappedLognormal
from everstep.trainer_bridge.c3po.simulator import StepCost
from everstep.trainer_bridge.c3po.what_if import Question, Trace, what_if
from everstep.trainer_bridge.c3po.words import Sample


def drawn(ratio: float, *, groups: int = 40, size: int = 4) -> Trace:
    lengths = CappedLognormal(median=60, ratio=ratio)
    return Trace(
        finished=[[lengths(Sample(str(g), i)) for i in range(size)] for g in range(groups)],
        cost=StepCost(fixed_s=0.02, row_s=0.0005),
    )


def test_a_heavy_tail_gains_and_what_is_recommended_is_within_the_bounds():
    question = Question(group=4, batch=4, max_lag=8)
    answer = what_if(drawn(12), question)
    best = answer.best
    assert answer.is_fit
    assert best in answer.candidates
    assert best.rollout_speed_up > 1.5
    assert 1 < best.step_speed_up < best.rollout_speed_up
    assert best.purged <= 0.01
    assert best.max_lag <= 8
    assert best.length_bias == pytest.approx(1, abs=0.15)
    assert best.budget == round(4 * 4 * answer.mean_length)
    # less staleness is put up with: less is gained
    careful = what_if(drawn(12), Question(group=4, batch=4, max_lag=2)).best
    assert careful.max_lag <= 2
    assert careful.rollout_speed_up < best.rollout_speed_up


def test_equal_lengths_have_nothing_to_gain_and_nothing_to_lose():
    trace = Trace(finished=[[50] * 4] * 10)
    best = what_if(trace, Question(group=4, batch=8, capacity=16)).best
    assert best.rollout_speed_up == pytest.approx(1, abs=0.01)
    assert (best.purged, best.max_lag, best.length_bias) == (0, 0, 1)


def test_what_is_given_is_kept():
    question = Question(group=4, budget=2000, capacity=7, retention=2)
    (only,) = what_if(drawn(8), question).candidates
    assert (only.budget, only.capacity, only.retention) == (2000, 7, 2)


def test_where_nothing_fits_the_least_purged_is_named_and_said_to_be_unfit():
    trace = Trace(finished=[[1, 1, 1, 400]] * 10)
    answer = what_if(trace, Question(group=4, budget=100, capacity=32, max_lag=1))
    assert not answer.is_fit
    assert answer.best.purged == min(c.purged for c in answer.candidates)


def test_a_rollout_that_was_cut_is_as_long_as_one_that_went_further():
    """So a record that was cut at 100 does not hide a tail up to 1000."""
    whole = [[10, 20], [100, 1000], [30, 900]]
    answer = what_if(Trace(finished=whole), Question(group=2, batch=2, capacity=4))
    cut = Trace(finished=[[10, 20], [100, 1000], [30]], unfinished=[[], [], [150]])
    other = what_if(cut, Question(group=2, batch=2, capacity=4))
    assert other.longest == answer.longest == 1000
    assert other.mean_length == pytest.approx((10 + 20 + 100 + 1000 + 30 + 1000) / 6)
    # beyond the longest that ended nothing is known: it is as long as it was seen
    last = what_if(
        Trace(finished=[[5, 6]], unfinished=[[], [70]]), Question(group=2, batch=2, capacity=4)
    )
    assert last.longest == 70


def test_a_large_batch_is_simulated_by_a_smaller_one():
    answer = what_if(drawn(4), Question(group=4, batch=320, capacity=640, retention=3))
    assert answer.scale == 10
    assert answer.best.capacity == 640


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"group": 0, "batch": 1}, "group is 0; accepted: an integer from 1"),
        ({"batch": 0}, "batch is 0"),
        ({"budget": 0}, "budget is 0"),
        ({"batch": 1, "capacity": 0}, "capacity is 0"),
        ({"batch": 1, "retention": -1}, "retention is -1; accepted: an integer from 0"),
        ({"batch": 1, "max_lag": -1}, "max_lag is -1"),
        ({"batch": 1, "max_purged": 1.5}, "max_purged is 1.5; accepted: from 0 to 1"),
        ({"batch": 1, "training_share": float("nan")}, "training_share is nan"),
        ({}, "batch is none"),
    ],
)
def test_a_bad_question_is_named(question, message):
    with pytest.raises(ConfigError) as error:
        what_if(drawn(2), Question(**{"group": 4, **question}))
    assert str(error.value).startswith(message)


def test_a_trace_without_a_finished_rollout_says_so():
    with pytest.raises(ConfigError, match="no finished rollout"):
        what_if(Trace(finished=[[], []], unfinished=[[5], []]), Question(group=1, batch=1))
