"""Rollouts that decode: each gains one token in each step, and little else is to be done.

A rollout joins when a token was drawn from its newest row, and leaves when it ends, is paused or
is preempted. In between its row, a view of its lists, stays the same, and the scheduler looks at
it by itself only on its days:

    its row begins or completes a block      a block is to be found; the index has news
    the ban of its stop ids is lifted        (min_tokens)
    its last token is drawn                  (max_tokens)

The first come again with every block, so it stands on one place of a ring of as many places as a
block has tokens; a calendar knows the others. All other work of a step is done in a few passes
over parallel lists.
"""

from collections import Counter, deque
from collections.abc import Mapping, Set
from itertools import compress
from operator import attrgetter
from typing import TypeVar

from ..messages import PlainTokens
from .admission import LiveRollout, Share
from .metering import PoolMeter
from .plan import Draws, Row

Key = TypeVar("Key")
NO_BAN: list[int] = []


class Batch:
    """Who decodes in a step, as parallel lists; a later step may have the same.

    names     ids of the rollouts
    ids       their tokens, which `book` appends to
    starts    index of the output token that each of them draws next
    stop_ids  those of all of them together
    meters    how many of them are on which
    """

    __slots__ = ("ids", "meters", "names", "rollouts", "rows", "starts", "stop_ids")

    def __init__(
        self,
        rollouts: list[LiveRollout],
        rows: list[Row],
        stop_ids: Set[int],
        meters: Mapping[PoolMeter, int],
    ) -> None:
        self.rollouts = rollouts
        self.rows = rows
        self.names = [rollout.id for rollout in rollouts]
        self.ids = [rollout.ids for rollout in rollouts]
        self.starts = [len(rollout.ids) - rollout.num_prompt for rollout in rollouts]
        self.stop_ids = stop_ids
        self.meters = meters

    def book(self, draws: Draws, apart: Set[int]) -> PlainTokens | None:
        """Append what was drawn from its rows, except from those `apart`; the news.

        draws  of all rows of the plan, in which those of the batch come first
        """
        names, ids, starts = self.names, self.ids, self.starts
        # those apart gain a token too, or there is another batch in the next step
        self.starts = [start + 1 for start in starts]
        if apart or len(draws.token_ids) > len(names):
            kept = [index not in apart for index in range(len(names))]
            names, ids = list(compress(names, kept)), list(compress(ids, kept))
            starts = list(compress(starts, kept))
            draws = Draws(
                token_ids=list(compress(draws.token_ids, kept)),
                lp_sampled=list(compress(draws.lp_sampled, kept)),
                lp_temp=list(compress(draws.lp_temp, kept)),
                kept_mass=list(compress(draws.kept_mass, kept)),
                flags=list(compress(draws.flags, kept)),
            )
        if not names:
            return None
        # a loop in C
        deque(map(list.append, ids, draws.token_ids), maxlen=0)
        return PlainTokens(names, starts, draws)


