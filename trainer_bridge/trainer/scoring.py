"""What responses of files earn, where the run has a reward of its own: scored once, when they are
read, by worker processes of the first rank."""

import json
import time
from collections.abc import Sequence

from ...engine import log
from ...engine.errors import ConfigError, MissingExtra
from ..rewards.rewards import RewardConfig, RewardSample
from ..rewards.workers import RewardOutcome, Rewards
from .sharding import World

_TELL_S = 10.0


class FileScorer:
    """A `Score` of trajectories/files.py: every rank calls, and has the same rewards.

    timeout_s  how long the other ranks wait for the first; they are told of a piece at a time
    """

    def __init__(self, config: RewardConfig, world: World, timeout_s: float) -> None:
        self._config, self._world = config, world
        longest_s = config.deadline_s + config.start_deadline_s
        self._piece = config.workers * max(1, int(timeout_s / 2 / longest_s))
        self.num_failed = 0

    def __call__(self, samples: Sequence[RewardSample]) -> list[float | None]:
        """Raises ConfigError where the reward cannot be used; one that fails for a sample costs
        that sample alone."""
        workers, why = None, ""
        if self._world.is_first:
            workers = Rewards(self._config)
            try:
                workers.__enter__()
            except (ConfigError, MissingExtra) as error:
                why = str(error)
        if why := self._world.same(why):
            raise ConfigError(why)
        found: list[float | None] = []
        told_s = time.monotonic()
        try:
            for begin in range(0, len(samples), self._piece):
                piece = samples[begin : begin + self._piece]
                scored = [] if workers is None else self._told(workers.score(piece))
                found += json.loads(self._world.same(json.dumps(scored)))
                if self._world.is_first and time.monotonic() > told_s + _TELL_S:
                    told_s = time.monotonic()
                    log.event("trainer.scoring", done=len(found), of=len(samples))
        finally:
            if workers is not None:
                workers.close()
        return found

    def _told(self, outcomes: Sequence[RewardOutcome]) -> list[float | None]:
        for outcome in outcomes:
            if outcome.failure is not None:
                self.num_failed += 1
                log.event("trainer.reward_failed", level="warning", why=outcome.failure)
        return [outcome.reward for outcome in outcomes]
