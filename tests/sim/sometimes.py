"""Interesting states, and how often they must be reached in 500 histories.

Whoever changes the simulation so that one of them is no longer reached has a test that fails: a
harness that finds nothing must be shown to have looked.
"""

SEEDS = 500
FLOORS = {
    "a rollout moved": 150,
    "acknowledgement lost, then redelivered": 40,
    "an import was refused": 80,
    "cancel of one that is moving": 40,
    "client crash": 150,
    "client crash in a move": 15,
    "core crash": 150,
    "core crash during a flip": 4,
    "disk full during accept": 200,
    "front crash": 400,
    "front crash between journal and publish": 30,
    "front crash during a flip": 40,
    "front crash in the middle of a commit": 150,
    "front crash with a full disk": 10,
    "front crash with a paused rollout": 50,
    "power lost": 120,
    "the same key again": 120,
    "trainer crash": 150,
    "trainer crash with groups in hand": 40,
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
