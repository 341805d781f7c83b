"""Interesting states, and how often they must be reached in 500 histories.

Whoever changes the simulation so that one of them is no longer reached has a test that fails: a
harness that finds nothing must be shown to have looked.
"""

SEEDS = 500
FLOORS = {
    "a purge of the driver": 410,
    "a rollout moved": 160,
    "a rollout over several versions": 400,
    "a rollout resumed two versions later, or more": 150,
    "acknowledgement lost, then redelivered": 100,
    "an engine stays away": 6,
    "an import was refused": 50,
    "cancel of one that is moving": 22,
    "client crash": 80,
    "client crash in a move": 14,
    "controller crash": 27,
    "controller crash with an open budget": 24,
    "core crash": 90,
    "core crash during a flip": 4,
    "core crash with an open budget": 13,
    "disk full during accept": 120,
    "disk full during open_budget of the driver": 25,
    "disk full during submit of the driver": 4,
    "driver ended by EngineUnavailable": 70,
    "driver ended by JournalFull": 5,
    "driver ended by WeightsRefused": 50,
    "driver goes on in mid-iteration": 50,
    "driver goes on with a lease that was not answered": 15,
    "driver goes on with groups to deliver": 60,
    "driver killed": 130,
    "driver killed between a commit and the submission that follows": 18,
    "driver killed between the output and its commit": 8,
    "driver killed in the middle of a commit": 2,
    "driver killed while it writes the output": 3,
    "driver killed with a lease that is out": 30,
    "driver killed with a purge under way": 1,
    "driver killed with groups to deliver": 12,
    "driver stopped by its limit": 120,
    "driver's machine lost power": 60,
    "front crash": 330,
    "front crash between journal and publish": 30,
    "front crash during a flip": 12,
    "front crash in the middle of a commit": 110,
    "front crash with a full disk": 4,
    "front crash with a paused rollout": 90,
    "front crash with an open budget": 30,
    "power lost": 70,
    "purge": 60,
    "purge while exported": 18,
    "the same key again": 100,
    "trainer crash": 80,
    "trainer crash with groups in hand": 21,
    "weights missing after a restart": 8,
    "weights refused": 120,
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