class Decoding:
    """The rollouts that decode, and the days on which they are more than a row.

    While a rollout is here, all of its tokens but the newest are computed.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._rows: dict[LiveRollout, Row] = {}
        self._day = 0
        """Number of the next step."""
        self._ring: list[dict[LiveRollout, None]] = [{} for _ in range(block_size)]
        """By the number of the step, modulo the block size, in which a row begins a block."""
        self._calendar: dict[int, dict[LiveRollout, None]] = {}
        self._shares: Counter[Share] = Counter()
        self._stop_ids: Counter[frozenset[int]] = Counter()
        self._meters: Counter[PoolMeter] = Counter()
        self._batch: Batch | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, rollout: LiveRollout) -> bool:
        return rollout in self._rows

    def join(self, rollout: LiveRollout) -> None:
        """All its tokens but the newest, which was just drawn, are computed."""
        start = len(rollout.ids) - 1
        self._rows[rollout] = row_of(rollout, start, start + 1)
        rollout.place = (self._day - start) % self._block_size
        self._ring[rollout.place][rollout] = None
        self._enter(rollout, start)
        self._shares[rollout.share] += 1
        self._stop_ids[rollout.stop_ids] += 1
        if rollout.meter is not None:
            self._meters[rollout.meter] += 1
        self._batch = None

    def leave(self, rollout: LiveRollout) -> None:
        del self._rows[rollout]
        del self._ring[rollout.place][rollout]
        if rollout.due is not None:
            self._strike(rollout, rollout.due)
        _drop_one(self._shares, rollout.share)
        _drop_one(self._stop_ids, rollout.stop_ids)
        if rollout.meter is not None:
            _drop_one(self._meters, rollout.meter)
        self._batch = None

    def charge(self) -> None:
        """Each gets a token in the step that is being planned."""
        for share, count in self._shares.items():
            share.served_tokens += count

    def take_due(self) -> tuple[list[LiveRollout], list[LiveRollout]]:
        """Whose row begins or completes a block in the step that is being planned, in the order of
        admission; and whose other days it is."""
        day, size = self._day, self._block_size
        self._day += 1
        borders = {**self._ring[day % size], **self._ring[(day + 1) % size]}
        others = list(self._calendar.pop(day, ()))
        for rollout in others:
            self._enter(rollout, len(rollout.ids))
        return sorted(borders, key=attrgetter("admission")), others

    def lift_ban(self, rollout: LiveRollout) -> None:
        """From now on its stop ids may be drawn."""
        self._rows[rollout].banned_ids = NO_BAN

    def batch(self) -> Batch:
        """All of them; the very same object until somebody joins or leaves."""
        if self._batch is None:
            stop_ids = frozenset[int]().union(*self._stop_ids)
            rows = list(self._rows.values())
            self._batch = Batch(list(self._rows), rows, stop_ids, dict(self._meters))
        return self._batch

    def is_still(self, batch: Batch) -> bool:
        """Whether nobody has joined or left since."""
        return self._batch is batch

    def _enter(self, rollout: LiveRollout, start: int) -> None:
        """Note the next of its days in the calendar; its row in step `_day` starts at `start`."""
        wait = _wait(rollout, start)
        rollout.due = None if wait is None else self._day + wait
        if rollout.due is not None:
            self._calendar.setdefault(rollout.due, {})[rollout] = None

    def _strike(self, rollout: LiveRollout, due: int) -> None:
        day = self._calendar[due]
        del day[rollout]
        if not day:
            del self._calendar[due]

    def _is_noted(self, rollout: LiveRollout, ahead: int) -> bool:
        """Whether its days are right if it is `ahead` tokens short of step `_day`."""
        start = rollout.kv.num_computed_tokens + ahead
        wait = _wait(rollout, start)
        due = None if wait is None else self._day + wait
        return rollout.place == (self._day - start) % self._block_size and rollout.due == due

    def check_invariants(self) -> None:
        """Raise AssertionError unless rows are what they would be if made now, and all have a day."""
        for rollout, row in self._rows.items():
            start = rollout.kv.num_computed_tokens
            assert start == len(rollout.ids) - 1 == rollout.num_reported_rows
            assert rollout.parent_hash is None
            fresh = row_of(rollout, start, start + 1)
            # its day has not come yet
            fresh.banned_ids = (
                row.banned_ids if start == rollout.min_length - 1 else fresh.banned_ids
            )
            assert row == fresh
            assert row.all_ids is rollout.ids
            assert row.block_table is rollout.kv.blocks
            assert rollout in self._ring[rollout.place]
            assert rollout.due is None or rollout in self._calendar[rollout.due]
        # while a plan is in flight, `_day` is the step after it
        assert any(all(self._is_noted(r, ahead) for r in self._rows) for ahead in (0, 1))
        assert sum(map(len, self._ring)) == len(self._rows)
        noted = sum(rollout.due is not None for rollout in self._rows)
        assert sum(map(len, self._calendar.values())) == noted
        assert self._shares == Counter(rollout.share for rollout in self._rows)
        assert self._stop_ids == Counter(rollout.stop_ids for rollout in self._rows)
        meters = Counter(rollout.meter for rollout in self._rows if rollout.meter is not None)
        assert self._meters == meters
        if self._batch is not None:
            assert self._batch.rollouts == list(self._rows)
            starts = [len(rollout.ids) - rollout.num_prompt for rollout in self._rows]
            assert self._batch.starts == starts


def row_of(rollout: LiveRollout, start: int, end: int) -> Row:
    """The row of positions [start, end), as its lists are now."""
    ids = rollout.ids
    return Row(
        rollout.id,
        ids,
        len(ids) - start,
        end - start,
        rollout.kv.blocks,
        rollout.num_prompt,
        rollout.sampling,
        rollout.seed,
        rollout.add.banned_ids if len(ids) < rollout.min_length else NO_BAN,
    )


def _wait(rollout: LiveRollout, start: int) -> int | None:
    """Steps from the row that starts at `start` to the next that is in the calendar."""
    special = (rollout.max_length - 2, rollout.min_length - 1)
    return min((position - start for position in special if position >= start), default=None)


def _drop_one(counter: Counter[Key], key: Key) -> None:
    counter[key] -= 1
    if counter[key] == 0:
        del counter[key]
