"""An iteration's budget, dealt to engines in slices that never add up to more than it.

One engine gets all at once. Several get slices that shrink as the budget does, so that a slow one
holds little at the end, and what an engine gives back is dealt again. What a lost engine had is
not: nobody knows whether it was sampled.
"""

from collections.abc import Iterable, Mapping

from ..run.words import Lease

# a rollout at an engine gets at least so many tokens out of a slice
_LEAST_PER_ROLLOUT = 8


def left_of(budget: int, leases: Iterable[Lease]) -> int:
    """Tokens that can still be dealt: all but what is out, was used, or is lost."""
    out = 0
    for lease in leases:
        assert lease.tokens is not None
        out += lease.used if lease.state == "over" else lease.tokens
    assert out <= budget, f"{out} tokens were dealt out of {budget}"
    return budget - out


def slices(left: int, live: Mapping[str, int], idle: Iterable[str]) -> dict[str, int]:
    """What to lease to whom now.

    live  rollouts at each engine that can be reached
    idle  those of them that hold no lease
    """
    num_busy = sum(count > 0 for count in live.values())
    found: dict[str, int] = {}
    for engine in idle:
        count = live.get(engine, 0)
        if not count or not left:
            continue
        size = left if num_busy == 1 else max(left // (2 * num_busy), _LEAST_PER_ROLLOUT * count)
        found[engine] = min(size, left)
        left -= found[engine]
    return found


def emptiest(live: Mapping[str, int], siblings: Mapping[str, int]) -> str:
    """Where a new rollout goes: the engine with the fewest; among equals where its group is, whose
    prompt is in that cache already."""
    return min(live, key=lambda engine: (live[engine], -siblings.get(engine, 0), engine))
