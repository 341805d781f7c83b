"""`everstep rollout --bridge`: what its groups are scored with, and who they go to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.messages import KVPolicy, Priority
from ..trainer_bridge.curve import Keys, check_endpoint, read_keys
from ..trainer_bridge.protocol import check_run_name
from ..trainer_bridge.run.engine import Engine
from ..trainer_bridge.run.learner import BridgeLearner
from ..trainer_bridge.run.manager_engine import ManagerEngine
from ..trainer_bridge.run.scoring import Scorer
from ..trainer_bridge.trajectories.sender import TrajectorySender
from ..trainer_bridge.trajectories.spool import Spool
from ..weights_receiving import Job
from .http_engine import HttpEngine


@dataclass(frozen=True, kw_only=True)
class Training:
    """Flags of `everstep rollout` that are about a trainer.

    endpoint    where its ranks connect
    run         the name that they say
    keys        folder of CURVE keys; needed beyond this machine
    priority    of staging a version, beside steps of generation
    deadline_s  for an iteration to be trained
    weights     a receiver for a trainer on another host; None: it writes where we can read
    admin_key   of the servers; None: that of the environment, if there is one
    """

    endpoint: str
    run: str
    admin_key: str | None
    keys: Path | None
    kv: KVPolicy
    priority: Priority
    deadline_s: float
    weights: Job | None = None

    def check(self) -> None:
        """Raises ConfigError."""
        check_run_name(self.run, "--run-name")
        check_endpoint(self.endpoint, self._keys, "--bridge")
        if self.weights is not None:
            self.weights.check()

    def learner(
        self,
        spool: Path,
        iteration: int,
        engines: Sequence[Engine],
        scorer: Scorer,
        *,
        outlives: bool,
        on_note: Callable[[str], None],
    ) -> BridgeLearner:
        """For a run that stands at this iteration. outlives: as of `BridgeLearner`.

        Raises BridgeError for a spool that is broken.
        """
        kept = Spool(spool)
        sender = TrajectorySender(
            kept,
            run=self.run,
            endpoint=self.endpoint,
            keys=self._keys,
            acked=min(kept.iterations, default=iteration) - 1,
        )
        return BridgeLearner(
            sender,
            kept,
            scorer,
            [engine for engine in engines if isinstance(engine, ManagerEngine | HttpEngine)],
            kv=self.kv,
            deadline_s=self.deadline_s,
            outlives=outlives,
            root=None if self.weights is None else Path(self.weights.root),
            on_note=on_note,
        )

    @property
    def _keys(self) -> Keys | None:
        return None if self.keys is None else read_keys(self.keys, "engine")
