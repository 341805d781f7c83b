"""The driver of `everstep rollout`, as it is shipped, on a machine of its own or in the process of an
engine. Whoever uses it starts it again, whenever it has died or ended with an error.
"""

import random
from typing import Any

import msgspec
from msgspec import Struct

from everstep.engine.errors import (
    CheckpointError,
    ConfigError,
    EngineUnavailable,
    InvalidRequest,
    JournalFull,
    WeightsRefused,
)
from everstep.engine.messages import KVPolicy
from everstep.engine.rollout import SamplingParams
from everstep.trainer_bridge.c3po.config import C3poConfig
from everstep.trainer_bridge.run.driver import RolloutDriver
from everstep.trainer_bridge.run.engine import Prompt
from everstep.trainer_bridge.run.file import Changes
from everstep.trainer_bridge.run.manager_engine import ManagerEngine
from everstep.trainer_bridge.run.state import RunState
from everstep.trainer_bridge.run.words import Header, KeptPrompt, Position

from .driver_disk import OUTPUT, RUN, DriverDisk, SimOutput
from .driver_engine import Meddler, SimServer, WatchedEngine
from .driver_learner import learner
from .driver_watch import Doom, DriverWatch
from .front import FrontHost
from .history import History
from .language import VOCAB
from .loop import Process, SimLoop
from .network import Network

HARMLESS = (EngineUnavailable, JournalFull, WeightsRefused, CheckpointError)
"""Errors after which a user starts the same command again: what is done is kept. A full disk only
where it is the driver's own: for an engine's it waits."""
AWAY_S = 0.3


class DriverSettings(Struct, frozen=True, kw_only=True):
    """engines     fronts that sample
    is_embedded    the driver lives in the process of its only engine
    is_trained     a trainer gets the groups, and its versions are served
    is_sqlite      the run file is the real one
    has_threads    as `RolloutDriver`
    wait_s         patience with an engine that is away
    step           iterations that one command may run; None: all
    is_paused      others pause its rollouts now and then
    bad, too_long  number of a prompt that nobody can run; None: there is none
    """

    config: C3poConfig
    engines: tuple[str, ...]
    is_embedded: bool
    is_trained: bool
    is_sqlite: bool
    has_threads: bool
    wait_s: float
    step: int | None
    num_prompts: int
    epochs: int
    bad: int | None
    too_long: int | None
    meddles: bool
    is_paused: bool
    kv: KVPolicy


class SimSource:
    """Prompts by number, `epochs` times."""

    def __init__(self, settings: DriverSettings, position: Position) -> None:
        self._settings, self._position = settings, position

    def read(self, count: int) -> tuple[list[KeptPrompt], dict[int, str], Position]:
        found: list[KeptPrompt] = []
        bad: dict[int, str] = {}
        epoch, line = self._position.epoch, self._position.line
        while len(found) < count and epoch < self._settings.epochs:
            if line == self._settings.bad:
                bad[line + 1] = "no JSON"
            else:
                found.append(KeptPrompt(f"p{line}@{epoch}", line + 1, epoch, b"%d" % line))
            line += 1
            if line == self._settings.num_prompts:
                epoch, line = epoch + 1, 0
        self._position = Position(epoch, line, "", epoch >= self._settings.epochs)
        return found, bad, self._position

    def prompt(self, kept: KeptPrompt) -> Prompt:
        number = int(kept.raw)
        length = 60 if number == self._settings.too_long else 1 + number % 8
        limit = min(int(2 ** random.Random(f"p{number}").uniform(0.0, 4.7)), 25)
        return Prompt(
            id=f"p{number}",
            prompt_ids=[*(1 + at % (VOCAB - 1) for at in range(length)), number % VOCAB],
            sampling=SamplingParams(max_tokens=limit),
            metadata={"n": number},
        )


