"""Token budgets in the journal: their rows, and what a transaction makes of them.

A budget counts the output tokens of its pool that are journaled while it is open, in the
transaction that journals them; so whatever a crash leaves, the two agree.
"""

from collections.abc import Sequence
from typing import Any

import apsw
from msgspec import Struct
from msgspec.structs import replace

from ..errors import Conflict, IllegalState
from .files import SQL
from .ops import Budget, BudgetState
from .rows import Tally, checksum, verified

# number, id, pool, tokens, used, state, created_s, ended_s
_NUM_OLD_COLUMNS = 8


class BudgetRow(Struct):
    """A budget as it is stored."""

    number: int
    budget: Budget
    sum: int = 0

    def columns(self) -> tuple[Any, ...]:
        """The row, the sum last."""
        b = self.budget
        columns = (
            *(self.number, b.id, b.pool, b.tokens, b.used, str(b.state)),
            *(b.created_s, b.ended_s, b.places),
        )
        return (*columns, checksum("budgets", *_summed(columns)))

    @classmethod
    def of(cls, values: Sequence[Any]) -> "BudgetRow":
        """values: as `columns`; of an older schema without `places`."""
        *columns, total = values
        verified("budgets", [*_summed(columns), total])
        number, name, pool, tokens, used, state, created_s, ended_s, *rest = columns
        budget = Budget(
            id=name,
            pool=pool,
            tokens=tokens,
            places=rest[0] if rest else None,
            used=used,
            state=BudgetState(state),
            created_s=created_s,
            ended_s=ended_s,
        )
        return cls(number, budget, values[-1])


def _summed(columns: Sequence[Any]) -> Sequence[Any]:
    """What the checksum is of: a row without places has that of older schemas, which had no such
    column."""
    places = [*columns[_NUM_OLD_COLUMNS:]]
    return columns[:_NUM_OLD_COLUMNS] if places == [None] else columns


class BudgetBooks(Struct):
    """All budgets of a journal; no row in it is ever written, a new one takes its place."""

    by_id: dict[str, BudgetRow] = {}
    """In order of opening."""
    newest: dict[str, BudgetRow] = {}
    """Of each metered pool; no other is open."""

    def put(self, row: BudgetRow) -> None:
        self.by_id[row.budget.id] = self.newest[row.budget.pool] = row

    def drop(self, row: BudgetRow) -> None:
        del self.by_id[row.budget.id]

    def old(self, old_s: float) -> list[BudgetRow]:
        """Those that ended before, but the newest of their pools."""
        return [
            row
            for row in self.by_id.values()
            if (row.budget.ended_s or old_s + 1) <= old_s
            and self.newest[row.budget.pool].number != row.number
        ]


class BudgetDraft:
    """What one transaction changes; `write` before COMMIT, `take_over` after it."""

    def __init__(self, db: apsw.Connection, books: BudgetBooks, tally: Tally, now_s: float) -> None:
        self._db, self._books, self._tally, self._now_s = db, books, tally, now_s
        self._changed: dict[str, BudgetRow] = {}
        """By id: several of one pool may come and go in a transaction."""
        self._newest: dict[str, BudgetRow] = {}
        """Of these, by pool."""

    def open(self, budget: Budget) -> None:
        """Raises Conflict where the pool has an open one, or the id is known."""
        newest = self._newest_of(budget.pool)
        if newest is not None and newest.budget.state is BudgetState.OPEN:
            raise Conflict(f"pool {budget.pool!r} has an open budget: {newest.budget.id}")
        if budget.id in self._books.by_id or budget.id in self._changed:
            raise Conflict(f"budget {budget.id} is in the journal already")
        numbers = [row.number for row in (*self._books.by_id.values(), *self._changed.values())]
        self._put(BudgetRow(max(numbers, default=0) + 1, replace(budget, used=0)))

    def close(self, budget_id: str) -> None:
        """An ended one is left as it is. Raises IllegalState for one that is not known."""
        row = self._changed.get(budget_id) or self._books.by_id.get(budget_id)
        if row is None:
            raise IllegalState(f"budget {budget_id} is not in the journal")
        if row.budget.state is BudgetState.OPEN:
            budget = self._drafted(row).budget
            budget.state, budget.ended_s = BudgetState.CLOSED, self._now_s

    def count(self, pool: str, num_tokens: int) -> None:
        """New tokens of a pool. Raises IllegalState where they exceed its open budget."""
        row = self._newest_of(pool) if pool else None
        if row is None or row.budget.state is not BudgetState.OPEN or num_tokens <= 0:
            return
        budget = self._drafted(row).budget
        used = budget.used + num_tokens
        if used > budget.tokens:
            raise IllegalState(f"budget {budget.id} holds {budget.tokens} tokens, not {used}")
        budget.used = used
        if used == budget.tokens:
            budget.state, budget.ended_s = BudgetState.SPENT, self._now_s

    def write(self) -> None:
        for row in self._changed.values():
            old = self._books.by_id.get(row.budget.id)
            self._db.execute(SQL["put-budget"], columns := row.columns())
            row.sum = columns[-1]
            if old is None:
                self._tally.add(row.sum)
            else:
                self._tally.change(old.sum, row.sum)

    def take_over(self) -> None:
        for row in self._changed.values():
            self._books.put(row)

    def _newest_of(self, pool: str) -> BudgetRow | None:
        return self._newest.get(pool) or self._books.newest.get(pool)

    def _drafted(self, row: BudgetRow) -> BudgetRow:
        """The row of this transaction, to be changed."""
        drafted = self._changed.get(row.budget.id)
        if drafted is None:
            drafted = replace(row, budget=replace(row.budget))
            self._put(drafted)
        return drafted

    def _put(self, row: BudgetRow) -> None:
        self._changed[row.budget.id] = self._newest[row.budget.pool] = row
