"""Calls to a server that go together: what many tasks ask for at once is one request.

Together  those that come while a request is under way are in the next one
Endings   the ends of many rollouts, waited for on few requests
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, TypeVar

from ..engine.errors import UnknownRollout
from ..engine.rollout import Found, Rollout

AskedT = TypeVar("AskedT")
AnswerT = TypeVar("AnswerT")

# requests of one kind that are under way: while one is carried out the next is on its way
WIDTH = 2
# of one request: so many whole rollouts may be in its answer
MOST = 64
# whose ends one request waits for; the server answers with no more than MOST of them
MOST_FOLLOWED = 256
# so long endings gather before they are asked for: short of what a driver's turn takes
GATHER_S = 0.005


class Together(Generic[AskedT, AnswerT]):
    """send: an answer, or an error, for each that is asked, in order; what it raises is for all."""

    def __init__(
        self, send: Callable[[Sequence[AskedT]], Awaitable[Sequence[AnswerT | Exception]]]
    ) -> None:
        self._send = send
        self._waiting: list[tuple[AskedT, asyncio.Future[AnswerT]]] = []
        self._open: set[asyncio.Task[None]] = set()

    async def __call__(self, asked: AskedT) -> AnswerT:
        future: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        if len(self._open) < WIDTH:
            # it begins after whoever else is ready now has asked
            task = asyncio.create_task(self._run())
            self._open.add(task)
            task.add_done_callback(self._open.discard)
        return await future

    async def _run(self) -> None:
        while self._waiting:
            # whoever was cancelled meanwhile asks for nothing
            due = [(asked, future) for asked, future in self._waiting if not future.done()]
            batch, self._waiting = due[:MOST], due[MOST:]
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: Sequence[tuple[AskedT, "asyncio.Future[AnswerT]"]]) -> None:
        try:
            answers = await self._send([asked for asked, _ in batch])
        except Exception as error:
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            _settle(future, answer)

    def close(self) -> None:
        """Nobody waits any more."""
        for task in self._open:
            task.cancel()


class Endings:
    """wait_any: those of several rollouts that have ended, once one has.

    A request is open for all who wait, and who comes later gets one of his own, unless the first is
    answered by then: what it leaves and who is new are asked for together again.
    """

    def __init__(self, wait_any: Callable[[Sequence[str]], Awaitable[Found]]) -> None:
        self._wait_any = wait_any
        self._futures: dict[str, asyncio.Future[Rollout]] = {}
        self._due: list[str] = []
        """Ids that no open request has."""
        self._timer: asyncio.TimerHandle | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def __call__(self, rollout_id: str) -> Rollout:
        future = self._futures.get(rollout_id)
        if future is None or future.done():
            future = asyncio.get_running_loop().create_future()
            self._futures[rollout_id] = future
            self._ask_for([rollout_id])
        return await asyncio.shield(future)

    def _ask_for(self, rollout_ids: Iterable[str]) -> None:
        self._due += rollout_ids
        if self._due and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self._ask)

    def _ask(self) -> None:
        self._timer = None
        while self._due:
            some, self._due = self._due[:MOST_FOLLOWED], self._due[MOST_FOLLOWED:]
            task = asyncio.create_task(self._request(some))
            self._open.add(task)
            task.add_done_callback(self._open.discard)

    async def _request(self, rollout_ids: Sequence[str]) -> None:
        try:
            found = await self._wait_any(rollout_ids)
        except Exception as error:
            for rollout_id in rollout_ids:
                self._settle(rollout_id, error)
            return
        for rollout in found.rollouts:
            self._settle(rollout.id, rollout)
        for rollout_id, reason in found.unknown.items():
            self._settle(rollout_id, UnknownRollout(reason))
        self._ask_for(name for name in rollout_ids if name in self._futures)

    def _settle(self, rollout_id: str, answer: Rollout | Exception) -> None:
        _settle(self._futures.pop(rollout_id), answer)

    def close(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._open:
            task.cancel()


def _settle(future: "asyncio.Future[AnswerT]", answer: AnswerT | Exception) -> None:
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
        # whoever waited may have left: the error was seen all the same
        future.exception()
    else:
        future.set_result(answer)
