"""What a rollout's reward says beside its group's: GRPO's baseline. Torch-free, float64.

Source: GRPO (arXiv 2402.03300) §4.1.2; whether to divide by the deviation is an option, for the
paper that Everstep follows does not say (DeepSeek-V3.2 and others do not divide).
"""

import math
from collections.abc import Sequence
from typing import Literal

from ...engine.errors import InvalidRequest

Std = Literal["population", "sample", "none"]

EPSILON = 1e-6
"""Added to the standard deviation before the division."""
MAX_REWARD = 1e30
"""The square of a larger one, summed over a group, could overflow."""


def group_advantages(rewards: Sequence[float | None], *, std: Std = "population") -> list[float]:
    """(reward - mean) / (std + 1e-6) of each rollout of one group, in order.

    std      population: divide by n; sample: by n - 1; none: no division
    rewards  None: the rollout has no reward; it gets 0 and is no part of mean and deviation

    All are exactly 0 where no two rewards differ: such a group teaches nothing.
    Raises InvalidRequest, naming the reward, for one that is not a finite number of at most 1e30.
    """
    found = check_rewards(rewards)
    if not has_spread(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(found) / len(found)
    squares = math.fsum((reward - mean) ** 2 for reward in found)
    if std == "none":
        scale = 1.0
    else:
        scale = math.sqrt(squares / (len(found) - (std == "sample"))) + EPSILON
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def has_spread(rewards: Sequence[float | None]) -> bool:
    """Whether two rewards of a group differ; without, its backward pass may be left out.

    Its sequences stay in the denominators of the loss (`BatchSize`).
    """
    found = check_rewards(rewards)
    return bool(found) and min(found) != max(found)


def check_rewards(rewards: Sequence[float | None]) -> list[float]:
    """Those that are there. Raises InvalidRequest as `group_advantages` does."""
    for index, reward in enumerate(rewards):
        if reward is None:
            continue
        if not isinstance(reward, int | float) or not abs(reward) <= MAX_REWARD:
            raise InvalidRequest(
                f"rewards[{index}] must be a finite number of at most {MAX_REWARD:g}, "
                f"got {reward!r}",
                field="rewards",
            )
    return [float(reward) for reward in rewards if reward is not None]
