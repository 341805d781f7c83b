"""Group advantages: sums, scales, groups that teach nothing, rewards that are no numbers."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine.errors import InvalidRequest
from everstep.trainer_bridge.losses.advantages import group_advantages, has_spread

rewards = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=1, max_size=9)


@given(rewards, st.sampled_from(["population", "sample", "none"]))
def test_advantages_are_the_statistics_of_the_group(group, std):
    found = group_advantages(group, std=std)
    if len(set(group)) == 1:
        assert found == [0.0] * len(group)
        return
    deviation = {"population": statistics.pstdev, "sample": statistics.stdev}.get(std)
    scale = deviation(group) + 1e-6 if deviation else 1.0
    mean = statistics.mean(group)
    assert found == pytest.approx([(r - mean) / scale for r in group], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("value", [0, 1.0, 0.1, -3, True])
@pytest.mark.parametrize("std", ["population", "sample", "none"])
def test_a_group_without_spread_teaches_nothing(value, std):
    for size in (1, 3, 7):
        assert group_advantages([value] * size, std=std) == [0.0] * size
        assert not has_spread([value] * size)


def test_a_rollout_without_reward_is_no_part_of_the_baseline():
    assert group_advantages([1.0, None, 0.0], std="none") == [0.5, 0.0, -0.5]
    assert group_advantages([1.0, None, 1.0]) == [0.0, 0.0, 0.0]
    assert group_advantages([None, None]) == [0.0, 0.0]
    assert group_advantages([]) == []
    assert has_spread([None, 1.0, 0.0])
    assert not has_spread([None, 1.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e31, "1", [1.0]])
def test_what_is_no_number_is_refused_by_name(bad):
    for call in (group_advantages, has_spread):
        with pytest.raises(InvalidRequest, match=r"rewards\[2\] must be a finite number") as caught:
            call([0.0, 1.0, bad])
        assert caught.value.field == "rewards"


def test_the_largest_rewards_stay_finite():
    assert all(map(math.isfinite, group_advantages([1e30, -1e30, 0.0])))
