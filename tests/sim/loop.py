"""An event loop in virtual time, and processes that live and die in it.

Nothing waits: when nobody is ready, time jumps to the next timer. Who of several tasks that are
ready goes first is drawn, so that interleavings vary; the order of plain callbacks is kept, as
asyncio promises it. A process that is killed stops where it is: not even a `finally` of it runs.
"""

import asyncio
import contextlib
import heapq
import math
import random
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

from everstep.engine.errors import EverstepError

TaskType = asyncio.Task


MOST_TURNS = 300_000
"""Of the loop, in one history; usual are some thousand."""


class Stuck(Exception):
    """The simulation would never end."""


class Process:
    """Tasks that live and die together, with those that they start."""

    def __init__(self, loop: "SimLoop", name: str, parent: "Process | None" = None) -> None:
        self.loop, self.name = loop, name
        self.is_dead = False
        self.tasks: list[asyncio.Task[Any]] = []
        self.children: list[Process] = []
        self.told_until_s = 0.0
        self.fuse = 0
        """After so many steps of it `on_fuse` is called; 0: never."""
        self.on_fuse: Callable[[], None] = lambda: None
        self.context = copy_context()
        self.context.run(_PROCESS.set, self)
        loop.processes.append(self)
        if parent is not None:
            parent.children.append(self)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        assert not self.is_dead, f"{self.name} is dead"
        return self.loop.create_task(work, context=self.context)

    def call_later(self, delay_s: float, call: Callable[..., Any], *args: Any) -> None:
        """Call it in this process, unless that is dead by then."""
        self.loop.call_at(self.loop.time() + delay_s, call, *args, context=self.context)

    def burn(self) -> None:
        """A step is over."""
        self.fuse -= 1
        if not self.fuse:
            self.on_fuse()

    def kill(self) -> None:
        """kill -9, its children too."""
        self.is_dead = True
        for child in self.children:
            child.kill()


_PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


def current() -> Process:
    """The process that runs now."""
    process = _PROCESS.get()
    assert process is not None, "outside of any process"
    return process


class SimLoop(asyncio.BaseEventLoop):
    """reorder  share of the turns in which tasks that are ready may overtake each other"""

    def __init__(self, rng: random.Random, *, reorder: float = 0.5, told_s: float = 0.001) -> None:
        super().__init__()
        self._rng, self._reorder, self._told_s = rng, reorder, told_s
        self._now_s = 0.0
        self.num_turns = 0
        self.processes: list[Process] = []
        self.set_task_factory(_make_task)

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        self.num_turns += 1
        if self.num_turns > MOST_TURNS:
            raise Stuck(f"{MOST_TURNS} turns of the loop, and no end")
        if not ready:
            while scheduled and scheduled[0]._cancelled:
                heapq.heappop(scheduled)
            if not scheduled:
                raise Stuck("nobody is ready and no timer is set")
            self._now_s = max(self._now_s, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._now_s:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            ready.append(timer)
        if len(ready) > 1 and self._rng.random() < self._reorder:
            self._defer_some()
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                process = handle._context.get(_PROCESS)
                if process is None or not process.is_dead:
                    handle._run()
                    if process is not None and process.fuse:
                        process.burn()

    def _defer_some(self) -> None:
        """Move the next step of some tasks behind all else that is ready."""
        early: list[Any] = []
        late: list[Any] = []
        for handle in self._ready:
            is_step = isinstance(getattr(handle._callback, "__self__", None), TaskType)
            (late if is_step and self._rng.random() < 0.5 else early).append(handle)
        self._ready.clear()
        self._ready.extend(early)
        self._ready.extend(late)

    def call_soon_threadsafe(
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Any:
        """What another thread says is heard a little later, in the order in which it was said."""
        process = _PROCESS.get()
        if process is None:
            return self.call_soon(callback, *args, context=context)
        due_s = self._now_s + self._rng.expovariate(1.0) * self._told_s
        process.told_until_s = math.nextafter(max(due_s, process.told_until_s), math.inf)
        return self.call_at(process.told_until_s, callback, *args, context=context)

    def outside(self, delay_s: float, call: Callable[..., Any], *args: Any) -> None:
        """Call it outside of any process: it happens whoever is dead by then."""
        self.call_at(self._now_s + delay_s, call, *args, context=Context())

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """There are no other threads: it is done now, and heard of a little later."""
        future = self.create_future()
        try:
            result = func(*args)
        except Exception as error:
            self.call_soon_threadsafe(_settle, future, None, error)
        else:
            self.call_soon_threadsafe(_settle, future, result, None)
        return future

    def _process_events(self, event_list: object) -> None:
        """There are none: nothing comes from outside."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""

    def unheard(self) -> list[BaseException]:
        """Errors of tasks that ended by them, and nobody looked. Who was killed may not have come to
        look at one that is raised on purpose."""
        found: list[BaseException] = []
        for process in self.processes:
            bad = [t for t in process.tasks if t.done() and not t.cancelled() and t._log_traceback]
            errors = [error for task in bad if (error := task.exception()) is not None]
            found += [e for e in errors if not (process.is_dead and isinstance(e, EverstepError))]
        return found

    def bury(self) -> None:
        """Close what is still suspended, so that the collector does not find it; then the loop."""
        asyncio._set_running_loop(self)
        try:
            for process in self.processes:
                for task in process.tasks:
                    if not task.done():
                        task._log_destroy_pending = False
                        with contextlib.suppress(BaseException):
                            task.get_coro().close()
        finally:
            asyncio._set_running_loop(None)
        self._ready.clear()
        self._scheduled.clear()
        self.processes.clear()
        self.close()


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
        # who asked may be killed before it comes to look
        future.exception()


def _make_task(
    loop: asyncio.AbstractEventLoop, work: Any, context: Context | None = None
) -> "asyncio.Task[Any]":
    task = asyncio.Task(work, loop=loop, context=context)
    process = _PROCESS.get() if context is None else context.get(_PROCESS)
    if process is not None:
        # nobody else may hold it: one that is dropped while it waits would be closed
        process.tasks.append(task)
    return task
