"""The journal beside the event loop: one thread, group commit, order kept.

A commit waits for the disk (4 ms, say), and the loop must not. There is no timer: whatever arrived
while one commit ran goes into the next, in order. A full disk stalls it: what must not be lost is
kept and tried again, new rollouts are refused. Any other fault ends it for good.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from .. import log
from ..errors import EverstepError, JournalError, JournalFull
from ..metrics import Registry
from ..rollout import Rollout
from .ops import NEW, JournalStore, Op, Query, Recovered, Summary

T = TypeVar("T")

# ops of one transaction: enough to make the disk's time per op small, few enough to stay short
MAX_BATCH = 1024
# compaction has more to do: it is called so much more often
_MORE_OFTEN = 120
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class _Item:
    """Something to do and who waits for it. op and call None: a barrier."""

    __slots__ = ("call", "future", "loop", "op", "since_s")

    def __init__(self, op: Op | None = None, call: Callable[[], Any] | None = None) -> None:
        self.op, self.call = op, call
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.since_s = time.monotonic()

    def settle(self, result: Any, error: BaseException | None) -> None:
        """On the loop."""
        if self.future.done():
            return  # whoever waited was cancelled
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


_Batch = list[_Item]
_Waits = Generator[float, None, None]


class JournalThread:
    """Owns a store; every method is called on the event loop.

    on_stall         called on the loop with the reason when the disk is full, and with None when
                     it goes on
    compact_every_s  how often the store is compacted beside its work
    """

    def __init__(
        self,
        store: JournalStore,
        *,
        metrics: Registry | None = None,
        on_stall: Callable[[str | None], None] | None = None,
        compact_every_s: float = 60.0,
    ) -> None:
        self.stalled: str | None = None
        """Why nothing is written for the moment."""
        self.failure: str | None = None
        """Why nothing is written any more."""
        self.on_stall = on_stall
        self._store = store
        self._compact_every_s = compact_every_s
        self._compact_due_s = time.monotonic() + compact_every_s
        self._items: deque[_Item] = deque()
        self._work = threading.Condition()
        self._is_closing = False
        self._declare_metrics(metrics or Registry())
        self._begin()

    def _declare_metrics(self, m: Registry) -> None:
        self._lag = m.gauge(
            "everstep:journal_lag_seconds", "from being given to being durable, last commit"
        )
        self._commit_s = m.histogram("everstep:journal_fsync_seconds", "commits, fsync included")
        self._bytes = m.gauge("everstep:journal_bytes", "size of the journal in use")
        self._rows = m.gauge("everstep:journal_rows", "rollouts live or not yet acknowledged")

    # --- on the loop -------------------------------------------------------------------

    def commit(self, op: Op) -> asyncio.Future[None]:
        """A future that is done once `op` is durable; futures are done in the order of calls.

        It raises JournalFull (of what is NEW), Conflict, IllegalState, InvalidTrajectory: then `op`
        is not written; JournalError: the journal has failed, or was closed.
        """
        return self._put(_Item(op=op))

    async def recover(self) -> Recovered:
        return await self._call(self._store.recover)

    async def read(self, rollout_id: str) -> Rollout | None:
        return await self._call(lambda: self._store.read(rollout_id))

    async def summary(self, rollout_id: str) -> Summary | None:
        return await self._call(lambda: self._store.summary(rollout_id))

    async def read_many(self, rollout_ids: Sequence[str]) -> list[Rollout | None]:
        """As `read` each, in one go."""
        return await self._call(lambda: [self._store.read(one) for one in rollout_ids])

    async def summaries(self, rollout_ids: Sequence[str]) -> list[Summary | None]:
        """As `summary` each, in one go."""
        return await self._call(lambda: [self._store.summary(one) for one in rollout_ids])

    async def list(self, query: Query) -> list[Summary]:
        return await self._call(lambda: self._store.list(query))

    async def flush(self) -> None:
        """Return once everything given before is durable (or has failed)."""
        await self._put(_Item())

    async def close(self, *, timeout_s: float = 10.0) -> None:
        """Write what was given, close the store, end the thread. Idempotent.

        A full disk is waited for at most timeout_s; what is left then fails with JournalError.
        """
        if not self._is_closing:
            item = _Item()
            with self._work:
                self._items.append(item)
                self._work.notify()
            # those who wait for their commits hear what became of them
            with contextlib.suppress(TimeoutError, JournalError):
                await asyncio.wait_for(item.future, timeout_s)
            with self._work:
                self._is_closing = True
                self._work.notify()
        await self._ended()

    async def _call(self, call: Callable[[], T]) -> T:
        result: T = await self._put(_Item(call=call))
        return result

    def _put(self, item: _Item) -> asyncio.Future[Any]:
        with self._work:
            if self._is_closing:
                item.settle(None, JournalError(self.failure or "the journal is closed"))
            else:
                self._items.append(item)
                self._work.notify()
        return item.future

    # --- on the thread -----------------------------------------------------------------

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    async def _ended(self) -> None:
        while self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, 1.0)

    def _run(self) -> None:
        for timeout_s in self._all():
            with self._work:
                self._work.wait_for(lambda: self._items or self._is_closing, timeout=timeout_s)

    def _all(self) -> _Waits:
        """All that the thread does. Yields how long to wait, unless there is something to do."""
        while True:
            yield max(self._compact_due_s - time.monotonic(), 0.0)
            batch = self._take()
            if batch is None:
                break
            if batch and batch[0].call is not None:
                self._answer(batch[0])
            elif batch:
                yield from self._commit(batch)
            if time.monotonic() >= self._compact_due_s:
                self._compact()
        try:
            self._store.close()
        except JournalError as error:
            self._fail(error)
        self._refuse_all(JournalError(self.failure or "the journal is closed"))

    def _take(self) -> _Batch | None:
        """The next call alone, or all ops before it; [] when it is time to compact; None: end."""
        with self._work:
            if not self._items:
                return None if self._is_closing else []
            batch = [self._items.popleft()]
            if batch[0].call is None:
                while self._items and self._items[0].call is None and len(batch) < MAX_BATCH:
                    batch.append(self._items.popleft())
            return batch

    def _answer(self, item: _Item) -> None:
        assert item.call is not None
        try:
            if self.failure is not None:
                raise JournalError(self.failure)
            result = item.call()
        except EverstepError as error:
            self._settle([item], error)
        except Exception as error:
            self._settle([item], JournalError(f"journal: internal error: {error!r}"))
        else:
            _call_soon(item.loop, item.settle, result, None)

    def _commit(self, batch: _Batch) -> _Waits:
        """Write the batch; at its end every item is settled."""
        tries = 0
        while batch:
            started_s = time.monotonic()
            error = self._try(batch)
            if error is None:
                if self.stalled is not None:
                    self._say_stalled(None, batch[0].loop)
                self._settle(batch, None, started_s)
                break
            if isinstance(error, JournalFull):
                refused = [item for item in batch if isinstance(item.op, NEW)]
                self._settle(refused, error)
                batch = [item for item in batch if not isinstance(item.op, NEW)]
                if refused or not batch:
                    continue
                if not (yield from self._stall(str(error), batch, tries)):
                    break
                tries += 1
            elif isinstance(error, JournalError):
                self._fail(error)
                self._settle(batch, error)
                break
            elif len(batch) == 1:
                self._settle(batch, error)
                break
            else:
                # one op contradicts what is there: the others must not suffer for it
                for item in batch:
                    yield from self._commit([item])
                break

    def _try(self, batch: Sequence[_Item]) -> EverstepError | None:
        if self.failure is not None:
            return JournalError(self.failure)
        ops = [item.op for item in batch if item.op is not None]
        try:
            if ops:
                self._store.commit(ops)
        except EverstepError as error:
            return error
        except Exception as error:
            return JournalError(f"journal: internal error: {error!r}")
        return None

    def _stall(self, reason: str, batch: _Batch, tries: int) -> Generator[float, None, bool]:
        """Wait a while; calls are answered, new rollouts refused, all else joins the batch.

        False: it is being closed, and the batch has failed.
        """
        if self.stalled != reason:
            self._say_stalled(reason, batch[0].loop)
        until_s = time.monotonic() + _BACKOFF_S[min(tries, len(_BACKOFF_S) - 1)]
        while (left_s := until_s - time.monotonic()) > 0:
            yield left_s
            with self._work:
                arrived = list(self._items)
                self._items.clear()
                is_closing = self._is_closing
            for item in arrived:
                if item.call is not None:
                    self._answer(item)
                elif isinstance(item.op, NEW):
                    self._settle([item], JournalFull(reason))
                else:
                    batch.append(item)
            if is_closing:
                self._settle(batch, JournalError(f"closed while it could not write: {reason}"))
                return False
        return True

    def _say_stalled(self, reason: str | None, loop: asyncio.AbstractEventLoop) -> None:
        self.stalled = reason
        if reason is None:
            log.event("journal.goes_on")
        else:
            log.event("journal.stalled", level="error", reason=reason)
        if self.on_stall is not None:
            _call_soon(loop, self.on_stall, reason)

    def _fail(self, error: JournalError) -> None:
        if self.failure is None:
            self.failure = str(error)
            log.event("journal.failed", level="error", reason=self.failure)

    def _compact(self) -> None:
        self._compact_due_s = time.monotonic() + self._compact_every_s
        if self.failure is not None:
            return
        try:
            if self._store.compact():
                self._compact_due_s = time.monotonic() + self._compact_every_s / _MORE_OFTEN
        except JournalFull:
            return  # it gives room only where there is some left to work in; tried again later
        except JournalError as error:
            self._fail(error)

    def _refuse_all(self, error: JournalError) -> None:
        with self._work:
            self._is_closing = True
            items = list(self._items)
            self._items.clear()
        self._settle(items, error)

    def _settle(
        self, items: Sequence[_Item], error: BaseException | None, started_s: float | None = None
    ) -> None:
        """Tell those who wait, all in one turn of the loop. started_s: of a commit that is done."""
        if not items:
            return
        took_s = None if started_s is None else time.monotonic() - started_s
        size = None if took_s is None else (self._store.num_bytes, self._store.num_rollouts)

        def tell() -> None:
            if took_s is not None and size is not None:
                self._commit_s.observe(took_s)
                self._lag.set(time.monotonic() - items[0].since_s)
                self._bytes.set(size[0])
                self._rows.set(size[1])
            for item in items:
                item.settle(None, error)

        _call_soon(items[0].loop, tell)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> None:
    # RuntimeError: the loop is closed, nobody waits any more
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)
