"""What goes wrong, and when: drawn from the seed. After `span_s` everything is mended."""

import asyncio
import random

from .client import Client
from .clocks import Wall
from .controller import Controller
from .driver import DriverHost
from .driver_watch import KINDS
from .front import FrontHost
from .history import History
from .loop import SimLoop
from .network import Network
from .profile import Profile
from .trainer import Trainer


class Nemesis:
    def __init__(
        self,
        loop: SimLoop,
        profile: Profile,
        history: History,
        rng: random.Random,
        network: Network,
        fronts: list[FrontHost],
        client: Client,
        trainer: Trainer,
        controller: Controller | None,
        driver: DriverHost | None,
        wall: Wall,
    ) -> None:
        self._loop, self._profile, self._history, self._rng = loop, profile, history, rng
        self._network, self._fronts = network, fronts
        self._client, self._trainer, self._wall = client, trainer, wall
        self._controller, self._driver = controller, driver

    async def run(self) -> None:
        """Strike until the time is over, then mend."""
        until_s = self._loop.time() + self._profile.span_s
        while self._profile.faults:
            pause_s = self._rng.expovariate(1.0) * self._profile.every_s
            if self._loop.time() + pause_s > until_s:
                break
            await asyncio.sleep(pause_s)
            self._strike(self._rng.choice(self._profile.faults))
        await asyncio.sleep(max(until_s - self._loop.time(), 0))
        self._network.heal()
        self._client.is_calm = True
        if self._controller is not None:
            self._controller.is_calm = True
        if self._driver is not None:
            self._driver.calm()
        for front in self._fronts:
            front.disk.is_full, front.slow, front.doom = False, 1.0, None
        self._history.note("nemesis", "calm")

    def _strike(self, fault: str) -> None:
        front = self._rng.choice([self._fronts[0], *self._fronts])
        duration_s = 0.05 + self._rng.random() * 0.5
        self._history.note("nemesis", "strikes", fault=fault, at=front.name)
        match fault:
            case "front killed":
                front.crash(is_power=False)
            case "power lost":
                self._history.sometimes("power lost")
                front.crash(is_power=True)
            case "front killed in a commit":
                front.doom = False
            case "power lost in a commit":
                front.doom = True
            case "core killed":
                front.kill_core()
            case "trainer killed":
                self._trainer.crash()
            case "client killed":
                self._client.crash()
            case "controller killed":
                if self._controller is not None:
                    self._controller.crash()
            case "engine away":
                # longer than a driver waits for it, as the case may be
                if self._rng.random() < 0.5:
                    self._network.cut.add(front.name)
                    self._loop.outside(1 + duration_s, self._network.cut.discard, front.name)
                else:
                    front.crash(is_power=False, away_s=0.5 + 3 * duration_s)
            case _ if fault.startswith("driver"):
                if self._driver is not None:
                    self._strike_driver(self._driver, fault, duration_s)
            case "disk full":
                front.disk.is_full = True
                self._loop.outside(duration_s, setattr, front.disk, "is_full", False)
            case "disk slow":
                front.slow = 20.0
                self._loop.outside(duration_s, setattr, front, "slow", 1.0)
            case "network cut":
                server = self._rng.choice([front.name, "trainer"])
                self._network.cut.add(server)
                self._loop.outside(duration_s, self._network.cut.discard, server)
            case "clock jumps":
                self._wall.skew_s += self._rng.choice([-3600.0, 3600.0, 5.0])

    def _strike_driver(self, driver: DriverHost, fault: str, duration_s: float) -> None:
        doom = driver.doom
        doom.is_power = self._rng.random() < 0.4
        match fault:
            case "driver killed":
                driver.crash()
            case "driver killed at a step":
                if driver.process is not None:
                    driver.process.fuse = self._rng.randint(1, 80)
            case "driver killed at a commit":
                doom.kind = self._rng.choice(KINDS)
                doom.left = self._rng.randint(1, 4) if doom.kind == "any" else 1
            case "driver killed in the output":
                doom.kind, doom.left = "write", self._rng.randint(1, 2)
            case "driver loses power":
                driver.crash(is_power=True)
            case "driver's engines are full":
                driver.fill_engines(True)
                self._loop.outside(duration_s, driver.fill_engines, False)
            case "driver has a full disk":
                driver.disk.fill(True)
                self._loop.outside(duration_s, driver.disk.fill, False)
