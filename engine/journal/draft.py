"""What the journal knows without reading, and a transaction that changes it.

What a transaction changes in memory is drafted beside it and taken over once the transaction is
committed, so that a failed one leaves no trace in either place.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import apsw
import msgspec
from msgspec import Struct

from ..config import JournalConfig
from ..errors import Conflict, IllegalState, InvalidTrajectory
from ..rollout import Rollout, RolloutState
from ..trajectory import encode, pack
from .budgets import BudgetBooks, BudgetDraft, BudgetRow
from .files import SQL, schema_of
from .ops import (
    Accept,
    Ack,
    Append,
    CloseBudget,
    End,
    Flip,
    Grown,
    Op,
    OpenBudget,
    Origin,
    Pause,
    RequestKey,
    Resume,
)
from .rows import (
    Books,
    DamagedRecord,
    Entry,
    PackedExtra,
    Rest,
    TokenRow,
    check_grown,
    checksum,
    key_columns,
    key_of,
    verified,
)

# SQLite's limit for a row, less the other columns
MAX_RECORD_BYTES = 10**9 - 10**6
# entries and tokens after which a commit begins another row: a page then holds several, and little
# of it stays empty
_MAX_ROW_ENTRIES = 32
_MAX_ROW_TOKENS = 2**16
# rows that one commit deletes at most: a long list of them must not hold up the others
_TRIM_ROWS = 4096

KeyName = tuple[str, str, str]


class KnownKey(Struct):
    number: int
    key: RequestKey
    rollout_ids: list[str]
    sum: int


class Memory(Struct, kw_only=True):
    """All of the journal but trajectories and tokens."""

    books: Books
    entries: dict[str, Entry] = {}
    """By id, in order of acceptance."""
    by_number: dict[int, Entry] = {}
    keys: dict[KeyName, KnownKey] = {}
    origins: dict[Origin, int] = {}
    budgets: BudgetBooks = msgspec.field(default_factory=BudgetBooks)
    flips: list[Flip] = []
    """In order."""
    first_rows: dict[int, int] = {}
    """Live rollout → its first row in `tokens`; in the order of these rows."""
    low_row: int = 1
    """No row is below it."""
    num_row_tokens: int = 0
    """In the table `tokens`, of ended rollouts too."""
    num_unacked: int = 0
    merge_row: int | None = None
    """Where compaction goes on; None: it has nothing to merge."""

    def unread(self, old_s: float) -> list[str]:
        """Ended rollouts that nobody will acknowledge: those of keys as old, `is_all_that_reads`."""
        return [
            entry.id
            for known in self.keys.values()
            if known.key.created_s <= old_s and known.key.is_all_that_reads
            for entry in map(self.entries.get, known.rollout_ids)
            if entry is not None and not entry.is_live and entry.acked_s is None
        ]

    def has_unread(self, known: KnownKey) -> bool:
        """Whether one of its rollouts is still to be let go with the key."""
        entries = map(self.entries.get, known.rollout_ids)
        return known.key.is_all_that_reads and any(
            entry is not None and entry.acked_s is None for entry in entries
        )


def rows_of(db: apsw.Connection, table: str, *bounds: int) -> Iterator[tuple[Any, ...]]:
    """Its rows in order; raises DamagedRecord where SQLite cannot go on, or goes in a circle."""
    last: Any = 0
    try:
        for values in db.execute(SQL[table], bounds):
            if values[0] <= last:
                raise DamagedRecord(table, last, f"followed by row {values[0]}")
            last = values[0]
            yield values
    except (apsw.CorruptError, UnicodeDecodeError) as error:
        raise DamagedRecord(table, f"after {last}", str(error)) from None


def load_memory(db: apsw.Connection) -> Memory:
    """Read every row but the trajectories; raises DamagedRecord where rows or books are wrong."""
    try:
        rows = db.execute(SQL["books"]).fetchall()
    except (apsw.CorruptError, UnicodeDecodeError) as error:
        raise DamagedRecord("books", 1, str(error)) from None
    if len(rows) != 1:
        raise DamagedRecord("books", 1, f"{len(rows)} rows, expected 1")
    memory = Memory(books=Books.of(rows[0]))
    found = Books()
    for values in rows_of(db, "rollouts"):
        entry = Entry.of(values)
        found.tables["rollouts"].add(entry.sum)
        memory.entries[entry.id] = memory.by_number[entry.number] = entry
        memory.num_unacked += entry.acked_s is None
    for values in rows_of(db, "origins"):
        number, *columns = verified("origins", values)
        found.tables["origins"].add(values[-1])
        memory.origins[Origin(*columns)] = number
    for values in rows_of(db, "keys"):
        number, key, rollout_ids = key_of(values)
        found.tables["keys"].add(values[-1])
        memory.keys[key.name] = KnownKey(number, key, rollout_ids, values[-1])
    schema = schema_of(db)
    budgets = "budgets" if schema >= 4 else "budgets-without-places"
    for values in rows_of(db, budgets) if schema >= 2 else ():
        memory.budgets.put(BudgetRow.of(values))
        found.tables["budgets"].add(values[-1])
    for values in rows_of(db, "flips") if schema >= 3 else ():
        memory.flips.append(Flip(*verified("flips", values)[1:]))
        found.tables["flips"].add(values[-1])
    _load_tokens(db, memory, found)
    for name, tally in memory.books.tables.items():
        if tally != found.tables[name]:
            raise DamagedRecord(
                name, "-", f"{found.tables[name].num} rows, the books have {tally.num}, or others"
            )
    return memory


def _load_tokens(db: apsw.Connection, memory: Memory, found: Books) -> None:
    """Count the tokens that live rollouts have in rows."""
    origins = set(memory.origins.values())
    memory.low_row = memory.books.next_row
    for values in rows_of(db, "tokens", 0, memory.books.next_row):
        row = TokenRow.of(values)
        if row.origin not in origins:
            raise DamagedRecord("tokens", row.row, f"origin {row.origin} is missing")
        found.tables["tokens"].add(values[-1])
        memory.low_row = min(memory.low_row, row.row)
        memory.num_row_tokens += len(row.ids)
        for number, count in zip(row.numbers, row.counts, strict=True):
            entry = memory.by_number.get(number)
            if entry is not None and entry.is_live:
                entry.num_appended += count
                memory.first_rows.setdefault(number, row.row)


class Draft:
    """One transaction: rows are written as ops are applied, memory changes at `take_over`.

    now_s  what acknowledgements and expiries are measured by
    """

    def __init__(
        self, db: apsw.Connection, memory: Memory, config: JournalConfig, now_s: float
    ) -> None:
        self._db, self._memory, self._config, self._now_s = db, memory, config, now_s
        self._books = memory.books.next()
        self._entries: dict[str, Entry] = {}
        self._keys: dict[KeyName, KnownKey] = {}
        self._origins: dict[Origin, int] = {}
        self._budgets = BudgetDraft(db, memory.budgets, self._books.tables["budgets"], now_s)
        self._flips: list[Flip] = []
        self._rows: list[TokenRow] = []
        self._first_rows: dict[int, int] = {}
        self._ended: set[int] = set()
        self._low_row = memory.low_row
        self._num_row_tokens = memory.num_row_tokens
        self._num_unacked = memory.num_unacked

    def apply(self, op: Op) -> None:
        """Raises Conflict, IllegalState, InvalidTrajectory, apsw.Error: then the transaction must
        be rolled back and the draft thrown away."""
        match op:
            case Accept():
                self._accept(op)
            case Append():
                self._append(op)
            case End():
                self._end(op.rollout)
            case Pause():
                self._books.is_all_paused |= op.rollout_ids is None
                self._mark(op.rollout_ids, RolloutState.PAUSED)
            case Resume():
                self._books.is_all_paused &= op.rollout_ids is not None
                self._mark(op.rollout_ids, RolloutState.QUEUED)
            case Ack():
                for rollout_id in op.rollout_ids:
                    self._acknowledge(rollout_id)
            case OpenBudget():
                self._budgets.open(op.budget)
                if op.key is not None:
                    self._remember(op.key, [op.budget.id])
            case CloseBudget():
                self._budgets.close(op.budget_id)
            case Flip():
                self._flip(op)

    def write(self) -> None:
        """The rows of tokens and budgets, and the books: the last thing before COMMIT."""
        for row in self._rows:
            self._db.execute(SQL["add-tokens"], columns := row.columns())
            self._books.tables["tokens"].add(columns[-1])
            self._num_row_tokens += len(row.ids)
        if self._ended:
            self._trim()
        self._budgets.write()
        self._db.execute(SQL["put-books"], self._books.columns())

    def take_over(self) -> None:
        """The transaction is committed: memory becomes what the file says."""
        memory = self._memory
        memory.books = self._books
        for entry in self._entries.values():
            memory.entries[entry.id] = memory.by_number[entry.number] = entry
        memory.keys |= self._keys
        memory.flips += self._flips
        memory.origins |= self._origins
        self._budgets.take_over()
        memory.first_rows |= self._first_rows
        for number in self._ended:
            memory.first_rows.pop(number, None)
        memory.low_row = self._low_row
        memory.num_row_tokens = self._num_row_tokens
        memory.num_unacked = self._num_unacked

    # --- ops ---------------------------------------------------------------------------

    def _accept(self, op: Accept) -> None:
        self._books.num_accepted = max(self._books.num_accepted + 1, op.number)
        for rollout in op.rollouts:
            if self._find(rollout.id) is not None:
                raise Conflict(f"rollout {rollout.id} is in the journal already")
            is_paused = self._books.is_all_paused or rollout.state is RolloutState.PAUSED
            entry = Entry(
                number=self._books.next_rollout,
                id=rollout.id,
                group_id=rollout.group_id,
                sample=rollout.index,
                pool=rollout.pool,
                state=RolloutState.PAUSED if is_paused else RolloutState.QUEUED,
                created_s=rollout.created_s,
                has_first_token=rollout.first_token_s is not None,
            )
            self._books.next_rollout += 1
            self._num_unacked += 1
            self._put(entry, rollout)
        if op.key is not None:
            self._remember(op.key, [rollout.id for rollout in op.rollouts])

    def _remember(self, key: RequestKey, rollout_ids: list[str]) -> None:
        name = key.name
        known = self._keys.get(name) or self._memory.keys.get(name)
        if known is not None:
            if known.key.created_s + self._config.retain_keys_s > self._now_s:
                raise Conflict(f"the Idempotency-Key {key.key!r} is in the journal already")
            self._db.execute(SQL["drop-key"], (known.number,))
            self._books.tables["keys"].drop(known.sum)
        number = self._books.next_key
        self._books.next_key += 1
        columns = key_columns(number, key, rollout_ids)
        self._db.execute(SQL["add-key"], columns)
        self._books.tables["keys"].add(columns[-1])
        self._keys[name] = KnownKey(number, key, rollout_ids, columns[-1])

    def _flip(self, op: Flip) -> None:
        self._books.flip = (op.version, op.digest)
        self._flips.append(op)
        number = len(self._memory.flips) + len(self._flips)
        columns = (
            *(number, op.version, op.digest, op.folder),
            *(op.parent, op.lineage, op.base),
        )
        row_sum = checksum("flips", *columns)
        self._db.execute(SQL["add-flip"], (*columns, row_sum))
        self._books.tables["flips"].add(row_sum)

    def _append(self, op: Append) -> None:
        if not op.grown:
            return
        origin = self._origin(op.origin)
        for grown in op.grown:
            entry = self._live(grown.rollout_id)
            check_grown(grown)
            if grown.start != (num := entry.num_tokens + entry.num_appended):
                raise IllegalState(
                    f"rollout {grown.rollout_id}: tokens from {grown.start} on do not follow the "
                    f"{num} that it has"
                )
            row = self._row(origin)
            row.add(entry.number, grown, _rest(entry, grown, op.time_s))
            entry.num_appended += len(grown.ids)
            self._budgets.count(entry.pool, len(grown.ids))
            if entry.number not in self._memory.first_rows:
                self._first_rows.setdefault(entry.number, row.row)

    def _row(self, origin: int) -> TokenRow:
        """The row that new tokens of this origin go to."""
        last = self._rows[-1] if self._rows else None
        if (
            last is None
            or last.origin != origin
            or len(last.numbers) >= _MAX_ROW_ENTRIES
            or len(last.ids) >= _MAX_ROW_TOKENS
        ):
            last = TokenRow(self._books.next_row, origin)
            self._rows.append(last)
            self._books.next_row += 1
        return last

    def _origin(self, origin: Origin) -> int:
        number = self._origins.get(origin) or self._memory.origins.get(origin)
        if number is None:
            number = self._books.next_origin
            self._books.next_origin += 1
            columns = (
                *(number, origin.version, origin.digest),
                *(origin.numerics, origin.core, origin.kv),
            )
            row_sum = checksum("origins", *columns)
            self._db.execute(SQL["add-origin"], (*columns, row_sum))
            self._books.tables["origins"].add(row_sum)
            self._origins[origin] = number
        return number

    def _end(self, rollout: Rollout) -> None:
        if not rollout.state.is_ended:
            raise IllegalState(f"rollout {rollout.id}: {rollout.state} is no ending")
        entry = self._live(rollout.id)
        num_known = entry.num_tokens + entry.num_appended
        self._budgets.count(entry.pool, len(rollout.output_ids) - num_known)
        entry.num_appended = 0
        self._ended.add(entry.number)
        self._put(entry, rollout)

    def _mark(self, rollout_ids: Iterable[str] | None, state: RolloutState) -> None:
        """Live rollouts (None: all) are paused, or no longer."""
        if rollout_ids is None:
            rollout_ids = {**self._memory.entries, **self._entries}
        for rollout_id in rollout_ids:
            found = self._find(rollout_id)
            if found is not None and found.is_live and found.state is not state:
                entry = self._live(rollout_id)
                entry.state, old_sum = state, entry.sum
                self._db.execute(
                    SQL["mark-rollout"], (str(state), entry.summed().sum, entry.number)
                )
                if self._db.changes() != 1:
                    raise DamagedRecord("rollouts", entry.number, "it is missing")
                self._books.tables["rollouts"].change(old_sum, entry.sum)

    def _acknowledge(self, rollout_id: str) -> None:
        found = self._find(rollout_id)
        if found is None or found.acked_s is not None:
            return
        if found.is_live:
            raise IllegalState(f"rollout {rollout_id} has not ended: it cannot be acknowledged")
        entry = self._entries[rollout_id] = copy.copy(found)
        entry.acked_s = self._now_s
        self._num_unacked -= 1
        self._store(entry, b"")

    # --- helpers -----------------------------------------------------------------------

    def _find(self, rollout_id: str) -> Entry | None:
        return self._entries.get(rollout_id) or self._memory.entries.get(rollout_id)

    def _live(self, rollout_id: str) -> Entry:
        """The drafted entry of a live rollout, to be changed; raises IllegalState."""
        entry = self._entries.get(rollout_id)
        if entry is None and (known := self._memory.entries.get(rollout_id)) is not None:
            entry = copy.copy(known)
        if entry is None or not entry.is_live:
            raise IllegalState(f"rollout {rollout_id} is not live in the journal")
        self._entries[rollout_id] = entry
        return entry

    def _put(self, entry: Entry, rollout: Rollout) -> None:
        """Store the whole rollout. A live one goes in queued and without text, which follows from
        its tokens; whether it is paused is the entry's."""
        trajectory = pack(rollout)
        if rollout.state.is_ended:
            entry.state, entry.ended_s = rollout.state, rollout.ended_s
        else:
            trajectory.state = RolloutState.QUEUED
            trajectory.text, trajectory.text_offset = "", 0
        entry.num_tokens = len(rollout.output_ids)
        self._entries[entry.id] = entry
        self._store(entry, encode(trajectory))

    def _store(self, entry: Entry, data: bytes) -> None:
        if len(data) > MAX_RECORD_BYTES:
            raise InvalidTrajectory(
                f"rollout {entry.id}: {len(data)} bytes; a record holds at most {MAX_RECORD_BYTES}"
            )
        old_sum = entry.sum
        entry.digest = checksum("trajectory", data)
        columns = entry.summed().columns()
        self._db.execute(SQL["put-rollout"], (*columns, entry.sum, data))
        tally = self._books.tables["rollouts"]
        if entry.is_stored:
            tally.change(old_sum, entry.sum)
        else:
            tally.add(entry.sum)
            entry.is_stored = True

    def _trim(self) -> None:
        """Delete the rows below the first that a live rollout needs."""
        firsts: Iterator[int] = (
            row
            for rows in (self._memory.first_rows, self._first_rows)
            for number, row in rows.items()
            if number not in self._ended
        )
        bound = min(next(firsts, self._books.next_row), self._low_row + _TRIM_ROWS)
        if bound > self._low_row:
            for num_bytes, row_sum in self._db.execute(SQL["drop-tokens"], (self._low_row, bound)):
                self._books.tables["tokens"].drop(row_sum)
                self._num_row_tokens -= num_bytes // 4
            self._low_row = bound


def _rest(entry: Entry, grown: Grown, time_s: float) -> Rest | None:
    """What the tokens' columns do not hold; notes that the first token's time is written."""
    first_token_s = None
    if grown.ids and time_s and not entry.has_first_token:
        first_token_s = time_s
        entry.has_first_token = True
    if first_token_s is None and grown.num_cached_tokens is None and grown.extra is None:
        return None
    extra = None if grown.extra is None else PackedExtra.of(grown.extra)
    return Rest(first_token_s, grown.num_cached_tokens, extra)
