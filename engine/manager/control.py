"""Rollouts are stopped, go on and are ended, by name, by group, or all of them."""

import asyncio
from collections.abc import Sequence

from ..errors import IllegalState, UnknownRollout
from ..messages import Pause
from .collector import Collector
from .growth import Growth
from .holdings import Holdings
from .keeping import Ids, ids_of
from .standing import Standing


class Control:
    """What `RolloutManager` promises of `pause`, `resume`, `cancel`, `acknowledge` and `drop`.

    ids    of rollouts (None with `group` None: all that live)
    group  the id of a group
    """

    def __init__(self, holdings: Holdings, core: Collector, standing: Standing) -> None:
        self._holdings = holdings
        self._core = core
        self._standing = standing
        # a pause is in force before it is journaled and a resume after: two at once would leave
        # the journal with one of them and the engine with the other
        self._pausing = asyncio.Lock()

    async def pause(self, ids: Sequence[str] | None, group: str | None) -> Ids:
        async with self._pausing:
            growths = await self._named(ids, group)
            is_all = ids is None and group is None
            self._holdings.pause(growths, is_all=is_all)
            names = ids_of(growths)
            # by name: what is accepted from here on is paused when the core is told of it
            self._core.tell(Pause(names))
            if (keeper := self._standing.kept) is not None:
                await keeper.pause(growths, is_all=is_all)
        return names

    async def resume(self, ids: Sequence[str] | None, group: str | None) -> Ids:
        async with self._pausing:
            growths = await self._named(ids, group)
            names = ids_of(growths)
            ended = [rollout_id for rollout_id in ids or () if rollout_id not in names]
            if ended:
                raise IllegalState(f"rollout {ended[0]} has ended: it cannot be resumed")
            is_all = ids is None and group is None
            if (keeper := self._standing.kept) is not None:
                await keeper.resume(growths, is_all=is_all)
            if is_all:
                # those too that were accepted, and so paused, while this was journaled
                growths = self._holdings.live()
            self._holdings.resume(growths, is_all=is_all)
            self._core.resume(growths)
        return ids_of(growths)

    async def cancel(self, ids: Sequence[str] | None, group: str | None) -> Ids:
        growths = await self._named(ids, group)
        self._core.cancel(growths)
        if (keeper := self._standing.kept) is not None:
            await keeper.flush()
        return ids_of(growths)

    async def acknowledge(self, ids: Sequence[str] | None, group: str | None) -> Ids:
        return await self._standing.journaled.acknowledge(ids, group)

    def drop(self, rollout_ids: Sequence[str]) -> None:
        live = self._holdings.live(rollout_ids)
        self._core.cancel([growth for growth in live if not growth.rollout.is_durable])
        for rollout_id in rollout_ids:
            growth = self._holdings.get(rollout_id)
            if growth is not None and not growth.rollout.is_durable:
                self._holdings.forget(rollout_id)

    async def _named(self, ids: Sequence[str] | None, group: str | None) -> list[Growth]:
        """The live ones that are meant; raises UnknownRollout where one was never here."""
        keeper, holdings = self._standing.kept, self._holdings
        if group is not None:
            found = [g for g in holdings.live() if g.rollout.group_id == group]
            if not found and not (keeper and await keeper.has_group(group)):
                raise UnknownRollout(f"no group has the id {group!r}")
            return found
        missing = [rollout_id for rollout_id in ids or () if holdings.get(rollout_id) is None]
        if missing and keeper is None:
            raise UnknownRollout(f"no rollout has the id {missing[0]!r}")
        if missing and keeper is not None:
            await keeper.known(missing)
        return holdings.live(None if ids is None else dict.fromkeys(ids))
