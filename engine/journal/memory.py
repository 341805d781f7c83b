"""A journal in memory: the same answers as the file's, and nothing survives.

For tests, and the model that the file is compared with. Everything is held packed, so nothing is
shared with the caller.
"""

import time
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from ..config import JournalConfig
from ..errors import Conflict, IllegalState, JournalError, JournalFull
from ..rollout import Rollout, RolloutState
from ..trajectory import decode, encode, pack, unpack
from .ops import (
    Accept,
    Ack,
    Append,
    Budget,
    BudgetState,
    CloseBudget,
    End,
    Flip,
    Op,
    OpenBudget,
    Pause,
    Query,
    Recovered,
    RequestKey,
    Resume,
    Summary,
    grow,
)


class _Entry(Struct, frozen=True):
    """A rollout as stored; changes make a new one."""

    summary: Summary
    data: bytes
    """The packed trajectory; empty once acknowledged."""
    acked_s: float | None = None


class _State(Struct):
    """All of it; `commit` works on a copy."""

    entries: dict[str, _Entry]
    keys: dict[tuple[str, str, str], tuple[RequestKey, list[str]]]
    budgets: dict[str, Budget] = {}
    is_all_paused: bool = False
    flips: list[Flip] = []
    num_accepted: int = 0
    num_rollouts: int = 0


