"""The engines of a run: who can be reached, what each must and must not hold, who stays away.

enter   an engine has what the records say and nothing else of this run
leave   it stays away: its samples go elsewhere, its lease is lost
revive  it is asked now and then, and enters again
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Protocol

from ...engine.errors import ConfigError, EngineUnavailable
from .engine import Engine, Facts
from .state import RunState
from .tasks import Tasks
from .words import Place

REVIVE_EVERY_S = 5.0
_METER_TOKENS = 1


class Weights(Protocol):
    """Whoever gives engines new weights (`parts.Learner`)."""

    def is_behind(self, engine: str) -> bool: ...

    async def catch_up(self, engine: str) -> None: ...


class Fleet:
    """Reaches engines, and lets go of those that stay away.

    submit   has a place submitted, and tells what came of it
    learner  changes the weights while the run goes on: then numerics alone must stay
    """

    def __init__(
        self,
        state: RunState,
        engines: Mapping[str, Engine],
        tasks: Tasks,
        *,
        submit: Callable[[Engine, Place], Awaitable[None]],
        on_note: Callable[[str], None],
        learner: Weights | None = None,
    ) -> None:
        self.version = 0
        """The newest that an engine said it serves, or that a token was sampled under."""
        self.digest = ""
        """Of the weights that all serve; "" where a trainer has changed them by now."""
        self._learner = learner
        self._state = state
        self._engines = engines
        self._tasks = tasks
        self._submit = submit
        self._note = on_note
        self._away: set[str] = set()
        self._joining: dict[str, Facts] = {}
        """Engines that are back, and were given another version than the rest."""

    async def start(self) -> None:
        """Reach them. One that is away is borne where the run has begun and another is there.

        Raises what it raised otherwise; ConfigError where they serve different weights.
        """
        state, names = self._state, list(self._engines)
        starts = (engine.start() for engine in self._engines.values())
        results = await asyncio.gather(*starts, return_exceptions=True)
        found: dict[str, Facts] = {}
        away: dict[str, EngineUnavailable] = {}
        for name, result in zip(names, results, strict=True):
            if isinstance(result, Facts):
                found[name] = result
            elif isinstance(result, EngineUnavailable) and len(names) > 1 and not state.is_new:
                away[name] = result
            else:
                raise result
        if not found:
            raise next(iter(away.values()))
        self._check_weights(found)
        state.engines = list(found)
        for name in found:
            await self._enter(name)
        for name, error in away.items():
            self.leave(name, str(error))
        # of servers that the command does not name any more
        for name in {p.engine for p in state.places.values()} - set(self._engines):
            self._book_lost(name, "it is not named any more")

    def leave(self, name: str, reason: str) -> None:
        """An engine stays away. Raises EngineUnavailable where it is the last one."""
        state = self._state
        if name in self._away:
            return
        if name in state.engines:
            if len(state.engines) == 1:
                raise EngineUnavailable(
                    f"{reason}; what is done is kept: run the same command again"
                )
            state.engines.remove(name)
        self._away.add(name)
        self._tasks.cancel(name)
        self._book_lost(name, reason)
        self._tasks.run(("revive", name), "", partial(self._revive, name))

    async def join(self) -> None:
        """Let in those that are back, with what the others serve; no version may be given meanwhile."""
        while self._joining and self._learner is not None:
            name, facts = self._joining.popitem()
            try:
                await self._learner.catch_up(name)
            except EngineUnavailable:
                self._tasks.run(("revive", name), "", partial(self._revive, name))
            else:
                self._return(name, facts)

    async def finish(self) -> None:
        """Nothing of the run is left in an engine."""
        for name in self._state.engines:
            engine = self._engines[name]
            known = await engine.known(self._state.pool)
            left = [one.id for one in known if not one.is_acked]
            if left:
                await engine.cancel(left)
                await engine.acknowledge(left)

    def _book_lost(self, name: str, reason: str) -> None:
        num_samples, unknown = self._state.leave(name)
        self._note(
            f"{name} stays away ({reason}): {num_samples} rollouts are sampled again elsewhere, "
            f"{unknown} tokens of the budget are lost"
        )

    def _check_weights(self, found: Mapping[str, Facts]) -> None:
        # what was trained before is given to those that have it not
        is_trained = self._learner is not None
        is_changing = is_trained and self._state.machine.version is not None
        said = {name: f.numerics if is_changing else f.weights for name, f in found.items()}
        (first, facts), *_ = found.items()
        for name, other in said.items():
            if other != said[first]:
                raise ConfigError(
                    f"{first} serves {said[first]}, {name} serves {other}: a run needs engines "
                    f"with the same {'' if is_changing else 'weights and '}numerics"
                )
        self._state.serve(facts.numerics if is_trained else facts.weights)
        self.digest = "" if is_changing else facts.digest
        self.version = max(self.version, *(f.version for f in found.values()))

    async def _enter(self, name: str) -> None:
        engine, state = self._engines[name], self._state
        # a pool is metered from its first budget on: not one token may come before
        budget = await engine.open_budget(state.pool, _METER_TOKENS, f"{state.pool}/meter")
        await engine.close_budget(budget.id)
        for place in [p for p in state.places.values() if p.engine == name]:
            if place.rollout_id is None:
                await self._submit(engine, place)
        await self._sweep(engine)

    async def _sweep(self, engine: Engine) -> None:
        """Cancel and close what no record speaks of: what was begun for one that was lost."""
        state = self._state
        leases = [lease for lease in state.active_leases() if lease.engine == engine.name]
        leased = {lease.budget_id for lease in leases}
        if None not in leased:
            # an unanswered lease is asked for again, under its key
            for budget in await engine.budgets(state.pool):
                if budget.is_open and budget.id not in leased:
                    await engine.close_budget(budget.id)
        known = {place.rollout_id for place in state.places.values()}
        seen = [one for one in await engine.known(state.pool) if one.id not in known]
        stray = [one.id for one in seen if not one.is_ended]
        done = [one.id for one in seen if one.is_ended and not one.is_aborted and not one.is_acked]
        if stray:
            await engine.cancel(stray)
        if done:
            await engine.acknowledge(done)

    async def _revive(self, name: str) -> None:
        while True:
            await asyncio.sleep(REVIVE_EVERY_S)
            try:
                facts = await self._engines[name].start()
                await self._enter(name)
                if self._learner is not None:
                    await self._learner.catch_up(name)
            except EngineUnavailable:
                continue
            self._tasks.put(partial(self._return, name, facts))
            return

    def _return(self, name: str, facts: Facts) -> None:
        if self._learner is not None and self._learner.is_behind(name):
            # the others were given another version meanwhile
            self._joining[name] = facts
            return
        self._check_weights({name: facts})
        self._away.discard(name)
        order = list(self._engines)
        self._state.engines = sorted([*self._state.engines, name], key=order.index)
        self._note(f"{name} is back")
