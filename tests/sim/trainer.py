"""A trainer stub: it takes groups, trains on them, and publishes the next version.

What it has consumed and the version are in its checkpoint, which is written whole; a group is
acknowledged once a checkpoint knows it. Whatever it held besides is lost when it dies.
"""

import asyncio
import contextlib
import random
from typing import Any

from .history import History
from .language import BASE
from .loop import Process, SimLoop
from .network import Network, NoAnswer, Refused
from .profile import Profile


class Trainer:
    def __init__(
        self,
        loop: SimLoop,
        network: Network,
        history: History,
        profile: Profile,
        rng: random.Random,
        fronts: tuple[str, ...],
        mended: tuple[str, ...] = (),
    ) -> None:
        self._loop, self._network, self._history = loop, network, history
        self._profile, self._rng, self._fronts = profile, rng, fronts
        self._mended = mended
        """Fronts that somebody else serves versions: they are told only of weights they lack."""
        self.process: Process | None = None
        self.version = BASE
        self.made: dict[str, int] = {}
        """The checkpoint too: group → the version that it came to."""
        self.consumed: dict[str, Any] = {}
        """The checkpoint: group → what was in it."""
        self._held: dict[str, Any] = {}
        self._acknowledged: set[str] = set()
        """Nothing that the trainer knows: for counting."""
        self.serving: dict[str, int] = {}
        """Front → the version that it said it serves."""

    def start(self) -> None:
        if self.process is None or self.process.is_dead:
            self.process = Process(self._loop, "trainer")
            self._held = {}
            self._network.serve("trainer", self.process, self._handle)
            self.process.spawn(self._train())
            for front in self._fronts:
                self.process.spawn(self._publish(front))
            for front in self._mended:
                self.process.spawn(self._mend(front))

    def crash(self) -> None:
        if self.process is not None and not self.process.is_dead:
            self._history.sometimes("trainer crash")
            self._history.sometimes("trainer crash with groups in hand", bool(self._held))
            self._history.note("trainer", "crash")
            self.process.kill()
            self._loop.outside(0.1 + self._rng.random() * 0.3, self.start)

    async def _handle(self, method: str, values: dict[str, Any]) -> int:
        """Whether the group is in a checkpoint, or under "train" the version that it came to; it is
        taken if it is new."""
        is_in = self._offer(values)
        return self.made[values["group"]] if is_in and method == "train" else is_in

    def _offer(self, values: dict[str, Any]) -> bool:
        group, rollouts = values["group"], values["rollouts"]
        self._history.note("trainer", "offered", group=group, rollouts=rollouts)
        if group in self.consumed:
            is_again = group in self._acknowledged
            self._history.sometimes("acknowledgement lost, then redelivered", is_again)
            self._acknowledged.add(group)
            return True
        self._held.setdefault(group, rollouts)
        return False

    async def _train(self) -> None:
        waited_s = 0.0
        while True:
            await asyncio.sleep(0.02)
            waited_s += 0.02
            is_due = len(self._held) >= self._profile.batch_groups or waited_s > 0.5
            # an iteration of a run is a batch by itself
            if not (self._held and is_due) and not any(g.startswith("r") for g in self._held):
                continue
            waited_s = 0.0
            batch = dict(list(self._held.items())[: self._profile.batch_groups])
            await asyncio.sleep(self._profile.train_s * self._rng.random())
            # one write: the checkpoint has both or neither
            self.version += 1
            for group in batch:
                self.consumed[group] = self._held.pop(group)
                self.made[group] = self.version
            self._history.note("trainer", "trained", groups=tuple(batch), version=self.version)

    async def _mend(self, front: str) -> None:
        """Bring the weights back that a front waits for."""
        while True:
            await asyncio.sleep(0.3)
            process = self.process
            assert process is not None
            with contextlib.suppress(NoAnswer, Refused):
                await self._network.call(process, front, "mend", 1.0)

    async def _publish(self, front: str) -> None:
        """Tell a front of the newest version until it serves it, and again now and then: it may
        have lost its weights since."""
        idle_s = 0.0
        while True:
            pause_s = 0.01 + 0.02 * self._rng.random()
            await asyncio.sleep(pause_s)
            version, idle_s = self.version, idle_s + pause_s
            if version == BASE or (self.serving.get(front) == version and idle_s < 0.3):
                continue
            idle_s = 0.0
            try:
                process = self.process
                assert process is not None
                self.serving[front] = await self._network.call(
                    process, front, "update", 1.0, version=version
                )
            except (NoAnswer, Refused):
                self.serving.pop(front, None)
