"""Which sequences a trainer scores beside its weights."""

import numpy as np
import pytest

from everstep.trainer_bridge.trainer.canaries import texts_of
from everstep.trainer_bridge.trainer.packing import TrainSequence
from everstep.trainer_bridge.trajectories.samples import Group, Sample


def group(num_prompt: int, num_response: int) -> Group:
    sequence = TrainSequence(np.arange(num_prompt + num_response), num_prompt)
    nothing = np.zeros(num_response, dtype=np.float32), np.zeros(num_response, dtype=np.int64)
    return Group("g", (Sample(sequence, *nothing),))


@pytest.mark.parametrize(
    ("lengths", "num_ids", "num_prompt"),
    [
        ((5, 20), 25, 5),
        ((5, 500), 128, 5),
        ((127, 500), 128, 127),
        # nothing of the response fits
        ((128, 3), 128, 64),
        ((4000, 3), 128, 64),
    ],
)
def test_every_sample_is_one_however_long_its_prompt(
    lengths: tuple[int, int], num_ids: int, num_prompt: int
) -> None:
    [(ids, given)] = texts_of([group(*lengths)], 4)
    assert ids == list(range(num_ids))
    assert given == num_prompt


def test_there_are_no_more_than_asked_for_and_one_of_a_group() -> None:
    groups = [Group("empty", ()), *(group(n, 3) for n in (2, 3, 4))]
    assert [given for _, given in texts_of(groups, 2)] == [2, 3]
    assert texts_of([], 4) == []