class DriverHost:
    def __init__(
        self,
        loop: SimLoop,
        network: Network,
        history: History,
        settings: DriverSettings,
        rng: random.Random,
        fronts: dict[str, FrontHost],
    ) -> None:
        self._loop, self._network, self._history = loop, network, history
        self.settings, self._rng, self._fronts = settings, rng, fronts
        self.has_full_engines = False
        self.disk = DriverDisk(rng, is_sqlite=settings.is_sqlite)
        self.disk.on_commit, self.disk.on_write = self._on_commit, self._on_write
        self.process: Process | None = None
        self.is_done = False
        self.doom = Doom()
        most = settings.config.capacity + settings.config.standby
        # the place of one that somebody else has paused is another's meanwhile
        most_begun = most if settings.is_paused else settings.config.capacity
        self.watch = DriverWatch(history, most_begun, most, self._is_away)
        self._in_commit = False
        self._limit = settings.step
        self._state: RunState | None = None
        own = random.Random(rng.random())
        self._meddler = Meddler(loop, network, history, own, is_bad=settings.meddles)
        if settings.is_embedded:
            self._home.on_ready = self._embed
            self._home.on_crash = self._on_home_crash

    @property
    def _home(self) -> FrontHost:
        return self._fronts[self.settings.engines[0]]

    def calm(self) -> None:
        """There are no more faults."""
        self.disk.fill(False)
        self.fill_engines(False)
        self.doom.lift()
        if self.process is not None:
            self.process.fuse = 0
        self._meddler.is_calm = True

    def fill_engines(self, is_full: bool) -> None:
        """Whatever the run asks of an engine meets a full disk there, or none does."""
        self.has_full_engines = is_full

    # --- life ----------------------------------------------------------------------------

    def start(self) -> None:
        """Of an embedded one its engine starts it."""
        if self.process is None:
            self._meddler.start(self.settings.engines)
        if not self.settings.is_embedded and not self.is_done and not self._is_up:
            self._live(Process(self._loop, "driver"))

    @property
    def _is_up(self) -> bool:
        return self.process is not None and not self.process.is_dead

    def _embed(self, _: str) -> None:
        assert self._home.process is not None
        if not self.is_done:
            self._live(self._home.process)

    def _live(self, process: Process) -> None:
        self.process = process
        process.fuse, process.on_fuse = 0, self.crash
        process.spawn(self._main(process))

    def crash(self, *, is_power: bool = False, in_commit: bool = False) -> None:
        """kill -9; is_power: its machine lost what is not synced."""
        if not self._is_up or self.is_done:
            return
        assert self.process is not None
        self._in_commit = in_commit
        if self.settings.is_embedded:
            self._home.crash(is_power=is_power)
            return
        self.process.kill()
        self._died(is_power=is_power, in_commit=in_commit)
        self._loop.outside(0.05 + self._rng.random() * AWAY_S, self.start)

    def _on_home_crash(self, is_power: bool) -> None:
        if not self.is_done:
            self._died(is_power=is_power, in_commit=self._in_commit)
        self._in_commit = False

    def _died(self, *, is_power: bool, in_commit: bool) -> None:
        self.doom.lift()
        written = len(self.disk.output.seen)
        self.watch.note_death(self._state, written, is_power=is_power, in_commit=in_commit)
        self.disk.crash(is_power=is_power, in_commit=in_commit)
        phase = "" if self._state is None else self._state.machine.phase
        self._state = None
        self._history.note("driver", "died", is_power=is_power, in_commit=in_commit, phase=phase)

    # --- the command ---------------------------------------------------------------------

    async def _main(self, process: Process) -> None:
        outcome: BaseException | None = None
        try:
            await self._command(process)
        except Exception as error:
            outcome = error
        if process.is_dead or not self._loop.is_running():
            return
        if self.disk.file is not None:
            self.disk.file.close()
            self.disk.file = None
        self._end(process, outcome)

    def _end(self, process: Process, outcome: BaseException | None) -> None:
        """It has ended by itself; unless all is done it is started again."""
        is_own = f"{RUN}: " in str(outcome) or f"{OUTPUT}: " in str(outcome)
        is_full = "no space left" in str(outcome) and is_own
        if outcome is not None:
            is_harmless = isinstance(outcome, HARMLESS) and not isinstance(outcome, JournalFull)
            is_harmless |= isinstance(outcome, (JournalFull, ConfigError)) and is_full
            words = f"{type(outcome).__name__}: {outcome}"
            self._history.note("driver", "ends" if is_harmless else "fault", what=words)
            self._history.sometimes(f"driver ended by {type(outcome).__name__}")
        self._state = None
        self.doom.lift()
        if self.is_done:
            return
        if self.settings.is_embedded:
            self._home.crash(is_power=False)
            return
        process.kill()
        self._loop.outside(0.1 + self._rng.random() * AWAY_S, self.start)

    async def _command(self, process: Process) -> None:
        settings, loop = self.settings, self._loop
        state = RunState(self.disk.open(), self._header())
        self._state = state
        self.watch.begin(state)
        machine = state.machine
        self._history.note("driver", "starts", phase=machine.phase, iteration=machine.iteration)
        if state.is_over:
            self._is_over(state)
            return
        engines = self._engines(process)
        trainer = None
        if settings.is_trained:
            trainer = learner(
                self.disk,
                engines,
                self._network,
                process,
                self._rng,
                iteration=machine.iteration,
                kv=settings.kv,
                on_note=self._on_note,
            )
        parts: Any = (state, engines, SimSource(settings, state.position), SimOutput(self.disk))
        driver = RolloutDriver(
            *parts,
            learner=trainer,
            limit=self._limit,
            on_note=self._on_note,
            clock=loop.time,
            has_threads=settings.has_threads,
        )
        await driver.run()
        if process.is_dead:
            return
        if machine.phase == "done":
            self._is_over(state)
        else:
            assert self._limit is not None
            assert settings.step is not None
            self._history.sometimes("driver stopped by its limit")
            self._limit = machine.iteration + settings.step

    def _header(self) -> Header:
        return Header(
            id="",
            source="prompts.jsonl",
            epochs=self.settings.epochs,
            seed=7,
            sampling=SamplingParams(),
            config=self.settings.config,
        )

    def _engines(self, process: Process) -> list[WatchedEngine]:
        settings = self.settings
        found: list[Any]
        if settings.is_embedded:
            manager = self._home.manager
            assert manager is not None
            found = [ManagerEngine(self._home.name, manager, _encode)]
        else:
            parts = (self._loop, self._network, process, settings.wait_s)
            found = [
                SimServer(name, *parts, is_trained=settings.is_trained) for name in settings.engines
            ]
        return [WatchedEngine(engine, self._history, self._on_rollout, self) for engine in found]

    def _is_over(self, state: RunState) -> None:
        """Tell the checker what came of it."""
        self.is_done = True
        self._meddler.is_over = True
        plain = msgspec.to_builtins
        self._history.note(
            "driver",
            "done",
            pool=state.pool,
            books=plain(state.books),
            total=plain(state.machine.total),
            tally=plain(state.tally),
            abandoned=sorted(state.abandoned),
            bad_lines=sorted(state.bad_lines),
            lines=self._lines(),
            away=sorted(self.watch.away),
        )

    def _lines(self) -> list[Any]:
        try:
            return [msgspec.json.decode(v) for v in bytes(self.disk.output.seen).splitlines()]
        except msgspec.DecodeError as error:
            self._history.note("driver", "fault", what=f"I2: the output is torn: {error}")
            return []

    # --- what happens on the way ---------------------------------------------------------

    def _on_rollout(self, front: str, rollout_id: str) -> None:
        self._meddler.known.append((front, rollout_id))

    def _on_note(self, text: str) -> None:
        self._history.note("driver", "says", text=text)
        self.watch.note(text)

    def _is_away(self, engine: str) -> bool:
        return not self._fronts[engine].is_ready or engine in self._network.cut

    def _on_commit(self, changes: Changes) -> None:
        if self.doom.strikes(self.watch.commit(changes)):
            self.crash(is_power=self.doom.is_power, in_commit=self._rng.random() < 0.5)

    def _on_write(self) -> None:
        if self.doom.strikes({"write"}):
            self._history.sometimes("driver killed while it writes the output")
            self.crash(is_power=self.doom.is_power)


def _encode(prompt: Prompt) -> list[int]:
    if prompt.prompt_ids is None:
        raise InvalidRequest("ids are wanted", field="prompt_ids")
    return prompt.prompt_ids
