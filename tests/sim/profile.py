"""What a seed draws before it begins: sizes, speeds, and which faults there are at all.

Faults are not all there all the time: a history in which only one kind happens, often, reaches
states that a mixture of everything never does.
"""

import random

from msgspec import Struct
from msgspec.structs import replace

from everstep.engine.config import BatchConfig, ResolvedKV
from everstep.trainer_bridge.c3po.config import C3poConfig

from .controller import C3poSettings
from .core import CoreSettings
from .driver import DriverSettings
from .front import FrontSettings
from .language import WeightSettings
from .network import Quality

OF_DRIVER = (
    "driver killed",
    "driver killed at a step",
    "driver killed at a commit",
    "driver killed in the output",
    "driver loses power",
    "driver has a full disk",
    "driver's engines are full",
    "engine away",
)
FAULTS = (
    "front killed",
    "front killed in a commit",
    "power lost",
    "power lost in a commit",
    "core killed",
    "trainer killed",
    "client killed",
    "controller killed",
    "disk full",
    "disk slow",
    "network cut",
    "clock jumps",
)
C3PO_SHARE, DRIVER_SHARE = 0.15, 0.5
"""Of the histories: with the bare controller, with the driver of a run."""
WISHES = ("pause", "pause all", "cancel", "fork", "move")


class Profile(Struct, frozen=True, kw_only=True):
    """One seed's world.

    span_s      how long faults go on
    every_s     mean time from one fault to the next
    faults      those that there are
    wishes      what the client does besides reading
    wish_s      mean time from one wish to the next
    """

    span_s: float
    every_s: float
    faults: tuple[str, ...]
    wishes: tuple[str, ...]
    wish_s: float
    is_sqlite: bool
    durability: str
    quality: Quality
    reorder: float
    told_s: float
    front: FrontSettings
    num_jobs: int
    batch_groups: int
    train_s: float
    c3po: C3poSettings | None
    driver: DriverSettings | None
    retain_acked_s: float

    @classmethod
    def draw(cls, rng: random.Random, *, sqlite_share: float) -> "Profile":
        kind = rng.random()
        is_run = C3PO_SHARE <= kind < C3PO_SHARE + DRIVER_SHARE
        # what happens to a driver happens in its histories, and little else
        faults = [fault for fault in FAULTS if rng.random() < (0.2 if is_run else 0.35)]
        faults += [fault for fault in OF_DRIVER if is_run and rng.random() < 0.4]
        durability = rng.choice(["accepts", "accepts", "power", "process"])
        if durability == "process":
            # it promises nothing about power
            faults = [fault for fault in faults if not fault.startswith("power")]
        c3po = _controller(rng) if kind < C3PO_SHARE else None
        driver = _driver(rng, is_sqlite=rng.random() < sqlite_share) if is_run else None
        if driver is not None and len(driver.engines) > 1:
            faults += ["engine away"] * rng.choice([0, 2])
        has_power_loss = any(fault.startswith("power") for fault in faults)
        if (driver and driver.is_embedded) or ((driver or c3po) and has_power_loss):
            # a token that was counted and is lost would be counted again
            durability = "power"
        wishes = tuple(wish for wish in WISHES if rng.random() < 0.5)
        if driver is not None:
            is_paused = driver.meddles or "pause all" in wishes
            driver = replace(driver, is_paused=is_paused)
        # few blocks: they are fought for
        kv = ResolvedKV(
            block_size=rng.choice([2, 4]),
            num_blocks=rng.choice([24, 48, 200]),
            max_model_len=40,
            prefix_caching=rng.random() < 0.8,
            num_parking_blocks=rng.choice([0, 16]),
            on_pause=rng.choice(["keep", "park", "drop"]),
        )
        batch = BatchConfig(
            max_num_seqs=rng.choice([2, 4, 8]), max_num_batched_tokens=rng.choice([8, 32])
        )
        core = CoreSettings(
            kv=kv,
            batch=batch,
            step_s=rng.choice([0.005, 0.02]),
            start_s=rng.choice([0.02, 0.2]),
            unlucky=rng.choice([0.0, 0.0, 0.3]),
            weights=WeightSettings(
                bad=rng.choice([0.0, 0.0, 0.2]), missing=rng.choice([0.0, 0.0, 0.3])
            ),
        )
        is_rough = rng.random() < 0.6
        quality = Quality(
            delay_s=rng.choice([0.001, 0.005]),
            late=0.02 if is_rough else 0.0,
            lost=rng.choice([0.02, 0.1]) if is_rough else 0.0,
            twice=0.05 if is_rough else 0.0,
        )
        return cls(
            span_s=2.0,
            every_s=rng.choice([0.1, 0.3, 0.8]),
            faults=tuple(faults),
            wishes=wishes,
            wish_s=rng.choice([0.05, 0.15, 0.4]),
            is_sqlite=rng.random() < sqlite_share,
            durability=durability,
            quality=quality,
            reorder=rng.choice([0.0, 0.2, 0.7]),
            told_s=rng.choice([0.0001, 0.002, 0.02]),
            front=FrontSettings(
                core=core,
                commit_s=rng.choice([0.0002, 0.004, 0.02]),
                compact_s=rng.choice([0.3, 60.0]),
                max_live=10_000,
                kv_policy=rng.choice(["keep", "recompute", "recompute-prompt", None]),
            ),
            num_jobs=rng.randint(3, 8),
            batch_groups=rng.randint(1, 3),
            train_s=rng.choice([0.02, 0.1, 0.4]),
            c3po=c3po,
            driver=driver,
            # of what is not forgotten the tokens are counted in the end
            retain_acked_s=rng.choice([5.0, 1e8, 1e8]) if driver else 5.0,
        )


