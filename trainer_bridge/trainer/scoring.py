"""What responses of files earn, where the run has a reward of its own: scored once, when they are
read, by worker processes of the first rank."""

import contextlib
import json
import time
from collections.abc import Sequence

from ...engine import log
from ...engine.errors import ConfigError, MissingExtra
from ..rewards.rewards import RewardConfig, RewardSample
from ..rewards.workers import RewardOutcome, Rewards
from .sharding import World

_TELL_S = 10.0
# samples of a piece for each worker, where nobody waits for it
_ALONE = 64


class FileScorer:
    """A `Score` of trajectories/files.py: every rank calls, and has the same rewards.

    timeout_s  how long the other ranks wait for the first; they are told of a piece at a time
    """

    def __init__(self, config: RewardConfig, world: World, timeout_s: float) -> None:
        self._config, self._world = config, world
        longest_s = config.deadline_s + config.start_deadline_s
        # at the end of a piece a worker may have nothing to do
        for_each = _ALONE if world.size == 1 else max(1, int(timeout_s / 2 / longest_s))
        self._piece = config.workers * for_each
        self.num_failed = 0

    def __call__(self, samples: Sequence[RewardSample]) -> list[float | None]:
        """Raises ConfigError where the reward cannot be used; one that fails for a sample costs
        that sample alone."""
        with contextlib.ExitStack() as opened:
            workers, why = None, ""
            if self._world.is_first:
                try:
                    workers = opened.enter_context(Rewards(self._config))
                except (ConfigError, MissingExtra) as error:
                    why = str(error)
            if why := self._world.same(why):
                raise ConfigError(why)
            return self._by_pieces(workers, samples)

    def _by_pieces(
        self, workers: Rewards | None, samples: Sequence[RewardSample]
    ) -> list[float | None]:
        """workers: on the first rank."""
        found: list[float | None] = []
        told_s = time.monotonic()
        for begin in range(0, len(samples), self._piece):
            piece = samples[begin : begin + self._piece]
            scored = [] if workers is None else self._told(workers.score(piece))
            found += json.loads(self._world.same(json.dumps(scored)))
            if workers is not None and time.monotonic() > told_s + _TELL_S:
                told_s = time.monotonic()
                log.event("trainer.scoring", done=len(found), of=len(samples))
        return found

    def _told(self, outcomes: Sequence[RewardOutcome]) -> list[float | None]:
        for outcome in outcomes:
            if outcome.failure is not None:
                self.num_failed += 1
                log.event("trainer.reward_failed", level="warning", why=outcome.failure)
        return [outcome.reward for outcome in outcomes]