class MemoryJournal:
    """A `JournalStore` without a file."""

    def __init__(
        self, config: JournalConfig | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._config = config or JournalConfig()
        self._clock = clock
        self._state = _State({}, {})
        self._is_closed = False

    @property
    def num_bytes(self) -> int:
        return sum(len(entry.data) for entry in self._state.entries.values())

    @property
    def num_rollouts(self) -> int:
        return sum(not entry.summary.is_acked for entry in self._state.entries.values())

    def recover(self) -> Recovered:
        self._check_open()
        state, now = self._state, self._clock()
        live = [
            _restore(entry) for entry in state.entries.values() if not entry.summary.state.is_ended
        ]
        keys = [
            (key, list(ids))
            for key, ids in state.keys.values()
            if key.created_s + self._config.retain_keys_s > now
        ]
        return Recovered(
            live=live,
            is_all_paused=state.is_all_paused,
            keys=keys,
            flip=(state.flips[-1].version, state.flips[-1].digest) if state.flips else None,
            flips=list(state.flips),
            num_accepted=state.num_accepted,
            budgets=[msgspec.structs.replace(budget) for budget in state.budgets.values()],
        )

    def check(self) -> list[str]:
        self._check_open()
        return []

    def commit(self, ops: Sequence[Op]) -> None:
        self._check_open()
        state = self._state
        draft = msgspec.structs.replace(
            state,
            entries=dict(state.entries),
            keys=dict(state.keys),
            budgets={name: msgspec.structs.replace(one) for name, one in state.budgets.items()},
        )
        for op in ops:
            self._apply(draft, op)
        self._state = draft

    def read(self, rollout_id: str) -> Rollout | None:
        self._check_open()
        entry = self._state.entries.get(rollout_id)
        return None if entry is None or entry.summary.is_acked else _restore(entry)

    def summary(self, rollout_id: str) -> Summary | None:
        self._check_open()
        entry = self._state.entries.get(rollout_id)
        return None if entry is None else msgspec.structs.replace(entry.summary)

    def list(self, query: Query) -> list[Summary]:
        self._check_open()
        found = [
            msgspec.structs.replace(entry.summary)
            for entry in self._state.entries.values()
            if entry.summary.number > query.after
            and query.state in (None, entry.summary.state)
            and query.group_id in (None, entry.summary.group_id)
            and query.pool in (None, entry.summary.pool)
        ]
        return found[: query.limit]

    def compact(self) -> bool:
        self._check_open()
        now = self._clock()
        old = [
            self._state.entries[rollout_id].summary
            for key, ids in self._state.keys.values()
            if key.is_all_that_reads and key.created_s + self._config.retain_keys_s <= now
            for rollout_id in ids
            if rollout_id in self._state.entries
        ]
        if ended := [one.id for one in old if one.state.is_ended and not one.is_acked]:
            self.commit([Ack(ended)])
        live = {one.id for one in old if not one.state.is_ended}
        state = self._state
        state.entries = {
            rollout_id: entry
            for rollout_id, entry in state.entries.items()
            if entry.acked_s is None or entry.acked_s + self._config.retain_acked_s > now
        }
        state.keys = {
            name: (key, ids)
            for name, (key, ids) in state.keys.items()
            if key.created_s + self._config.retain_keys_s > now or not live.isdisjoint(ids)
        }
        newest = {budget.pool: name for name, budget in state.budgets.items()}
        state.budgets = {
            name: budget
            for name, budget in state.budgets.items()
            if newest[budget.pool] == name
            or budget.ended_s is None
            or budget.ended_s + self._config.retain_keys_s > now
        }
        return False

    def close(self) -> None:
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise JournalError("journal (memory): closed")

    def _apply(self, draft: _State, op: Op) -> None:
        match op:
            case Accept():
                self._accept(draft, op)
            case Append():
                for grown in op.grown:
                    entry = _live(draft, grown.rollout_id)
                    rollout = _restore(entry)
                    grow(rollout, op.origin, grown, op.time_s)
                    self._count(draft, entry, rollout)
                    _put(draft, entry, rollout)
            case End():
                if not op.rollout.state.is_ended:
                    raise IllegalState(f"rollout {op.rollout.id}: {op.rollout.state} is no ending")
                entry = _live(draft, op.rollout.id)
                self._count(draft, entry, op.rollout)
                _put(draft, entry, op.rollout)
            case Pause():
                draft.is_all_paused |= op.rollout_ids is None
                _mark(draft, op.rollout_ids, RolloutState.PAUSED)
            case Resume():
                draft.is_all_paused &= op.rollout_ids is not None
                _mark(draft, op.rollout_ids, RolloutState.QUEUED)
            case Ack():
                for rollout_id in op.rollout_ids:
                    self._acknowledge(draft, rollout_id)
            case OpenBudget():
                self._open(draft, op)
            case CloseBudget():
                if op.budget_id not in draft.budgets:
                    raise IllegalState(f"budget {op.budget_id} is not in the journal")
                self._end(draft.budgets[op.budget_id], BudgetState.CLOSED)
            case Flip():
                draft.flips = [*draft.flips, op]

    def _accept(self, draft: _State, op: Accept) -> None:
        if (limit := self._config.max_bytes) < self.num_bytes:
            raise JournalFull(f"journal (memory): {self.num_bytes} bytes, the limit is {limit}")
        draft.num_accepted = max(draft.num_accepted + 1, op.number)
        for rollout in op.rollouts:
            if rollout.id in draft.entries:
                raise Conflict(f"rollout {rollout.id} is in the journal already")
            draft.num_rollouts += 1
            is_paused = draft.is_all_paused or rollout.state is RolloutState.PAUSED
            state = RolloutState.PAUSED if is_paused else RolloutState.QUEUED
            summary = Summary(
                number=draft.num_rollouts,
                id=rollout.id,
                group_id=rollout.group_id,
                index=rollout.index,
                pool=rollout.pool,
                state=state,
                created_s=rollout.created_s,
                ended_s=None,
                num_output_tokens=0,
                is_acked=False,
            )
            _put(draft, _Entry(summary, b""), rollout)
        if op.key is not None:
            self._remember(draft, op.key, [rollout.id for rollout in op.rollouts])

    def _remember(self, draft: _State, key: RequestKey, ids: Sequence[str]) -> None:
        known = draft.keys.get(key.name)
        if known and known[0].created_s + self._config.retain_keys_s > self._clock():
            raise Conflict(f"the Idempotency-Key {key.key!r} is in the journal already")
        draft.keys[key.name] = (key, [*ids])

    def _open(self, draft: _State, op: OpenBudget) -> None:
        budget = op.budget
        if _open_budget(draft, budget.pool) is not None:
            raise Conflict(f"pool {budget.pool!r} has an open budget")
        if budget.id in draft.budgets:
            raise Conflict(f"budget {budget.id} is in the journal already")
        draft.budgets[budget.id] = msgspec.structs.replace(budget, used=0)
        if op.key is not None:
            self._remember(draft, op.key, [budget.id])

    def _count(self, draft: _State, entry: _Entry, grown: Rollout) -> None:
        """What it grows by is of its pool's budget."""
        budget = _open_budget(draft, entry.summary.pool)
        num_tokens = len(grown.output_ids) - entry.summary.num_output_tokens
        if budget is None or num_tokens <= 0:
            return
        if budget.used + num_tokens > budget.tokens:
            raise IllegalState(f"budget {budget.id} does not hold {num_tokens} more tokens")
        budget.used += num_tokens
        if budget.used == budget.tokens:
            self._end(budget, BudgetState.SPENT)

    def _end(self, budget: Budget, state: BudgetState) -> None:
        if budget.state is BudgetState.OPEN:
            budget.state, budget.ended_s = state, self._clock()

    def _acknowledge(self, draft: _State, rollout_id: str) -> None:
        entry = draft.entries.get(rollout_id)
        if entry is None or entry.summary.is_acked:
            return
        if not entry.summary.state.is_ended:
            raise IllegalState(f"rollout {rollout_id} has not ended: it cannot be acknowledged")
        summary = msgspec.structs.replace(entry.summary, is_acked=True)
        draft.entries[rollout_id] = _Entry(summary, b"", self._clock())


def _open_budget(draft: _State, pool: str) -> Budget | None:
    budgets = [one for one in draft.budgets.values() if one.pool == pool]
    return next((one for one in budgets if one.state is BudgetState.OPEN), None)


def _live(draft: _State, rollout_id: str) -> _Entry:
    entry = draft.entries.get(rollout_id)
    if entry is None or entry.summary.state.is_ended:
        raise IllegalState(f"rollout {rollout_id} is not live in the journal")
    return entry


def _restore(entry: _Entry) -> Rollout:
    rollout = unpack(decode(entry.data))
    if not rollout.state.is_ended:
        rollout.state = entry.summary.state
    return rollout


def _put(draft: _State, entry: _Entry, rollout: Rollout) -> None:
    """Store the rollout. A live one is stored without text, queued: the entry knows what is so."""
    trajectory = pack(rollout)
    state, ended_s = entry.summary.state, None
    if rollout.state.is_ended:
        state, ended_s = rollout.state, rollout.ended_s
    else:
        trajectory.text, trajectory.text_offset = "", 0
        trajectory.state = RolloutState.QUEUED
    summary = msgspec.structs.replace(
        entry.summary, state=state, ended_s=ended_s, num_output_tokens=len(rollout.output_ids)
    )
    draft.entries[rollout.id] = _Entry(summary, encode(trajectory))


def _mark(draft: _State, rollout_ids: Sequence[str] | None, state: RolloutState) -> None:
    """Live rollouts (None: all) are paused, or no longer."""
    for rollout_id in list(draft.entries) if rollout_ids is None else rollout_ids:
        entry = draft.entries.get(rollout_id)
        if entry is not None and not entry.summary.state.is_ended:
            summary = msgspec.structs.replace(entry.summary, state=state)
            draft.entries[rollout_id] = msgspec.structs.replace(entry, summary=summary)
