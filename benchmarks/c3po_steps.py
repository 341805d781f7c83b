"""What a step of the engine costs by the rollouts in it, and what full steps can gain at best.

The gain in time that C3PO++ can have is decided by that cost: a full step takes longer than a
nearly empty one. Both are taken in one run, on one engine.
"""

import asyncio
import itertools
import statistics
from collections.abc import Mapping, Sequence

from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.rollout import SamplingParams

STEPS = 48
ROUNDS = 5


def row_counts(capacity: int) -> list[int]:
    """1, 2, 4, … and Ω."""
    powers = itertools.takewhile(lambda n: n < capacity, (2**k for k in itertools.count()))
    return [*powers, capacity]


async def step_costs(
    manager: RolloutManager, prompt: Sequence[int], capacity: int
) -> dict[int, float]:
    """Rollouts in a step → its seconds, as whoever waits for its tokens sees it; medians, the
    counts taking turns."""
    found: dict[int, list[float]] = {count: [] for count in row_counts(capacity)}
    for _ in range(ROUNDS):
        for count, seconds in found.items():
            seconds.append(await _step_s(manager, prompt, count))
    return {count: statistics.median(seconds) for count, seconds in found.items()}


async def _step_s(manager: RolloutManager, prompt: Sequence[int], count: int) -> float:
    """Of rollouts that begin and end together, between their first token and their last."""
    sampling = SamplingParams(max_tokens=STEPS, ignore_eos=True, record=("lp_raw",))
    work = [Submission(prompt_ids=list(prompt), sampling=sampling) for _ in range(count)]
    accepted = await manager.accept(work)
    rollouts = await asyncio.gather(*map(manager.wait, accepted.rollout_ids))
    await manager.acknowledge(accepted.rollout_ids)
    first_s = [r.first_token_s for r in rollouts if r.first_token_s is not None]
    ended_s = [r.ended_s for r in rollouts if r.ended_s is not None]
    return (max(ended_s) - min(first_s)) / (STEPS - 1)


def cost_of(costs: Mapping[int, float], rows: int) -> float:
    """Between the counts that were measured, linear."""
    above = min(count for count in costs if count >= rows)
    below = max((count for count in costs if count <= rows), default=above)
    if above == below:
        return costs[above]
    share = (rows - below) / (above - below)
    return costs[below] + share * (costs[above] - costs[below])


def bound(costs: Mapping[int, float], batches: Sequence[Sequence[int]], capacity: int) -> float:
    """How many times faster than these synchronous batches of Ω rollouts an engine is whose every
    step has Ω, where nothing but steps takes time.

    batches  their lengths
    """
    seconds = 0.0
    for lengths in batches:
        before = 0
        for done, length in enumerate(sorted(lengths)):
            if length > before:
                seconds += (length - before) * cost_of(costs, capacity - done)
                before = length
    tokens = sum(map(sum, batches))
    return (seconds / tokens) / (cost_of(costs, capacity) / capacity)
