"""Calls between processes over a network that delays, loses, repeats and reorders them.

What travels is plain values that nobody changes afterwards. A call that gets no answer in time has
an unknown outcome, and it may still be carried out later.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct

from everstep.engine.errors import EverstepError

from .loop import Process, SimLoop

Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]


class Quality(Struct, frozen=True):
    """Of a network. delay_s: mean; late: share of messages that take a hundred times as long."""

    delay_s: float = 0.003
    late: float = 0.0
    lost: float = 0.0
    twice: float = 0.0


class NoAnswer(Exception):
    """Whether it was done is not known."""


class Refused(Exception):
    """The other side said no. code: of its error; retryable: the same call may succeed later."""

    def __init__(self, code: str, message: str, *, is_retryable: bool) -> None:
        super().__init__(message)
        self.code, self.is_retryable = code, is_retryable


class Network:
    def __init__(self, loop: SimLoop, rng: random.Random, quality: Quality) -> None:
        self._loop, self._rng, self._quality = loop, rng, quality
        self._servers: dict[str, tuple[Process, Handler]] = {}
        self.cut: set[str] = set()
        """Servers that nobody reaches."""

    def serve(self, name: str, process: Process, handler: Handler) -> None:
        self._servers[name] = (process, handler)

    def heal(self) -> None:
        self._quality = Quality(delay_s=self._quality.delay_s)
        self.cut.clear()

    async def call(
        self, caller: Process, server: str, method: str, timeout_s: float, **values: Any
    ) -> Any:
        """Its answer; raises NoAnswer or Refused."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        request = _Request(self, caller, server, method, values, answer)
        self._send(request.begin, None)
        if self._rng.random() < self._quality.twice:
            self._send(request.begin, None)
        timer = self._loop.call_later(timeout_s, request.give_up, self._rng.random() < 0.5)
        try:
            return await answer
        finally:
            timer.cancel()
            if answer.done() and not answer.cancelled():
                # the caller may have left in the moment in which it came
                answer.exception()

    def _send(self, arrive: Callable[[], None], receiver: Process | None) -> None:
        """Let it arrive, in the process that receives it, or not."""
        quality = self._quality
        if self._rng.random() < quality.lost:
            return
        delay_s = self._rng.expovariate(1.0) * quality.delay_s
        if self._rng.random() < quality.late:
            delay_s *= 100
        if receiver is None:
            self._loop.outside(delay_s, arrive)
        else:
            receiver.call_later(delay_s, arrive)


class _Request:
    """One call under way; it may be carried out more than once, and is answered once."""

    def __init__(
        self,
        network: Network,
        caller: Process,
        server: str,
        method: str,
        values: dict[str, Any],
        answer: "asyncio.Future[Any]",
    ) -> None:
        self._network, self._caller, self._server = network, caller, server
        self._method, self._values, self._answer = method, values, answer
        self._tasks: list[asyncio.Task[Any]] = []

    def begin(self) -> None:
        """It has reached the server, if that is there."""
        found = self._network._servers.get(self._server)
        if found is None or found[0].is_dead or self._server in self._network.cut:
            self._reply(None, Refused("connection", "nobody listens", is_retryable=True))
            return
        process, handler = found
        self._tasks.append(process.spawn(self._carry_out(handler)))

    async def _carry_out(self, handler: Handler) -> None:
        try:
            result = await handler(self._method, self._values)
        except EverstepError as error:
            refusal = Refused(error.code, str(error), is_retryable=error.retryable)
            self._reply(None, refusal)
        else:
            self._reply(result, None)

    def _reply(self, result: Any, error: Exception | None) -> None:
        if self._server not in self._network.cut:
            self._network._send(lambda: self._settle(result, error), self._caller)

    def _settle(self, result: Any, error: Exception | None) -> None:
        if self._answer.done():
            return
        if error is None:
            self._answer.set_result(result)
        else:
            self._answer.set_exception(error)

    def give_up(self, is_disconnected: bool) -> None:
        """The caller waits no longer; a server that notices ends what it does for it."""
        if not self._answer.done():
            self._answer.set_exception(NoAnswer(f"{self._method} at {self._server}"))
        if is_disconnected:
            for task in self._tasks:
                task.cancel()
