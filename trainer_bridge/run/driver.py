"""The driver of C3PO++: engines sample, complete groups go into a file, and to a trainer.

`RunState` (trainer_bridge/run/state.py) holds the controller and every record of the run, and each
event is one commit there. This module looks at the records, has done what they ask for, and tells
what came of it:

    a place without a rollout ▸ submitted        a leaving place ▸ cancelled
    budget that is left ▸ leased to engines      all leases over ▸ rollouts read, iteration settled
    phase training ▸ groups written, trained, then trained(version)

It goes in turns: tell what came, decide, commit, and only then have done what was decided. All of
that may be done twice: keys, ids and the size of the output make the second time harmless. So a
driver that was killed carries on from the records, and needs no plan of its own.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from ...engine.errors import EngineUnavailable, InvalidRequest, LedgerError, UnknownRollout
from ...engine.rollout import Rollout
from ...engine.trajectory import decode, unpack
from ..c3po.words import Sample, Train, TrainGroup
from .engine import Engine
from .errands import Errands
from .fleet import Fleet
from .parts import Delivered, Groups, Learner, Sink, Source
from .patient_engine import PatientEngine
from .report import Report, Reporter
from .state import RunState
from .tasks import Ended, News, Submitted, Tasks
from .words import KeptPrompt, Lease, OutputMark, Place

T = TypeVar("T")

# how long tokens may take from a budget's count to the rollouts themselves
SETTLE_S = 10.0
LOOK_AGAIN_S = 1.0
_READ_AT_ONCE = 64


class RolloutDriver:
    """Runs one run to its end, or to `limit` iterations.

    learner      gets the groups of every iteration; None: they are written, and that is all
    score        gives them rewards, where there is no learner
    on_note      said to the user, one line: an engine stays away, or is back
    has_threads  whether commits and the output may be written beside the event loop
    """

    def __init__(
        self,
        state: RunState,
        engines: Sequence[Engine],
        source: Source,
        sink: Sink,
        *,
        learner: Learner | None = None,
        score: Callable[[Groups], Awaitable[Groups]] | None = None,
        limit: int | None = None,
        on_report: Callable[[Report], None] = lambda _: None,
        on_note: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        has_threads: bool = True,
    ) -> None:
        self._state = state
        self._engines = {engine.name: PatientEngine(engine, on_note) for engine in engines}
        self._source = source
        self._sink = sink
        self._learner = learner
        self._score = score
        self._limit = limit
        self._clock = clock
        self._has_threads = has_threads
        self._writing: asyncio.Future[Any] | None = None
        self._reporter = Reporter(state, self._engines, on_report, clock)
        self._tasks = Tasks(self._leave)
        self._errands = Errands(state, self._engines, source, self._tasks, on_note)
        self._fleet = Fleet(
            state,
            self._engines,
            self._tasks,
            submit=self._submit_now,
            on_note=on_note,
            learner=learner,
        )
        self._began_s = clock()

    async def run(self) -> None:
        """Until every prompt is delivered or given up, or the limit is reached.

        Raises EngineUnavailable where no engine is left, ConfigError, JournalError: what is done is
        kept, and the same run goes on from there.
        """
        try:
            self._sink.cut(self._state.output.size)
            await self._fleet.start()
            if self._learner is not None:
                served = self._fleet.digest
                self._let_go(await self._learner.start(self._state.engines, served))
                self._tasks.run("turns", "", partial(self._watch, self._learner))
            self._tasks.run("report", "", self._reporter.run)
            while await self._advance():
                await self._commit()
                self._errands.begin()
                self._tell(await self._tasks.news())
            await self._commit()
            is_done = self._state.machine.phase == "done"
            if is_done:
                await self._fleet.finish()
            if self._learner is not None:
                reason = "every prompt is done" if is_done else "its limit is reached"
                await self._learner.finish(reason, is_over=is_done)
            if is_done:
                # before that, whoever is started again has to say all farewells
                self._state.over()
                await self._commit()
        finally:
            if self._writing is not None and not self._writing.done():
                # the file is the caller's to close
                await asyncio.wait([self._writing])
            await self._tasks.close()
            if self._learner is not None:
                await self._learner.close()
            self._reporter.report()

    async def _commit(self) -> None:
        if self._state.has_news:
            await self._write(self._state.flush)

    async def _write(self, call: Callable[[], T]) -> T:
        """Do what waits for the disk, while the engine of this process goes on."""
        if not self._has_threads:
            return call()
        work = asyncio.ensure_future(asyncio.to_thread(call))
        self._writing = work
        return await asyncio.shield(work)

    # --- what there is to do -------------------------------------------------------------

    async def _advance(self) -> bool:
        """Decide all that can be decided by now; False: the run is over."""
        machine = self._state.machine
        while True:
            await self._go_back()
            await self._fleet.join()
            await self._extend()
            self._lease_out()
            match machine.phase:
                case "done":
                    return False
                case "idle":
                    if self._limit is not None and machine.iteration >= self._limit:
                        return False
                    self._state.begin()
                case "training":
                    await self._train()
                case "open" | "stopping":
                    if not await self._settle():
                        return True

    async def _extend(self) -> None:
        state = self._state
        while (wanted := state.machine.wants_prompts) and not state.position.is_at_end:
            kept, bad, position = self._source.read(wanted)
            for line, message in bad.items():
                state.bad_line(line, message)
            good = [one for one in kept if await self._is_runnable(one)]
            state.extend(good, position)

    async def _is_runnable(self, kept: KeptPrompt) -> bool:
        try:
            await self._errands.prepare(kept)
        except InvalidRequest as error:
            self._state.bad_line(kept.line, str(error))
            return False
        return True

    def _lease_out(self) -> None:
        """Give what is left of the budget to engines that need it, take it from those that do not."""
        state = self._state
        if state.machine.phase == "stopping":
            for lease in state.active_leases():
                self._give_back(lease)
        if state.machine.phase != "open":
            return
        state.deal()
        live = state.live()
        for lease in state.active_leases():
            if len(live) > 1 and not live.get(lease.engine, 1):
                self._give_back(lease)

    def _give_back(self, lease: Lease) -> None:
        if lease.state in ("asked", "open") and lease.engine in self._state.engines:
            self._state.move_lease(lease, state="closing")

    async def _train(self) -> None:
        """Write the complete groups, and have them trained."""
        state, machine = self._state, self._state.machine
        train = next(c for c in machine.outstanding() if isinstance(c, Train))
        groups = await self._scored(train)
        size = state.output.size
        if groups:
            size = await self._write(partial(self._sink.write, groups))
        if self._learner is not None:
            # what a trainer is given is what the records say, whatever happens next
            await self._commit()
            taught = await self._learner.train(train.iteration, groups, self._state.engines)
            self._fleet.version = taught.version
            if taught.is_turned and taught.version < (machine.version or 0):
                state.turned(taught.version)
            self._let_go(taught.away)
        now_s = self._clock()
        state.trained(train, self._fleet.version, OutputMark(size), now_s - self._began_s)
        self._began_s = now_s
        for group in train.groups:
            self._errands.forget(group.prompt)
        self._reporter.note_iteration()

    async def _scored(self, train: Train) -> Groups:
        groups: Groups = [self._delivered(group, train.iteration) for group in train.groups]
        if self._learner is not None:
            return await self._learner.score(train.iteration, groups)
        return groups if self._score is None else await self._score(groups)

    async def _go_back(self) -> None:
        """To the version that a trainer went back to, if nothing newer of it comes at once."""
        learner, state = self._learner, self._state
        if learner is None or learner.back is None or state.machine.phase == "training":
            return
        if learner.back < (state.machine.version or 0):
            # told before the first token under it can be
            state.turned(learner.back)
            await self._commit()
        self._let_go(await learner.go_back(state.engines))

    async def _watch(self, learner: Learner) -> None:
        """Wake up the driver whenever there is something to go back to."""
        while True:
            await learner.turned()
            await self._tasks.told()
            # until it is done: an iteration that is being trained comes first
            await asyncio.sleep(LOOK_AGAIN_S)

    def _let_go(self, away: Mapping[str, str]) -> None:
        for name, reason in away.items():
            self._leave(name, reason)

    def _delivered(self, group: TrainGroup, iteration: int) -> list[Delivered]:
        state = self._state
        kept = state.prompts[group.prompt]
        found = []
        for member in group.samples:
            finished = state.finished(member.sample)
            found.append(
                Delivered(
                    sample=member.sample,
                    prompt=kept,
                    prompt_id=self._errands.prompt(kept.name).id,
                    iteration=iteration,
                    engine=finished.engine,
                    spells=finished.spells,
                    earlier=state.fallen_of(member.sample),
                    rollout=unpack(decode(finished.data)),
                )
            )
        return found

    # --- the end of an iteration ---------------------------------------------------------

    async def _settle(self) -> bool:
        """Tell all that happened once nothing can happen any more; False: not yet."""
        state, machine = self._state, self._state.machine
        if state.active_leases():
            return False
        live = state.live()
        if machine.phase == "open" and machine.config.mode == "generated" and state.left:
            assert any(live.values()), "budget is left, and nobody can take it"
            return False
        until_s = self._clock() + SETTLE_S
        while not await self._read_all(self._reachable()):
            # of those that are being submitted nobody can be asked, and they may be whose it is
            if any(place.rollout_id is None for place in self._reachable()):
                return False
            if self._clock() > until_s:
                raise LedgerError(self._unexplained())
            await asyncio.sleep(0.05)
        # whoever is to be cancelled must not go on under the next budget
        if any(place.is_leaving for place in self._reachable()):
            return False
        state.settled()
        return True

    def _reachable(self) -> list[Place]:
        state = self._state
        return [place for place in state.places.values() if place.engine in state.engines]

    def _unexplained(self) -> str:
        words = [f"{e}: {n}" for e, n in self._state.unexplained().items()]
        return (
            f"iteration {self._state.machine.iteration}: tokens that budgets count and no rollout "
            f"has, by engine: {', '.join(words)}"
        )

    async def _read_all(self, places: Sequence[Place]) -> bool:
        """Tell how long those are that an engine has, in order of admission until all is told that
        budgets count: who stands by has nothing to tell. False where that is more than they have."""
        state = self._state
        gate = asyncio.Semaphore(_READ_AT_ONCE)
        lost: list[tuple[Sample, str]] = []

        async def read(place: Place, rollout_id: str) -> tuple[Sample, Rollout] | None:
            async with gate:
                try:
                    engine = self._engines[place.engine]
                    return place.sample, await engine.read(rollout_id)
                except UnknownRollout:
                    lost.append((place.sample, rollout_id))
                except EngineUnavailable as error:
                    self._tasks.put(partial(self._leave, place.engine, str(error)))
            return None

        order = {sample: number for number, sample in enumerate(state.machine.pool)}
        places = sorted(places, key=lambda place: order.get(place.sample, -1))
        size = state.machine.config.capacity
        for start in range(0, len(places), size):
            if not state.unexplained():
                break
            some = places[start : start + size]
            found = await asyncio.gather(*(read(p, p.rollout_id) for p in some if p.rollout_id))
            self._saw([pair for pair in found if pair is not None])
            state.lost(lost)
            lost.clear()
            self._tell(self._tasks.news_by_now())
        return not state.unexplained()

    # --- what happened -------------------------------------------------------------------

    def _tell(self, news: Iterable[News]) -> None:
        """In order; what is of one kind is one commit."""
        ended: list[tuple[Sample, Rollout]] = []
        submitted: list[tuple[Place, str]] = []

        def flush() -> None:
            # nobody ends who was not submitted before
            if submitted:
                self._state.submitted(submitted)
            self._saw(ended)
            submitted.clear()
            ended.clear()

        for item in news:
            match item:
                case Submitted(place, rollout_id):
                    submitted.append((place, rollout_id))
                case Ended(sample, rollout):
                    ended.append((sample, rollout))
                case _:
                    flush()
                    item()
        flush()

    def _leave(self, name: str, reason: str) -> None:
        self._fleet.leave(name, reason)

    def _saw(self, found: Sequence[tuple[Sample, Rollout]]) -> None:
        state = self._state
        ended: list[tuple[str, Rollout]] = []
        for sample, rollout in found:
            place = state.places.get(sample)
            if rollout.versions:
                self._fleet.version = max(self._fleet.version, rollout.versions[-1])
            if place is not None and rollout.state.is_ended and place.rollout_id == rollout.id:
                ended.append((place.engine, rollout))
        if found:
            state.saw(found)
        for engine, rollout in ended:
            reason = rollout.finish_reason
            self._reporter.note_ended(rollout)
            if reason is not None and reason.type != "abort":
                self._errands.acknowledge(engine, rollout.id)

    async def _submit_now(self, engine: Engine, place: Place) -> None:
        self._tell([await self._errands.submit(engine, place)])
