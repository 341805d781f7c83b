"""The world's clocks, ids, noise and weights while a history runs: all follow from its seed."""

import contextlib
import gc
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from everstep.engine import log
from everstep.engine.manager import versions
from everstep.engine.manager.request_keys import RequestKeys
from everstep.rollout import output as rollout_output
from everstep.trainer_bridge.run import fleet as rollout_fleet

from .driver_disk import SYSTEM
from .language import read_manifest

EPOCH_S = 1_800_000_000.0
REVIVE_EVERY_S = 0.4
"""Faults last two seconds: who came back later would come too late for them."""


class Wall:
    """The time of day: it runs with the loop, and jumps when somebody sets it."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.skew_s = 0.0

    def __call__(self) -> float:
        return EPOCH_S + self._now() + self.skew_s


@contextlib.contextmanager
def virtual(
    now: Callable[[], float],
    wall: Wall,
    rng: random.Random,
    on_log: Callable[..., None],
) -> Iterator[None]:
    """Time, ids and noise of this process are the simulation's; its log goes to `on_log`."""

    def new_id() -> uuid.UUID:
        return uuid.UUID(int=rng.getrandbits(128), version=4)

    was_collecting = gc.isenabled()
    gc.disable()  # what is collected when depends on what ran before
    defaults: Any = RequestKeys.__init__.__kwdefaults__
    with (
        mock.patch.object(time, "time", wall),
        mock.patch.object(time, "monotonic", now),
        mock.patch.object(time, "perf_counter", now),
        mock.patch.object(uuid, "uuid4", new_id),
        mock.patch.object(os, "urandom", rng.randbytes),
        mock.patch.object(log, "event", on_log),
        mock.patch.object(versions, "read_manifest", read_manifest),
        mock.patch.dict(defaults, clock=wall),
        mock.patch.object(rollout_output, "os", SYSTEM),
        mock.patch.object(rollout_fleet, "REVIVE_EVERY_S", REVIVE_EVERY_S),
    ):
        try:
            yield
        finally:
            if was_collecting:
                gc.enable()
