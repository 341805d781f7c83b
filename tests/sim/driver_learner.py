"""The trainer's end of a run: the shipped learner, over a spool, rewards and a sender that stand in.

The spool is on the driver's disk; the sender offers an iteration to the trainer of the simulation
until that has it in a checkpoint, and is told the version that it came to.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from msgspec.structs import replace

from everstep.engine.messages import KVPolicy
from everstep.engine.trajectory import unpack
from everstep.trainer_bridge.protocol import Trained, TrajectoryGroup
from everstep.trainer_bridge.run.learner import BridgeLearner
from everstep.trainer_bridge.run.parts import Groups
from everstep.trainer_bridge.trajectories.spool import Serving

from .driver_disk import DriverDisk
from .driver_engine import WatchedEngine
from .language import digest_of, folder_of
from .loop import Process
from .network import Network, NoAnswer, Refused

DEADLINE_S = 60.0
LINEAGE = "the only life of the trainer"


class SimSpool:
    """Iterations, and what is served, on the driver's disk; one is there whole or not at all."""

    def __init__(self, disk: DriverDisk) -> None:
        self._disk, self._owner = disk, disk.file
        self.serving: Serving | None = disk.serving

    @property
    def _is_live(self) -> bool:
        return self._disk.file is self._owner

    @property
    def iterations(self) -> list[int]:
        return sorted(self._disk.spool)

    def add(self, iteration: int, groups: Sequence[TrajectoryGroup]) -> None:
        if self._is_live:
            self._disk.spool.setdefault(iteration, list(groups))

    def serve(self, serving: Serving) -> None:
        if self._is_live:
            self._disk.serving = self.serving = serving

    def sizes(self, iteration: int) -> Sequence[int]:
        return [group.num_tokens for group in self._disk.spool[iteration]]

    async def load(self, iteration: int, index: int) -> TrajectoryGroup:
        return self.read(iteration)[index]

    def read(self, iteration: int) -> list[TrajectoryGroup]:
        found: list[TrajectoryGroup] = self._disk.spool[iteration]
        return found

    def release(self, through: int) -> None:
        if self._is_live:
            for iteration in [i for i in self._disk.spool if i <= through]:
                del self._disk.spool[iteration]

    def remove(self) -> None:
        if self._is_live:
            self._disk.spool.clear()
            self._disk.serving = None


class SimSender:
    """Speaks with the trainer over the network of the simulation."""

    def __init__(
        self, spool: SimSpool, network: Network, process: Process, rng: random.Random, acked: int
    ) -> None:
        self._spool, self._network, self._process, self._rng = spool, network, process, rng
        self.dealer = SimpleNamespace(
            acked=acked, lineage=LINEAGE, begun=None, serving="", stranger=""
        )
        self._announced: set[int] = set()

    async def start(self) -> str:
        return "the simulation"

    def announce(self, iteration: int) -> None:
        self._announced.add(iteration)

    async def trained(self, iteration: int, deadline_s: float) -> Trained:
        assert iteration in self._announced
        rollouts = {
            member.trajectory.id: _shown(unpack(member.trajectory))
            for group in self._spool.read(iteration)
            for member in group.members
        }
        while not (version := await self._ask(iteration, rollouts)):
            await asyncio.sleep(0.02 + 0.05 * self._rng.random())
        # a trainer says now or later that it holds an iteration durably
        self._spool.release(iteration - self._rng.randint(0, 1))
        return Trained(iteration, version, digest_of(version), folder_of(version))

    async def _ask(self, iteration: int, rollouts: dict[str, Any]) -> int:
        try:
            version: int = await self._network.call(
                self._process, "trainer", "train", 0.5, group=f"r{iteration}", rollouts=rollouts
            )
        except (NoAnswer, Refused):
            return 0
        return version

    async def changed(self, is_so: Callable[[], bool]) -> None:
        """This trainer never goes back."""
        await asyncio.Event().wait()

    async def finish(
        self, reason: str, patience_s: float, *, needs: Sequence[str], is_over: bool
    ) -> None:
        return None

    async def close(self) -> None:
        return None


def _shown(rollout: Any) -> dict[str, Any]:
    return {
        "ids": tuple(rollout.output_ids),
        "lps": tuple(rollout.lp_sampled),
        "versions": tuple(rollout.versions),
    }


class SimScorer:
    """Every sample earns as many points as it has tokens."""

    async def score(self, groups: Groups) -> Groups:
        await asyncio.sleep(0.001)
        return [[replace(m, reward=float(len(m.rollout.output_ids))) for m in g] for g in groups]


def learner(
    disk: DriverDisk,
    engines: Sequence[WatchedEngine],
    network: Network,
    process: Process,
    rng: random.Random,
    *,
    iteration: int,
    kv: KVPolicy,
    on_note: Callable[[str], None],
) -> BridgeLearner:
    """As `Training.learner` makes it, for a run that stands at this iteration."""
    spool = SimSpool(disk)
    acked = min(spool.iterations, default=iteration) - 1
    parts: Any = (SimSender(spool, network, process, rng, acked), spool, SimScorer(), engines)
    return BridgeLearner(*parts, kv=kv, deadline_s=DEADLINE_S, outlives=True, on_note=on_note)
