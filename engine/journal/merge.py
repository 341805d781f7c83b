"""Compaction: what nobody needs any more leaves the file, a slice at a time.

Rows of tokens below the first that a live rollout needs are deleted as rollouts end. Above it, rows
fill with rollouts that have ended: they are rewritten, many into one, without these.
"""

from collections.abc import Container, Iterable

import apsw

from ..config import JournalConfig
from . import files
from .draft import Memory, rows_of
from .ops import Grown
from .rows import Rest, TokenRow

# of a slice: each of these is some milliseconds
_NAMES = 1000
_ROWS = 128
_PAGES = 512
# free space that is kept for use: part of the used, and at least so much
_KEPT_SHARE, _KEPT_PAGES = 8, 256
# tokens of ended rollouts that are not worth a merge
_KEPT_TOKENS = 2**14


class Compaction:
    """A pass over the journal; `work` does a slice of it, in a transaction of its own.

    A pass over `tokens` goes on where the one before stopped (`Memory.merge_row`)."""

    def __init__(
        self,
        db: apsw.Connection,
        memory: Memory,
        config: JournalConfig,
        now_s: float,
        *,
        is_thorough: bool,
    ) -> None:
        self._db, self._memory, self._config, self._now_s = db, memory, config, now_s
        self._is_thorough = is_thorough
        if memory.merge_row is None:
            num_live = sum(memory.by_number[number].num_appended for number in memory.first_rows)
            num_dead = memory.num_row_tokens - num_live
            if is_thorough or num_dead > num_live + _KEPT_TOKENS:
                memory.merge_row = memory.low_row

    def work(self) -> bool:
        """Do a slice; False once nothing is left."""
        return self._forget() or self._merge() or self._give_back()

    def _forget(self) -> bool:
        """Tombstones, keys and budgets whose time is over."""
        memory, books = self._memory, self._memory.books.next()
        old = self._now_s - self._config.retain_acked_s
        gone = [e for e in memory.entries.values() if e.acked_s is not None and e.acked_s <= old]
        old = self._now_s - self._config.retain_keys_s
        names = [
            name
            for name, known in memory.keys.items()
            if known.key.created_s <= old and not memory.has_unread(known)
        ]
        budgets = memory.budgets.old(old)
        gone, names, budgets = gone[:_NAMES], names[:_NAMES], budgets[:_NAMES]
        if not gone and not names and not budgets:
            return False
        with files.transaction(self._db):
            for entry in gone:
                self._db.execute(files.SQL["drop-rollout"], (entry.number,))
                books.tables["rollouts"].drop(entry.sum)
            for name in names:
                self._db.execute(files.SQL["drop-key"], (memory.keys[name].number,))
                books.tables["keys"].drop(memory.keys[name].sum)
            for row in budgets:
                self._db.execute(files.SQL["drop-budget"], (row.number,))
                books.tables["budgets"].drop(row.sum)
            self._db.execute(files.SQL["put-books"], books.columns())
        memory.books = books
        for row in budgets:
            memory.budgets.drop(row)
        for entry in gone:
            del memory.entries[entry.id], memory.by_number[entry.number]
        for name in names:
            del memory.keys[name]
        return True

    def _merge(self) -> bool:
        """The next rows: without ended rollouts, and each rollout's tokens side by side."""
        memory, end = self._memory, self._memory.books.next_row
        if memory.merge_row is None:
            return False
        start = max(memory.merge_row, memory.low_row)
        stop = min(start + _ROWS, end)
        memory.merge_row = stop if stop < end else None
        if start >= end:
            return False
        rows = [*map(TokenRow.of, rows_of(self._db, "tokens", start, stop))]
        num_tokens = sum(len(row.ids) for row in rows)
        merged = merge(rows, memory.first_rows)
        if sum(len(row.ids) for row in merged) == num_tokens and not self._is_thorough:
            return True
        books = memory.books.next()
        with files.transaction(self._db):
            for _, row_sum in self._db.execute(files.SQL["drop-tokens"], (start, stop)):
                books.tables["tokens"].drop(row_sum)
            for row in merged:
                self._db.execute(files.SQL["add-tokens"], columns := row.columns())
                books.tables["tokens"].add(columns[-1])
            self._db.execute(files.SQL["put-books"], books.columns())
        memory.books = books
        memory.num_row_tokens += sum(len(row.ids) for row in merged) - num_tokens
        for row in reversed(merged):
            for number in row.numbers:
                if start <= memory.first_rows[number] < stop:
                    memory.first_rows[number] = row.row
        if start == memory.low_row:
            memory.low_row = merged[0].row if merged else stop
        return True

    def _give_back(self) -> bool:
        """Free pages beyond those that are kept for use."""
        num_pages, num_free = files.pages(self._db)
        kept = 0 if self._is_thorough else max((num_pages - num_free) // _KEPT_SHARE, _KEPT_PAGES)
        if num_free <= kept:
            return False
        count = min(num_free - kept, _PAGES)
        self._db.execute(f"PRAGMA incremental_vacuum({count})").fetchall()
        return True


def merge(rows: Iterable[TokenRow], live: Container[int]) -> list[TokenRow]:
    """The same tokens of the live rollouts in few rows: one for each run of an origin.

    The new rows take the numbers of the first old ones, so that order is kept.
    """
    merged: list[TokenRow] = []
    first = None
    for row in rows:
        first = row.row if first is None else first
        kept = [entry for entry in row.entries() if entry[0] in live]
        if kept and (not merged or merged[-1].origin != row.origin):
            merged.append(TokenRow(first + len(merged), row.origin))
        for number, grown, rest in kept:
            merged[-1].add(number, grown, rest)
    return [_side_by_side(row) for row in merged]


def _side_by_side(row: TokenRow) -> TokenRow:
    """Each rollout's entries joined, but for those that record more than plain tokens."""
    joined = TokenRow(row.row, row.origin)
    entries = sorted(row.entries(), key=lambda entry: entry[0])
    at = 0
    while at < len(entries):
        number, grown, rest = entries[at]
        at += 1
        while at < len(entries) and entries[at][0] == number and _may_join(rest, entries[at][2]):
            _join(grown, entries[at][1])
            at += 1
        joined.add(number, grown, rest)
    return joined


def _may_join(rest: Rest | None, next_rest: Rest | None) -> bool:
    return next_rest is None and (rest is None or rest.extra is None)


def _join(grown: Grown, more: Grown) -> None:
    grown.ids += more.ids
    grown.lp_sampled += more.lp_sampled
    grown.lp_temp += more.lp_temp
    grown.kept_mass += more.kept_mass
    grown.flags += more.flags
