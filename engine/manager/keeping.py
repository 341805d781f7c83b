"""The journal's side of a manager: what must be durable before it is shown, and what is read back.

    accept   journaled, then held and sent to the core; under an Idempotency-Key once
    append   a step's tokens of all durable rollouts: journaled, then applied and published
    end      the final rollout: journaled, then shown; it is the journal's from there on

Whatever is begun here is finished, also where the one who asked for it has gone.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from msgspec.structs import replace

from ..errors import IllegalState, JournalError, JournalFull, UnknownRollout
from ..journal import ops
from ..journal.ops import Origin, Query, RequestKey, Summary
from ..journal.thread import JournalThread
from ..rollout import ENDED, LIVE, Rollout, RolloutState
from .growth import Growth, News
from .holdings import Holdings
from .intake import Accepted
from .request_keys import RequestKeys

T = TypeVar("T")
Ids = list[str]
Page = list[Summary]
PAGE = 1000


class Keeper:
    """What a manager does with its journal.

    on_change  called when the journal stalls, goes on, or fails
    """

    def __init__(self, journal: JournalThread, holdings: Holdings, *, retain_keys_s: float) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.journal = journal
        self.keys = RequestKeys(retain_keys_s)
        self._number = 0
        self._holdings = holdings
        self._fault: str | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._has_stalled = asyncio.Event()
        journal.on_stall = self._on_stall

    @property
    def failure(self) -> str | None:
        """Why nothing durable goes on, or None."""
        return self._fault or self.journal.failure

    @property
    def trouble(self) -> str | None:
        """Why durable rollouts stand still and new ones are refused, or None."""
        return self.failure or self.journal.stalled

    @property
    def is_held(self) -> bool:
        return self.trouble is not None

    def check(self) -> None:
        """Raise JournalError or JournalFull unless something new can be made durable."""
        if self.failure is not None:
            raise JournalError(self.failure)
        if self.journal.stalled is not None:
            raise JournalFull(self.journal.stalled)

    def next_number(self) -> int:
        """Of a submission, for its seeds; never given twice, in no process over this journal."""
        self._number += 1
        return self._number

    async def recover(self) -> ops.Recovered:
        recovered = await self.journal.recover()
        self._number = recovered.num_accepted
        self.keys.restore(recovered.keys)
        return recovered

    async def close(self) -> None:
        """Write what was given, and close the journal."""
        await self.journal.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- into the journal ----------------------------------------------------------------

    async def accept(
        self,
        key: RequestKey | None,
        make: Callable[[], Awaitable[Sequence[Growth]]],
        on_accepted: Callable[[Sequence[Growth]], None],
    ) -> Accepted:
        """Make growths once, journal them, hold them.

        make         checks and makes them
        on_accepted  sends them on their way
        """

        async def once(key: RequestKey | None) -> Ids:
            self.check()
            growths = await make()
            rollouts = [growth.rollout for growth in growths]
            num_live = sum(growth.is_live for growth in growths)
            self._holdings.num_live += num_live

            def settled(future: "asyncio.Future[None]") -> None:
                if future.cancelled() or future.exception() is not None:
                    self._holdings.num_live -= num_live
                else:
                    on_accepted(growths)

            future = self.journal.commit(ops.Accept(rollouts, key, self._number))
            # a callback, so that it is held before anybody can read it from the journal
            future.add_done_callback(settled)
            await self._durable(future)
            return [rollout.id for rollout in rollouts]

        rollout_ids, is_replay = await self.whole(self.keys.once(key, once))
        return Accepted(await self._group_of(rollout_ids[0]), rollout_ids, is_replay)

    def append(
        self, origin: Origin, fresh: Sequence[tuple[Growth, News]], show: Callable[[Growth], None]
    ) -> None:
        """Journal the news of a step; `show` is called for each growth then."""

        def shown() -> None:
            for growth, _ in fresh:
                show(growth)

        op = ops.Append(origin, [news.grown for _, news in fresh], time_s=fresh[0][1].time_s)
        self._then(self.journal.commit(op), shown)

    def end(self, growth: Growth, final: Rollout, show: Callable[[Growth, Rollout], None]) -> None:
        """Journal an ending, then show it."""
        self._then(self.journal.commit(ops.End(final)), lambda: show(growth, final))

    async def commit(self, op: ops.Op) -> None:
        """Return once it is durable, or raise why it is not; a caller that leaves stops nothing."""
        await self._durable(self.journal.commit(op))

    async def _durable(self, future: "asyncio.Future[None]") -> None:
        try:
            await asyncio.shield(future)
        except JournalError as error:
            if not isinstance(error, JournalFull):
                self._fail(str(error))
            raise

    async def pause(self, growths: Sequence[Growth], *, is_all: bool) -> None:
        durable = [growth.rollout.id for growth in growths if growth.rollout.is_durable]
        if durable or is_all:
            await self.whole(self.commit(ops.Pause(None if is_all else durable)))

    async def resume(self, growths: Sequence[Growth], *, is_all: bool) -> None:
        durable = [growth.rollout.id for growth in growths if growth.rollout.is_durable]
        if durable or is_all:
            await self.whole(self.commit(ops.Resume(None if is_all else durable)))

    async def unless_stalled(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result. Raises JournalFull once the journal stalls: then nothing was done, or it is
        done when there is room. For whom doing it twice does no harm."""
        try:
            self.check()
        except JournalError:
            work.close()
            raise
        working = self._begin(work)
        stalling = asyncio.ensure_future(self._has_stalled.wait())
        try:
            await asyncio.wait({working, stalling}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stalling.cancel()
        if not working.done():
            self.check()
        return await asyncio.shield(working)

    async def flush(self) -> None:
        """Return once all that was given is durable, and shown."""
        await self.whole(self.journal.flush())

    async def acknowledge(self, ids: Sequence[str] | None, group: str | None) -> Ids:
        """The reader of these ended rollouts has them (both None: of all that have ended)."""
        if ids is None:
            ids = await self._ended_ids(group)
        else:
            await self._check_ended(ids)
        await self.whole(self.commit(ops.Ack(list(ids))))
        for rollout_id in ids:
            self._holdings.forget(rollout_id)
        return list(ids)

    # --- out of the journal --------------------------------------------------------------

    async def find(self, rollout_id: str) -> Rollout:
        """A rollout that is not in memory; raises UnknownRollout."""
        found = await self.journal.read(rollout_id)
        if found is None:
            raise UnknownRollout(await self._why_unknown(rollout_id))
        return found

    async def find_many(self, rollout_ids: Sequence[str]) -> tuple[list[Rollout], dict[str, str]]:
        """Those that are there, and why the others are not."""
        found = await self.journal.read_many(rollout_ids)
        known = dict(zip(rollout_ids, found, strict=True))
        unknown = {
            name: await self._why_unknown(name)
            for name, rollout in known.items()
            if rollout is None
        }
        return [rollout for rollout in found if rollout is not None], unknown

    async def known(self, rollout_ids: Sequence[str]) -> list[Summary]:
        """Of each; raises UnknownRollout for the first that was never here."""
        found: list[Summary] = []
        for rollout_id, one in zip(
            rollout_ids, await self.journal.summaries(rollout_ids), strict=True
        ):
            if one is None:
                raise UnknownRollout(f"no rollout has the id {rollout_id!r}")
            found.append(one)
        return found

    async def is_known(self, rollout_id: str) -> bool:
        return await self.journal.summary(rollout_id) is not None

    async def has_group(self, group_id: str) -> bool:
        return bool(await self.journal.list(Query(group_id=group_id, limit=1)))

    async def list(self, query: Query) -> Page:
        """As the journal has them, live ones in the state of this moment.

        The journal does not know who runs: for live states its queued and paused ones are gone
        through, page by page, until enough of them are in the state that is asked for.
        """
        if query.state is None or query.state in ENDED:
            return [self._now(summary) for summary in await self.journal.list(query)]
        found: Page = []
        after = query.after
        while len(found) < query.limit:
            page = await self._live_page(replace(query, after=after))
            found += [summary for summary in page if summary.state is query.state]
            if len(page) < query.limit:
                break
            after = page[-1].number
        return found[: query.limit]

    async def _live_page(self, query: Query) -> Page:
        """Live ones of any state, in order of acceptance."""
        pages = [
            await self.journal.list(replace(query, state=state))
            for state in (RolloutState.QUEUED, RolloutState.PAUSED)
        ]
        page = sorted((s for page in pages for s in page), key=lambda s: s.number)
        return [self._now(summary) for summary in page[: query.limit]]

    def _now(self, summary: Summary) -> Summary:
        growth = self._holdings.get(summary.id)
        if growth is None or summary.state not in LIVE:
            return summary
        rollout = growth.rollout
        return replace(summary, state=rollout.state, num_output_tokens=len(rollout.output_ids))

    async def _group_of(self, rollout_id: str) -> str:
        growth = self._holdings.get(rollout_id)
        if growth is not None:
            return growth.rollout.group_id
        summary = await self.journal.summary(rollout_id)
        return "" if summary is None else summary.group_id

    async def _why_unknown(self, rollout_id: str) -> str:
        if await self.is_known(rollout_id):
            return f"the rollout {rollout_id!r} was acknowledged: it is not kept any more"
        return f"no rollout has the id {rollout_id!r}"

    async def _check_ended(self, ids: Sequence[str]) -> None:
        for summary in await self.known(ids):
            if not summary.state.is_ended:
                raise IllegalState(
                    f"rollout {summary.id} has not ended: it can be acknowledged once it has"
                )

    async def _ended_ids(self, group: str | None) -> Ids:
        if group is not None and not await self.has_group(group):
            raise UnknownRollout(f"no group has the id {group!r}")
        found: Ids = []
        query = Query(group_id=group, limit=PAGE)
        while page := await self.journal.list(query):
            found += [s.id for s in page if s.state.is_ended and not s.is_acked]
            query = replace(query, after=page[-1].number)
        return found

    # --- parts of these ------------------------------------------------------------------

    async def whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result; if the caller is cancelled the work goes on to its end."""
        return await asyncio.shield(self._begin(work))

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # whoever asked may be gone by then: an error has been seen all the same
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def _then(self, future: "asyncio.Future[None]", call: Callable[[], None]) -> None:
        """Call once the future is done; a fault, or ours, means that durability is over."""

        def done(future: "asyncio.Future[None]") -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                try:
                    call()
                except Exception as bug:
                    error = bug
            if error is not None:
                kind = "" if isinstance(error, JournalError) else f"{type(error).__name__}: "
                self._fail(f"{kind}{error}")

        future.add_done_callback(done)

    def _on_stall(self, reason: str | None) -> None:
        if reason is None:
            self._has_stalled.clear()
        else:
            self._has_stalled.set()
        self.on_change()

    def _fail(self, reason: str) -> None:
        if self._fault is None:
            self._fault = reason
            self.on_change()


def ids_of(growths: Iterable[Growth]) -> list[str]:
    return [growth.rollout.id for growth in growths]