def _config(rng: random.Random) -> C3poConfig:
    is_bounded = rng.random() < 0.2
    return C3poConfig(
        budget=rng.choice([6, 12, 25, 60]),
        capacity=rng.randint(2, 6),
        mode=rng.choice(["generated", "generated", "completed"]),
        retention=rng.choice([0, 1, 3]),
        group=rng.randint(1, 3),
        max_lag=rng.choice([None, None, None, 2]),
        max_staleness=2 if is_bounded else None,
        consumer_batch=4 if is_bounded else None,
    )


def _controller(rng: random.Random) -> C3poSettings:
    return C3poSettings(
        config=_config(rng),
        front=rng.choice("AAB"),
        num_prompts=rng.randint(2, 8),
        meddles=rng.random() < 0.5,
    )


def _driver(rng: random.Random, *, is_sqlite: bool) -> DriverSettings:
    engines = rng.choice([("A",), ("B",), ("A", "B"), ("B", "A"), ("A", "B")])
    config = _config(rng)
    if config.retention == 0 and rng.random() < 0.5:
        # short budgets would end in nothing but purges
        config = replace(config, retention=3)
    if len(engines) == 1:
        config = replace(config, standby=rng.choice([0, config.capacity]))
    num_prompts = rng.randint(2, 7 if config.budget > 12 else 4)
    return DriverSettings(
        config=config,
        engines=engines,
        is_embedded=len(engines) == 1 and rng.random() < 0.4,
        is_trained=rng.random() < 0.6,
        is_sqlite=is_sqlite,
        has_threads=rng.random() < 0.5,
        # those that have others wait less
        wait_s=rng.choice([0.2, 0.4, 3.0] if len(engines) > 1 else [0.3, 1.0, 5.0]),
        step=rng.choice([None, None, None, 1, 3]),
        num_prompts=num_prompts,
        epochs=rng.choice([1, 1, 2]) if config.budget > 12 else 1,
        bad=rng.randrange(num_prompts) if rng.random() < 0.15 else None,
        too_long=rng.randrange(num_prompts) if rng.random() < 0.15 else None,
        meddles=rng.random() < 0.3,
        kv=rng.choice(["keep", "recompute", "recompute-prompt"]),
        is_paused=True,
    )
