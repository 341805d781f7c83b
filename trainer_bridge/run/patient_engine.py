"""An engine whose full disk is waited for: a run stands still meanwhile, says so, and goes on."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ...engine.errors import JournalFull, Overloaded
from ...engine.rollout import Rollout
from .engine import Budget, Engine, Facts, Prompt, Seen, Work

T = TypeVar("T")
RETRY_S = 1.0


class PatientEngine:
    """An `Engine` over another. What that one has no room for now is asked for again until it has.

    on_note  said to the user, one line: once when its disk is full, once when there is room again
    """

    def __init__(self, engine: Engine, on_note: Callable[[str], None]) -> None:
        self.name = engine.name
        self._engine = engine
        self._note = on_note
        self._is_full = False

    async def _room(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                result = await call()
            except Overloaded as error:
                await asyncio.sleep(max(RETRY_S, error.retry_after_s))
            except JournalFull as error:
                if not self._is_full:
                    self._is_full = True
                    self._note(f"{self.name}: {error}; the run waits until there is room")
                await asyncio.sleep(RETRY_S)
            else:
                if self._is_full:
                    self._is_full = False
                    self._note(f"{self.name}: there is room again; the run goes on")
                return result

    # --- what takes room -----------------------------------------------------------------

    async def submit(self, work: Work) -> str:
        return await self._room(lambda: self._engine.submit(work))

    async def cancel(self, rollout_ids: Sequence[str]) -> None:
        await self._room(lambda: self._engine.cancel(rollout_ids))

    async def acknowledge(self, rollout_ids: Sequence[str]) -> None:
        await self._room(lambda: self._engine.acknowledge(rollout_ids))

    async def open_budget(
        self, pool: str, tokens: int | None, key: str, places: int | None = None
    ) -> Budget:
        return await self._room(lambda: self._engine.open_budget(pool, tokens, key, places))

    async def close_budget(self, budget_id: str) -> None:
        await self._room(lambda: self._engine.close_budget(budget_id))

    # --- what takes none -----------------------------------------------------------------

    async def start(self) -> Facts:
        return await self._engine.start()

    async def prepare(self, prompt: Prompt) -> Prompt:
        return await self._engine.prepare(prompt)

    async def ended(self, rollout_id: str) -> Rollout:
        return await self._engine.ended(rollout_id)

    async def read(self, rollout_id: str) -> Rollout:
        return await self._engine.read(rollout_id)

    async def known(self, pool: str) -> list[Seen]:
        return await self._engine.known(pool)

    async def budget(self, budget_id: str, wait_s: float) -> Budget:
        return await self._engine.budget(budget_id, wait_s)

    async def budgets(self, pool: str) -> list[Budget]:
        return await self._engine.budgets(pool)

    async def lengths(self, pool: str, rollout_ids: Sequence[str]) -> list[int]:
        return await self._engine.lengths(pool, rollout_ids)

    async def close(self) -> None:
        await self._engine.close()
