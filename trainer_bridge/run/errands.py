"""What the records of a run ask engines for, had done: one task for each thing, none twice at a time.

    a place without a rollout ▸ submitted, and its end waited for      a leaving place ▸ cancelled
    a lease without a budget ▸ opened, and its end waited for          an ended rollout ▸ acknowledged

A task changes nothing of the run: what came of it goes into the inbox (trainer_bridge/run/tasks.py).
All of it may be done twice: keys and ids make the second time harmless.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from ...engine.errors import (
    IllegalState,
    InvalidRequest,
    UnknownBudget,
    UnknownRollout,
)
from ..c3po.words import Sample
from .engine import Engine, Prompt, Work
from .state import RunState
from .tasks import Ended, News, Submitted, Tasks
from .words import KeptPrompt, Lease, Place

# a longer poll only saves requests
BUDGET_POLL_S = 20.0


class Lines(Protocol):
    """Where prompts were read from."""

    def prompt(self, kept: KeptPrompt) -> Prompt:
        """Raises InvalidRequest."""
        ...


class Errands:
    """Speaks with engines for a run.

    on_note  said to the user, one line
    """

    def __init__(
        self,
        state: RunState,
        engines: Mapping[str, Engine],
        lines: Lines,
        tasks: Tasks,
        on_note: Callable[[str], None],
    ) -> None:
        self._state = state
        self._engines = engines
        self._lines = lines
        self._tasks = tasks
        self._note = on_note
        self._prompts: dict[str, Prompt] = {}
        self._closed: set[str] = set()
        self._cancelled: set[str] = set()
        self._told: dict[str, list[str]] = {name: [] for name in engines}
        """Ended ones that the run has once it is committed; `_kept` were committed."""
        self._kept: dict[str, list[str]] = {name: [] for name in engines}

    # --- prompts -------------------------------------------------------------------------

    async def prepare(self, kept: KeptPrompt) -> None:
        """Raises InvalidRequest where it cannot run."""
        engine = self._engines[self._state.engines[0]]
        self._prompts[kept.name] = await engine.prepare(self._lines.prompt(kept))

    def prompt(self, name: str) -> Prompt:
        """As its line says it, maybe not prepared."""
        found = self._prompts.get(name)
        return self._lines.prompt(self._state.prompts[name]) if found is None else found

    def forget(self, name: str) -> None:
        """None of its samples is submitted any more."""
        self._prompts.pop(name, None)

    # --- what there is to do -------------------------------------------------------------

    def begin(self) -> None:
        """Have tasks for everything that is outstanding."""
        state = self._state
        for sample, place in state.places.items():
            # a lost sample may be placed again while the task of its last place still ends
            key = ("place", sample, place.key)
            if place.engine in state.engines and key not in self._tasks:
                self._tasks.run(key, place.engine, partial(self._follow, place))
        for name in state.engines:
            self._cancel_leaving(name)
            self._kept[name] += self._told[name]
            self._told[name].clear()
            if self._kept[name] and ("ack", name) not in self._tasks:
                self._tasks.run(("ack", name), name, partial(self._acknowledge, name))
        for lease in state.active_leases():
            if lease.engine in state.engines:
                self._see_to(lease)

    def acknowledge(self, name: str, rollout_id: str) -> None:
        """At the next `begin`: by then the run has it."""
        self._told[name].append(rollout_id)

    def _see_to(self, lease: Lease) -> None:
        key = ("lease", lease.iteration, lease.number)
        if key not in self._tasks:
            self._tasks.run(key, lease.engine, partial(self._lease, lease))
        budget_id = lease.budget_id
        if lease.state == "closing" and budget_id is not None and budget_id not in self._closed:
            self._closed.add(budget_id)
            close = partial(self._engines[lease.engine].close_budget, budget_id)
            self._tasks.run(("close", budget_id), lease.engine, close)

    def _cancel_leaving(self, name: str) -> None:
        places = self._state.places.values()
        leaving = [p for p in places if p.is_leaving and p.engine == name and p.rollout_id]
        ids = [p.rollout_id for p in leaving if p.rollout_id not in self._cancelled]
        found = [rollout_id for rollout_id in ids if rollout_id is not None]
        if found:
            self._cancelled.update(found)
            cancel = partial(self._engines[name].cancel, found)
            self._tasks.run(("cancel", *found), name, cancel)

    # --- tasks ---------------------------------------------------------------------------

    async def _follow(self, place: Place) -> None:
        """Submit a sample unless that is done, and wait for its end."""
        engine = self._engines[place.engine]
        rollout_id = place.rollout_id
        if rollout_id is None:
            self._tasks.put(await self.submit(engine, place))
            await self._tasks.told()
            rollout_id = place.rollout_id
            if rollout_id is None:
                return
        try:
            rollout = await engine.ended(rollout_id)
        except UnknownRollout:
            self._tasks.put(partial(self._state.lost, [(place.sample, rollout_id)]))
        else:
            self._tasks.put(Ended(place.sample, rollout))

    async def submit(self, engine: Engine, place: Place) -> News:
        """Submit; returns what is to be told of it."""
        state, sample = self._state, place.sample
        kept = state.prompts[sample.prompt]
        try:
            prompt = self._prompts.get(sample.prompt)
            if prompt is None:
                prompt = await engine.prepare(self._lines.prompt(kept))
            self._prompts[sample.prompt] = prompt
            work = Work(
                key=place.key,
                prompt=prompt,
                group_id=state.group_id(sample.prompt),
                attempt=sample.attempt,
                seed=state.seed_of(sample, prompt.id),
                pool=state.pool,
            )
            rollout_id = await engine.submit(work)
        except InvalidRequest as error:
            return partial(self._refuse, sample, str(error))
        return Submitted(place, rollout_id)

    def _refuse(self, sample: Sample, message: str) -> None:
        kept = self._state.prompts.get(sample.prompt)
        if kept is not None:
            self._state.refused(sample, kept.line, message)

    async def _lease(self, lease: Lease) -> None:
        """Open a budget unless that is done, and wait until it is over."""
        try:
            await self._run_lease(lease)
        except UnknownBudget:
            self._tasks.put(partial(self._state.forget_lease, lease))

    async def _run_lease(self, lease: Lease) -> None:
        engine, state = self._engines[lease.engine], self._state
        if lease.budget_id is None:
            # nobody who leaves takes of a budget
            await self._tasks.over("cancel", lease.engine)
            budget = await engine.open_budget(state.pool, lease.tokens, lease.key, lease.places)
            self._tasks.put(partial(self._opened, lease, budget.id))
        else:
            budget = await engine.budget(lease.budget_id, 0.0)
        while budget.is_open:
            budget = await engine.budget(budget.id, BUDGET_POLL_S)
        self._tasks.put(partial(self._over, lease, budget.used))

    def _opened(self, lease: Lease, budget_id: str) -> None:
        if lease.state == "closing":
            self._state.move_lease(lease, budget_id=budget_id)
        elif lease.state == "asked":
            self._state.move_lease(lease, budget_id=budget_id, state="open")

    def _over(self, lease: Lease, used: int) -> None:
        if lease.is_active:
            self._state.move_lease(lease, used=used, state="over")

    async def _acknowledge(self, name: str) -> None:
        """What is kept meanwhile goes together, too."""
        while rollout_ids := self._kept[name]:
            self._kept[name] = []
            try:
                await self._engines[name].acknowledge(rollout_ids)
            except (UnknownRollout, IllegalState) as error:
                # the run has them; whoever made them forget can only have been somebody else
                self._note(f"{name}: {error}")
