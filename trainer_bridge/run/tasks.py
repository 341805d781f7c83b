"""What a driver waits for: tasks that speak with engines, and the inbox into which their news go.

A task changes nothing of the run. It puts into the inbox what is to be told, and the driver tells
it, one after the other, between its own steps.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Any

from msgspec import Struct

from ...engine.errors import EngineUnavailable
from ...engine.rollout import Rollout
from ..c3po.words import Sample
from .words import Place

Call = Callable[[], None]


class Ended(Struct):
    """A rollout has ended."""

    sample: Sample
    rollout: Rollout


class Submitted(Struct):
    """The engine of a place has its sample under this id."""

    place: Place
    rollout_id: str


News = Ended | Submitted | Call


class Tasks:
    """Tasks by key, none twice at a time.

    on_away  (engine, reason): told where a task finds that its engine stays away
    """

    def __init__(self, on_away: Callable[[str, str], None]) -> None:
        self._on_away = on_away
        self._inbox: asyncio.Queue[News] = asyncio.Queue()
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}
        self._owners: dict[Hashable, str] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tasks

    def put(self, news: News) -> None:
        """To be told."""
        self._inbox.put_nowait(news)

    async def news(self) -> deque[News]:
        """All that there is to tell, in order; waits for the first."""
        found = deque([await self._inbox.get()])
        return found + self.news_by_now()

    def news_by_now(self) -> deque[News]:
        found: deque[News] = deque()
        while not self._inbox.empty():
            found.append(self._inbox.get_nowait())
        return found

    async def told(self) -> None:
        """Return once all that the inbox has by now was told."""
        seen = asyncio.Event()
        self.put(seen.set)
        await seen.wait()

    def run(self, key: Hashable, owner: str, make: Callable[[], Awaitable[Any]]) -> None:
        """Run it; what it raises is news. owner: the engine that it speaks with, or ""."""

        async def guarded() -> None:
            try:
                await make()
            except EngineUnavailable as error:
                self.put(partial(self._on_away, owner, str(error)))
            except Exception as error:
                self.put(partial(_raise, error))

        def over(task: "asyncio.Task[None]") -> None:
            if self._tasks.get(key) is task:
                del self._tasks[key]
                self._owners.pop(key, None)

        task = asyncio.create_task(guarded())
        self._tasks[key] = task
        self._owners[key] = owner
        task.add_done_callback(over)

    def cancel(self, owner: str) -> None:
        """Those that speak with an engine."""
        for key in [key for key, name in self._owners.items() if name == owner]:
            self._tasks[key].cancel()

    async def over(self, kind: str, owner: str) -> None:
        """Return once those whose key begins so are over."""
        keys = [key for key in self._tasks if isinstance(key, tuple) and key[0] == kind]
        found = [self._tasks[key] for key in keys if self._owners.get(key) == owner]
        await asyncio.gather(*found, return_exceptions=True)

    async def close(self) -> None:
        """Cancel them all."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise(error: Exception) -> None:
    raise error
