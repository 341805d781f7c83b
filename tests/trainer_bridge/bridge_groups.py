"""Groups to send over a bridge: small, each known by its name."""

import array
import random

from everstep.engine.rollout import FinishReason, RolloutState, SamplingParams, Segment
from everstep.engine.trajectory import Trajectory
from everstep.trainer_bridge.protocol import Member, TrajectoryGroup


def column(kind: str, values: list[float] | list[int]) -> bytes:
    return array.array(kind, values).tobytes()


def group(name: str, lengths: list[int]) -> TrajectoryGroup:
    """A group whose members have so many output tokens."""
    return TrajectoryGroup(name=name, members=[member(name, i, n) for i, n in enumerate(lengths)])


def member(name: str, index: int, length: int) -> Member:
    lp = column("f", [-0.5] * length)
    trajectory = Trajectory(
        id=f"{name}/{index}",
        group_id=name,
        index=index,
        prompt_ids=column("i", [1, 2]),
        sampling=SamplingParams(),
        seed=index,
        max_tokens=max(1, length),
        state=RolloutState.FINISHED,
        finish_reason=FinishReason("length"),
        output_ids=column("i", list(range(length))),
        lp_sampled=lp,
        lp_temp=lp,
        kept_mass=column("f", [1.0] * length),
        flags=bytes([1] * length),
        versions=[(1, length)],
        segments=[Segment(0, 1, "d", "n", "c")],
    )
    return Member(trajectory=trajectory, reward=float(index))


class ListSource:
    """Iterations made from a seed; counts what is loaded and what was released."""

    def __init__(self, iterations: list[list[list[int]]]) -> None:
        self.iterations = iterations
        self.loads: list[tuple[int, int]] = []
        self.released = -1

    @classmethod
    def drawn(
        cls, seed: int, *, iterations: int, groups: int = 6, tokens: int = 30
    ) -> "ListSource":
        draw = random.Random(seed)
        return cls(
            [
                [
                    [draw.randint(0, tokens) for _ in range(2)]
                    for _ in range(draw.randint(0, groups))
                ]
                for _ in range(iterations)
            ]
        )

    def names(self, iteration: int) -> list[str]:
        return [f"{iteration}:{index}" for index in range(len(self.iterations[iteration]))]

    def sizes(self, iteration: int) -> list[int]:
        return [sum(lengths) for lengths in self.iterations[iteration]]

    async def load(self, iteration: int, index: int) -> TrajectoryGroup:
        assert iteration > self.released, "loaded after it was acknowledged"
        self.loads.append((iteration, index))
        return group(f"{iteration}:{index}", self.iterations[iteration][index])

    async def release(self, through: int) -> None:
        assert through > self.released
        self.released = through
