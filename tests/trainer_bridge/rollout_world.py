"""Engines, prompts and an output without a model or a wire, for the driver of C3PO++.

Time is virtual: a sleep costs nothing, and who sleeps shorter wakes first. An engine draws one
token for each rollout of a pool per step, in order of acceptance, as far as its budget and its
places go; tokens are a function of the seed and the position, lengths of the seed.
"""

import asyncio
import copy
import hashlib
import selectors
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct, structs

from everstep.engine.errors import EngineUnavailable, InvalidRequest, UnknownRollout
from everstep.engine.rollout import FinishReason, Rollout, RolloutState, SamplingParams, Segment
from everstep.trainer_bridge.c3po.config import C3poConfig
from everstep.trainer_bridge.run.driver import RolloutDriver
from everstep.trainer_bridge.run.engine import Budget, Facts, Prompt, Seen, Work
from everstep.trainer_bridge.run.file import RunFile
from everstep.trainer_bridge.run.parts import Delivered, Groups, Taught
from everstep.trainer_bridge.run.state import RunState
from everstep.trainer_bridge.run.words import Header, KeptPrompt, Position

T = TypeVar("T")
STEP_S = 0.01
UNBOUNDED = 2**40


class _Jump(selectors.BaseSelector):
    """Instead of waiting it moves the clock on."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError("everybody waits, and nothing will ever happen")
        self.now_s += timeout
        return self._real.select(0)

    def register(self, *args: Any) -> Any:
        return self._real.register(*args)

    def unregister(self, *args: Any) -> Any:
        return self._real.unregister(*args)

    def modify(self, *args: Any) -> Any:
        return self._real.modify(*args)

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Any:
        return self._real.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s


def run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "little")


def token_of(seed: int, position: int) -> int:
    return digest(seed, position) % 1000


class FakeRollout(Struct):
    rollout: Rollout
    length: int
    ends_as: str = "stop"
    is_acked: bool = False


class FakeBudget(Struct):
    id: str
    pool: str
    tokens: int
    places: int | None = None
    used: int = 0
    is_open: bool = True


class FakeEngine:
    """What is durable is in `rollouts`, `budgets_` and `keys`; the rest is the world's.

    length_of  (seed, prompt id) → tokens
    """

    def __init__(
        self,
        name: str,
        length_of: Callable[[int, str], int],
        *,
        slots: int = 1000,
        patience_s: float = 3.0,
    ) -> None:
        self.name = name
        self.length_of = length_of
        self.slots = slots
        self.patience_s = patience_s
        self.version = 0
        self.is_down = False
        self.is_cut_off = False
        """Nobody reaches it, and it goes on."""
        self.delay_s = self.cancel_s = 0.001
        self.rollouts: dict[str, FakeRollout] = {}
        self.budgets_: dict[str, FakeBudget] = {}
        self.keys: dict[str, str] = {}
        self.num_drawn = self.unmetered = 0
        """Tokens in all, and those that no budget counted."""
        self.rows: list[int] = []
        """Rollouts that drew a token, step by step; steps without any are left out."""
        self.news = asyncio.Event()
        """Set after every step, also one that could not be made."""
        self.refused: set[str] = set()
        self.failing: set[int] = set()
        """Seeds of rollouts that fail after their first token."""

    # --- the world's side

    def used(self) -> dict[int, int]:
        """Iteration → tokens that were sampled under its leases, whether anybody knows or not."""
        found: dict[int, int] = {}
        for key, name in self.keys.items():
            words = key.split("/")
            if name in self.budgets_ and len(words) == 3:
                iteration = int(words[1])
                found[iteration] = found.get(iteration, 0) + self.budgets_[name].used
        return found

    def live(self, pool: str) -> list[FakeRollout]:
        found = [f for f in self.rollouts.values() if f.rollout.pool == pool]
        return [f for f in found if not f.rollout.state.is_ended][: self.slots]

    @property
    def num_begun(self) -> int:
        """Rollouts that have tokens and have not ended."""
        fakes = self.rollouts.values()
        return sum(bool(f.rollout.output_ids) and not f.rollout.state.is_ended for f in fakes)

    def step(self) -> None:
        before = self.num_drawn
        for pool in {f.rollout.pool for f in self.rollouts.values()}:
            mine = [b for b in self.budgets_.values() if b.pool == pool]
            budget = next((b for b in mine if b.is_open), None)
            places = None if budget is None else budget.places
            for fake in self.live(pool)[:places]:
                if budget is None or not budget.is_open:
                    if not mine:
                        self.unmetered += 1
                        self.grow(fake)
                    continue
                self.grow(fake)
                budget.used += 1
                budget.is_open = budget.used < budget.tokens

        if self.num_drawn > before:
            self.rows.append(self.num_drawn - before)

    def grow(self, fake: FakeRollout) -> None:
        self.num_drawn += 1
        rollout = fake.rollout
        position = len(rollout.output_ids)
        rollout.output_ids.append(token_of(rollout.seed, position))
        for values in (rollout.lp_sampled, rollout.lp_temp, rollout.lp_raw):
            values.append(-0.5)
        rollout.kept_mass.append(1.0)
        rollout.flags.append(1)
        if not rollout.versions or rollout.versions[-1] != self.version:
            rollout.segments.append(Segment(position, self.version, "d", "fake", self.name))
        rollout.versions.append(self.version)
        if rollout.seed in self.failing:
            self.end(fake, RolloutState.FAILED, FinishReason("error", detail="nonfinite"))
        elif position + 1 >= fake.length:
            self.end(fake, RolloutState.FINISHED, FinishReason(fake.ends_as))  # type: ignore[arg-type]

    def end(self, fake: FakeRollout, state: RolloutState, reason: FinishReason) -> None:
        fake.rollout.state, fake.rollout.finish_reason = state, reason

    async def work(self) -> None:
        """Draw tokens until it is cancelled."""
        self.news = asyncio.Event()
        while True:
            await asyncio.sleep(STEP_S)
            if not self.is_down:
                self.step()
            self.news.set()
            self.news = asyncio.Event()

    async def _there(self) -> None:
        """As a client with patience: a call that comes too early waits."""
        await asyncio.sleep(self.delay_s)
        waited_s = 0.0
        while self.is_down or self.is_cut_off:
            if waited_s >= self.patience_s:
                raise EngineUnavailable(f"no answer from {self.name}")
            waited_s += 0.1
            await asyncio.sleep(0.1)

    # --- the run's side

    async def start(self) -> Facts:
        await self._there()
        return Facts(self.version, "d" * 64, "fake")

    async def prepare(self, prompt: Prompt) -> Prompt:
        if prompt.id.startswith("bad"):
            raise InvalidRequest("prompt is empty", field="prompt")
        return prompt

    async def submit(self, work: Work) -> str:
        await self._there()
        if work.prompt.id in self.refused:
            raise InvalidRequest("prompt: too long", field="prompt")
        if work.key not in self.keys:
            rollout_id = f"{self.name}-{len(self.rollouts)}"
            self.keys[work.key] = rollout_id
            rollout = Rollout(
                id=rollout_id,
                group_id=work.group_id,
                prompt_ids=work.prompt.prompt_ids or [1],
                sampling=work.sampling,
                seed=work.seed,
                max_tokens=10**6,
                attempt=work.attempt,
                pool=work.pool,
                metadata=work.prompt.metadata,
            )
            self.rollouts[rollout_id] = FakeRollout(
                rollout, self.length_of(work.seed, work.prompt.id)
            )
        return self.keys[work.key]

    async def ended(self, rollout_id: str) -> Rollout:
        await self._there()
        while (fake := self.rollouts.get(rollout_id)) is not None:
            if fake.rollout.state.is_ended:
                break
            await self.news.wait()
            if self.is_down or self.is_cut_off:
                await self._there()
        return await self.read(rollout_id)

    async def read(self, rollout_id: str) -> Rollout:
        await self._there()
        fake = self.rollouts.get(rollout_id)
        if fake is None or fake.is_acked:
            raise UnknownRollout(f"no rollout has the id {rollout_id!r}")
        return copy.deepcopy(fake.rollout)

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        await asyncio.sleep(self.cancel_s)
        await self._there()
        for rollout_id in rollout_ids:
            fake = self.rollouts[rollout_id]
            if not fake.rollout.state.is_ended:
                self.end(fake, RolloutState.ABORTED, FinishReason("abort"))

    async def acknowledge(self, rollout_ids: Sequence[str]) -> None:
        await self._there()
        for rollout_id in rollout_ids:
            assert self.rollouts[rollout_id].rollout.state.is_ended
            self.rollouts[rollout_id].is_acked = True

    async def known(self, pool: str) -> list[Seen]:
        await self._there()
        return [
            Seen(
                f.rollout.id,
                f.rollout.state.is_ended,
                f.rollout.state is RolloutState.ABORTED,
                f.is_acked,
            )
            for f in self.rollouts.values()
            if f.rollout.pool == pool
        ]

    async def open_budget(
        self, pool: str, tokens: int | None, key: str, places: int | None = None
    ) -> Budget:
        await self._there()
        if key not in self.keys:
            mine = [b for b in self.budgets_.values() if b.pool == pool]
            assert not any(b.is_open for b in mine), f"{pool} has an open budget"
            self.keys[key] = budget_id = f"{self.name}-b{len(self.budgets_)}"
            self.budgets_[budget_id] = FakeBudget(budget_id, pool, tokens or UNBOUNDED, places)
        return self._shown(self.budgets_[self.keys[key]])

    def _shown(self, budget: FakeBudget) -> Budget:
        return Budget(budget.id, budget.used, budget.is_open)

    async def budget(self, budget_id: str, wait_s: float) -> Budget:
        until_s = asyncio.get_running_loop().time() + wait_s
        while True:
            await self._there()
            budget = self.budgets_[budget_id]
            if not budget.is_open or asyncio.get_running_loop().time() >= until_s:
                return self._shown(budget)
            await self.news.wait()

    async def budgets(self, pool: str) -> list[Budget]:
        await self._there()
        return [self._shown(b) for b in self.budgets_.values() if b.pool == pool]

    async def close_budget(self, budget_id: str) -> None:
        await self._there()
        self.budgets_[budget_id].is_open = False

    async def lengths(self, pool: str, rollout_ids: Sequence[str]) -> list[int]:
        await self._there()
        found = [self.rollouts[i].rollout for i in rollout_ids if i in self.rollouts]
        return [len(rollout.output_ids) for rollout in found]

    async def close(self) -> None:
        return None


class FakeSource:
    """Prompts by name, `epochs` times."""

    def __init__(self, ids: Sequence[str], epochs: int = 1) -> None:
        self.ids, self.epochs = list(ids), epochs
        self.position = Position()

    def resume(self, position: Position) -> None:
        self.position = position

    def read(self, count: int) -> tuple[list[KeptPrompt], dict[int, str], Position]:
        found: list[KeptPrompt] = []
        epoch, line = self.position.epoch, self.position.line
        while len(found) < count and epoch < self.epochs and self.ids:
            name = self.ids[line]
            found.append(KeptPrompt(f"{name}@{epoch}", line + 1, epoch, name.encode()))
            line += 1
            if line == len(self.ids):
                epoch, line = epoch + 1, 0
        self.position = Position(epoch, line, "", epoch >= self.epochs or not self.ids)
        return found, {}, self.position

    def prompt(self, kept: KeptPrompt) -> Prompt:
        return Prompt(id=kept.raw.decode(), prompt_ids=[1, kept.line], metadata={"n": kept.line})


class FakeSink:
    """A list of lines whose tail a crash may have left too long."""

    def __init__(self) -> None:
        self.lines: list[Delivered] = []

    def cut(self, size: int) -> None:
        assert size <= len(self.lines)
        del self.lines[size:]

    def write(self, groups: Sequence[Sequence[Delivered]]) -> int:
        for group in groups:
            self.lines += group
        return len(self.lines)


class FakeLearner:
    """A trainer, and whoever gives engines what it makes; it outlives the run's process.

    seconds  that an iteration takes
    """

    def __init__(self, engines: Sequence[FakeEngine], *, seconds: float = 0.05) -> None:
        self.engines = {engine.name: engine for engine in engines}
        self.seconds = seconds
        self.version = 0
        self.trained: dict[int, list[str]] = {}
        """Iteration → the groups that were trained, once each."""
        self.given: dict[str, int] = {}
        self.num_given = 0
        self.back: int | None = None
        self.num_backs = 0
        self.is_over = False

    def go_back_to(self, version: int) -> None:
        """The trainer was killed, and has begun again from this version."""
        self.back = version
        self.num_backs += 1

    async def start(self, engines: Collection[str], served: str) -> dict[str, str]:
        return self._give(engines)

    async def score(self, iteration: int, groups: Groups) -> Groups:
        return [[structs.replace(one, reward=1.0) for one in group] for group in groups]

    async def train(self, iteration: int, groups: Groups, engines: Collection[str]) -> Taught:
        await asyncio.sleep(self.seconds)
        names = [group[0].sample.prompt for group in groups]
        assert self.trained.setdefault(iteration, names) == names
        self.version, self.back = iteration + 1, None
        self.num_given += 1
        return Taught(self.version, self._give(engines))

    def is_behind(self, engine: str) -> bool:
        return self.given.get(engine, 0) != self.num_given

    async def catch_up(self, engine: str) -> None:
        for reason in self._give([engine]).values():
            raise EngineUnavailable(reason)

    async def turned(self) -> None:
        while self.back is None:
            await asyncio.sleep(0.05)

    async def go_back(self, engines: Collection[str]) -> dict[str, str]:
        # an iteration that was being trained when it was killed is trained again by now
        assert self.back is not None
        await asyncio.sleep(self.seconds)
        self.version, self.back = self.back, None
        self.num_given += 1
        return self._give(engines)

    async def finish(self, reason: str, *, is_over: bool) -> None:
        self.is_over = is_over

    async def close(self) -> None:
        return None

    def _give(self, engines: Collection[str]) -> dict[str, str]:
        away = {}
        for name in engines:
            if self.engines[name].is_down or self.engines[name].is_cut_off:
                away[name] = f"no answer from {name}"
            else:
                self.engines[name].version = self.version
                self.given[name] = self.num_given
        return away


class Killed(Exception):
    """The process is gone, between one statement and the next."""


class CrashingFile(RunFile):
    """Kills its process at a commit: before it, or right behind it."""

    commits_left = 1 << 30
    is_behind = False

    def flush(self) -> None:
        self.commits_left -= bool(self.changes)
        if not self.commits_left and not self.is_behind:
            raise Killed
        super().flush()
        if not self.commits_left:
            raise Killed


class World:
    """What a run outlives: its file, its engines, its output."""

    def __init__(
        self,
        folder: Path,
        config: C3poConfig,
        engines: Sequence[FakeEngine],
        ids: Sequence[str],
        *,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        self.path = folder / "out.run"
        self.config, self.engines, self.ids = config, list(engines), list(ids)
        self.epochs, self.seed = epochs, seed
        self.sink = FakeSink()
        self.notes: list[str] = []
        self.learner: FakeLearner | None = None
        self.crash: tuple[int, bool] | None = None
        """At which commit of the next process, and whether behind it."""

    def open(self) -> RunState:
        header = Header(
            id="",
            source="p.jsonl",
            epochs=self.epochs,
            seed=self.seed,
            sampling=SamplingParams(),
            config=self.config,
        )
        file = CrashingFile.open(self.path)
        if self.crash is not None:
            file.commits_left, file.is_behind = self.crash
            self.crash = None
        try:
            return RunState(file, header)
        except BaseException:
            file.close()
            raise

    async def drive(self, *, limit: int | None = None) -> RunState:
        """To its end, or until it is cancelled."""
        state = self.open()
        source = FakeSource(self.ids, self.epochs)
        source.resume(state.position)
        loop = asyncio.get_running_loop()
        driver = RolloutDriver(
            state,
            self.engines,
            source,
            self.sink,
            learner=self.learner,
            limit=limit,
            on_note=self.notes.append,
            clock=loop.time,
            has_threads=False,
        )
        try:
            await driver.run()
        finally:
            state.close()
        return state

    async def live(self, kills: Sequence[float] = (), *, limit: int | None = None) -> RunState:
        """Drive it, with a kill after each of these times since the last start, to its end."""
        workers = [asyncio.create_task(engine.work()) for engine in self.engines]
        try:
            for seconds in kills:
                task = asyncio.create_task(self.drive(limit=limit))
                done, _ = await asyncio.wait([task], timeout=seconds)
                if done:
                    break
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                # servers go on meanwhile
                await asyncio.sleep(seconds / 2)
            return await self.drive(limit=limit)
        finally:
            for worker in workers:
                worker.cancel()
