"""Interesting states, and how often they must be reached in 500 histories.

Whoever changes the simulation so that one of them is no longer reached has a test that fails: a
harness that finds nothing must be shown to have looked.
"""

SEEDS = 500
FLOORS = {
    "a rollout moved": 150,
    "a rollout over several versions": 500,
    "a rollout resumed two versions later, or more": 200,
    "acknowledgement lost, then redelivered": 60,
    "an import was refused": 80,
    "cancel of one that is moving": 40,
    "client crash": 130,
    "client crash in a move": 20,
    "controller crash": 100,
    "controller crash while groups are handed over": 10,
    "controller crash with an open budget": 80,
    "core crash": 120,
    "core crash during a flip": 3,
    "core crash with an open budget": 15,
    "disk full during accept": 150,
    "front crash": 500,
    "front crash between journal and publish": 30,
    "front crash during a flip": 30,
    "front crash in the middle of a commit": 200,
    "front crash with a full disk": 8,
    "front crash with a paused rollout": 90,
    "front crash with an open budget": 70,
    "power lost": 120,
    "purge": 200,
    "purge while exported": 20,
    "the same key again": 130,
    "trainer crash": 140,
    "trainer crash with groups in hand": 40,
    "weights missing after a restart": 10,
    "weights refused": 300,
}
"""About half of what 500 histories reach: the seeds change with every change of the simulation."""


def missed(reached: dict[str, int], num_seeds: int) -> list[str]:
    """A line for each state that was not reached often enough; fewer than 500 seeds prove nothing."""
    if num_seeds < SEEDS:
        return []
    return [
        f"{name}: {reached.get(name, 0)} times, expected {floor * num_seeds // SEEDS} or more"
        for name, floor in FLOORS.items()
        if reached.get(name, 0) < floor * num_seeds // SEEDS
    ]


def table(reached: dict[str, int], histories: dict[str, int]) -> list[str]:
    """name, how often, in how many histories; sorted by name."""
    return [
        f"{reached[name]:>9,}  in {histories[name]:>7,} histories  {name}"
        for name in sorted(reached)
    ]
