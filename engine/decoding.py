"""Rollouts that decode: each gains one token in each step, and little else is to be done.

A rollout joins when a token was drawn from its newest row, and leaves when it ends, is paused or
is preempted. In between its row, a view of its lists, stays the same, and the scheduler looks at
it by itself only on its days, which a calendar knows:

    its row begins or completes a block      a block is to be found; the index has news
    the ban of its stop ids is lifted        (min_tokens)
    its last token is drawn                  (max_tokens)

All other work of a step is done in a few passes over parallel lists.
"""

from collections import Counter
from collections.abc import Mapping, Set
from itertools import compress
from operator import attrgetter
from typing import TypeVar

from .admission import LiveRollout, Share
from .messages import PlainTokens
from .metering import PoolMeter
from .plan import Draws, Row

Key = TypeVar("Key")
NO_BAN: list[int] = []


class Batch:
    """Who decodes in a step, as parallel lists; never written: a later step may have the same.

    names     ids of the rollouts
    ids       their tokens, which `book` appends to
    stop_ids  those of all of them together
    meters    how many of them are on which
    """

    __slots__ = ("ids", "meters", "names", "num_prompts", "rollouts", "rows", "stop_ids")

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
        self.num_prompts = [rollout.num_prompt for rollout in rollouts]
        self.stop_ids = stop_ids
        self.meters = meters

    def book(self, draws: Draws, apart: Set[int]) -> PlainTokens | None:
        """Append what was drawn from its rows, except from those `apart`; the news.

        draws  of all rows of the plan, in which those of the batch come first
        """
        names, ids, num_prompts = self.names, self.ids, self.num_prompts
        if apart or len(draws.token_ids) > len(names):
            kept = [index not in apart for index in range(len(names))]
            names, ids = list(compress(names, kept)), list(compress(ids, kept))
            num_prompts = list(compress(num_prompts, kept))
            draws = Draws(
                token_ids=list(compress(draws.token_ids, kept)),
                lp_sampled=list(compress(draws.lp_sampled, kept)),
                lp_temp=list(compress(draws.lp_temp, kept)),
                kept_mass=list(compress(draws.kept_mass, kept)),
                flags=list(compress(draws.flags, kept)),
            )
        if not names:
            return None
        starts = [len(one) - count for one, count in zip(ids, num_prompts, strict=True)]
        for one, token_id in zip(ids, draws.token_ids, strict=True):
            one.append(token_id)
        return PlainTokens(names, starts, draws)


class Decoding:
    """The rollouts that decode, and the calendar of those that are more than a row.

    While a rollout is here, all of its tokens but the newest are computed.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._rows: dict[LiveRollout, Row] = {}
        self._day = 0
        """Number of the next step."""
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
        self._enter(rollout, start)
        self._shares[rollout.share] += 1
        self._stop_ids[rollout.stop_ids] += 1
        if rollout.meter is not None:
            self._meters[rollout.meter] += 1
        self._batch = None

    def leave(self, rollout: LiveRollout) -> None:
        del self._rows[rollout]
        self._strike(rollout)
        _drop_one(self._shares, rollout.share)
        _drop_one(self._stop_ids, rollout.stop_ids)
        if rollout.meter is not None:
            _drop_one(self._meters, rollout.meter)
        self._batch = None

    def charge(self) -> None:
        """Each gets a token in the step that is being planned."""
        for share, count in self._shares.items():
            share.served_tokens += count

    def take_due(self) -> list[LiveRollout]:
        """Whose day is the step that is being planned, in the order of admission."""
        due = sorted(self._calendar.pop(self._day, ()), key=attrgetter("admission"))
        self._day += 1
        for rollout in due:
            self._enter(rollout, len(rollout.ids))
        return due

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

    def _enter(self, rollout: LiveRollout, start: int) -> None:
        """Note the next of its days; its row in step `_day` starts at `start`."""
        size = self._block_size
        # a block begins at offset 0 and is complete with offset size - 1
        offset = start % size
        wait = size - 1 - offset if offset else 0
        for special in (rollout.max_length - 2, rollout.min_length - 1):
            if 0 <= special - start < wait:
                wait = special - start
        due = rollout.due = self._day + wait
        if due in self._calendar:
            self._calendar[due][rollout] = None
        else:
            self._calendar[due] = {rollout: None}

    def _strike(self, rollout: LiveRollout) -> None:
        day = self._calendar[rollout.due]
        del day[rollout]
        if not day:
            del self._calendar[rollout.due]

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
            assert self._day <= rollout.due <= self._day + self._block_size
            assert rollout in self._calendar[rollout.due]
        assert sum(map(len, self._calendar.values())) == len(self._rows)
        assert self._shares == Counter(rollout.share for rollout in self._rows)
        assert self._stop_ids == Counter(rollout.stop_ids for rollout in self._rows)
        meters = Counter(rollout.meter for rollout in self._rows if rollout.meter is not None)
        assert self._meters == meters
        if self._batch is not None:
            assert self._batch.rollouts == list(self._rows)


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


def _drop_one(counter: Counter[Key], key: Key) -> None:
    counter[key] -= 1
    if counter[key] == 0:
        del counter[key]
