"""Interesting states, and how often they must be reached in 500 histories.

Whoever changes the simulation so that one of them is no longer reached has a test that fails: a
harness that finds nothing must be shown to have looked.
"""

SEEDS = 500
FLOORS = {
    "a purge of the driver": 450,
    "a purge while its engine is away": 11,
    "a rollout moved": 190,
    "a rollout over several versions": 440,
    "a rollout resumed two versions later, or more": 170,
    "acknowledgement lost, then redelivered": 110,
    "an engine comes back": 3,
    "an engine stays away": 11,
    "an engine stays away with budget": 2,
    "an import was refused": 60,
    "cancel of one that is moving": 26,
    "client crash": 90,
    "client crash in a move": 16,
    "controller crash": 30,
    "controller crash with an open budget": 27,
    "core crash": 100,
    "core crash during a flip": 4,
    "core crash with an open budget": 15,
    "disk full during accept": 120,
    "driver ended by EngineUnavailable": 80,
    "driver ended by JournalFull": 17,
    "driver ended by WeightsRefused": 40,
    "driver goes on in mid-iteration": 60,
    "driver goes on with a lease that was not answered": 19,
    "driver goes on with groups to deliver": 60,
    "driver killed": 150,
    "driver killed between a commit and the submission that follows": 21,
    "driver killed between the output and its commit": 8,
    "driver killed in the middle of a commit": 3,
    "driver killed while it writes the output": 3,
    "driver killed with a lease that is out": 40,
    "driver killed with groups to deliver": 12,
    "driver stopped by its limit": 130,
    "driver's machine lost power": 70,
    "front crash": 370,
    "front crash between journal and publish": 30,
    "front crash during a flip": 14,
    "front crash in the middle of a commit": 130,
    "front crash with a full disk": 4,
    "front crash with a paused rollout": 100,
    "front crash with an open budget": 40,
    "power lost": 70,
    "purge": 70,
    "purge while exported": 20,
    "the same key again": 110,
    "trainer crash": 90,
    "trainer crash with groups in hand": 26,
    "weights missing after a restart": 10,
    "weights refused": 170,
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
