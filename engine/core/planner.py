"""Makes the plan of one step: decode rows, chunks, admissions; finds room for them.

Decode rows come first, so that a long prompt never holds them up; then, by priority, the chunks
of those that run and whoever outranks them in the queue; then the rest of the queue. Blocks are taken, in this
order, from the paused, from those that wait, from the least important running rollout (lowest
priority, then latest admitted). The most important one is never preempted, so it ends; hence
every rollout ends.
"""

from ..config import OnPause
from ..messages import Stats
from .admission import LiveRollout
from .decoding import Batch, row_of
from .kv_cache import NO_MATCH, KVCacheManager, Match
from .plan import Copy, Park, Row, Unpark
from .roster import Roster, importance

NO_DECODES = Batch([], [], frozenset(), {})


class Draft:
    """The plan of a step while it is being made.

    decodes     rows of those that decode, known once all the rest is
    due         of those: whose row begins or completes a block
    last        of those: whose last token it is, by max_tokens
    rollouts    who is catching up, aligned with `chunks`
    """

    __slots__ = (
        "budget",
        "chunks",
        "copies",
        "decodes",
        "due",
        "last",
        "parks",
        "rollouts",
        "rows",
        "unparks",
    )

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.decodes = NO_DECODES
        self.due: list[LiveRollout] = []
        self.last: set[LiveRollout] = set()
        self.chunks: list[Row] = []
        self.rollouts: list[LiveRollout] = []
        self.rows: list[Row] = []
        """Those that decode, then the chunks."""
        self.parks: list[Park] = []
        self.unparks: list[Unpark] = []
        self.copies: list[Copy] = []


class Planner:
    """Writes places (through the roster), tables (through the KV manager) and counters."""

    def __init__(
        self,
        roster: Roster,
        kv: KVCacheManager,
        stats: Stats,
        *,
        budget: int,
        max_num_seqs: int,
        on_pause: OnPause,
    ) -> None:
        self._roster = roster
        self._kv = kv
        self._stats = stats
        self._budget = budget
        # no more running than tokens in a step: all of them decode, or a chunk gets a token
        self._max_running = min(max_num_seqs, budget)
        self._on_pause = on_pause
        self._draft = Draft(0)
        self._num_admissions = 0

    def make(self) -> Draft:
        """The next step. Where nothing unpaused is live it is empty, else it has rows."""
        draft = self._draft = Draft(self._budget)
        if self._roster.meters.limited:
            self._roster.apply_limits()
        if self._on_pause != "keep":
            self._take_from_paused()
        for rollout in self._plan_decodes():
            self._admit_waiting(above=rollout.add.priority)
            if rollout.state == "running" and draft.budget > 0:
                self._plan_chunk(rollout)
        self._admit_waiting(above=None)
        self._kv.end_plan()
        draft.decodes = self._roster.decoding.batch()
        draft.rows = [*draft.decodes.rows, *draft.chunks]
        assert draft.rows or not (self._roster.running or self._roster.num_waiting), "no progress"
        return draft

    # rows

    def _plan_decodes(self) -> list[LiveRollout]:
        """Rows for gaps of one; returns the running rollouts with larger gaps, best first.

        Those that decode have their rows: only whose day it is are looked at.
        """
        draft, decoding = self._draft, self._roster.decoding
        decoding.charge()
        draft.budget -= len(decoding)
        draft.due, others = decoding.take_due()
        size = self._kv.block_size
        for rollout in draft.due:
            kv = rollout.kv
            begins = len(kv.ids) > len(kv.blocks) * size
            # else preempted for one before it
            if begins and rollout.state == "running" and self._make_room(rollout, 1):
                self._kv.grow_by_one(kv)
        for rollout in others:
            if rollout.state == "running":
                self._pass_day(rollout)
        chunks: list[LiveRollout] = []
        for rollout in list(self._roster.catching_up):
            if rollout.state != "running":
                continue  # preempted for one before it
            if len(rollout.ids) - rollout.kv.num_computed_tokens > 1:
                chunks.append(rollout)
            else:
                self._plan_chunk(rollout)
        chunks.sort(key=importance, reverse=True)
        return chunks

    def _pass_day(self, rollout: LiveRollout) -> None:
        """Its last token is drawn, or its stop ids may be."""
        length = len(rollout.ids)
        if length + 1 == rollout.max_length:
            self._draft.last.add(rollout)
        if length == rollout.min_length:
            self._roster.decoding.lift_ban(rollout)

    def _plan_chunk(self, rollout: LiveRollout) -> None:
        """As much of the gap as the budget allows; the caller has checked the latter."""
        start = rollout.kv.num_computed_tokens
        end = min(len(rollout.ids), start + self._draft.budget)
        if self._make_room(rollout, self._kv.missing_blocks(rollout.kv, end)):
            self._kv.grow(rollout.kv, end)
            self._plan_row(rollout, start, end)

    def _plan_row(self, rollout: LiveRollout, start: int, end: int) -> None:
        draft = self._draft
        draft.chunks.append(row_of(rollout, start, end))
        draft.rollouts.append(rollout)
        draft.budget -= end - start
        rollout.share.served_tokens += _num_charged(rollout, start, end)

    def _unplan(self, rollout: LiveRollout) -> None:
        draft = self._draft
        if rollout in self._roster.decoding:
            draft.budget += 1
            rollout.share.served_tokens -= 1
        elif rollout in draft.rollouts:
            index = draft.rollouts.index(rollout)
            del draft.rollouts[index]
            row = draft.chunks.pop(index)
            draft.budget += row.num_tokens
            rollout.share.served_tokens -= _num_charged(rollout, row.start, row.end)

    # admission

    def _admit_waiting(self, *, above: int | None) -> None:
        """Admit while there is budget; with `above`, only who has more than this priority."""
        while self._draft.budget > 0:
            rollout = self._roster.waiting.best()
            if rollout is None or (above is not None and rollout.add.priority <= above):
                return
            if not self._admit(rollout):
                return

    def _admit(self, rollout: LiveRollout) -> bool:
        """Admit the best of the queue, or let it follow; False: nobody gets in this step."""
        kv, roster = rollout.kv, self._roster
        is_full = len(roster.running) == self._max_running
        if is_full and not roster.outranks_somebody(rollout.add.priority):
            return False
        match = NO_MATCH
        if not kv.blocks and kv.parking_key is None:
            limit = len(rollout.ids) - 1
            if rollout.needs_every_row:
                limit = min(limit, rollout.num_reported_rows)
            match = self._kv.match(kv, limit)
            if roster.watch.follow(rollout, match, limit):
                roster.waiting.remove(rollout)
                return True
        held = self._hold_with_room(rollout, match)
        if held is None:
            return False
        if len(roster.running) == self._max_running:
            self._preempt(roster.least_important_running())
        self._count_admission(rollout, held)
        if kv.parking_key is not None:
            self._draft.unparks.append(self._kv.unpark(kv))
        elif not kv.blocks:
            copy = self._kv.adopt(kv, held)
            rollout.length_before = len(rollout.ids)
            roster.note_kv(rollout, "computed")
            if copy is not None:
                self._draft.copies.append(copy)
        self._start(rollout)
        return True

    def _start(self, rollout: LiveRollout) -> None:
        self._num_admissions += 1
        rollout.admission = self._num_admissions
        self._roster.start(rollout)
        if len(rollout.ids) - rollout.kv.num_computed_tokens > 1:
            self._roster.watch.begin(rollout)
        self._plan_chunk(rollout)

    def _count_admission(self, rollout: LiveRollout, match: Match) -> None:
        stats, kv = self._stats, rollout.kv
        is_first = rollout.admission == 0
        if not kv.blocks and kv.parking_key is None:
            stats.prefix_queries_total += len(rollout.ids)
            stats.prefix_hits_total += match.num_tokens
        if not is_first or rollout.add.output_ids:
            kind = "host" if kv.parking_key else "kept" if kv.blocks else "recomputed"
            stats.kv_resume_total[kind] += 1
        if is_first:
            stats.prompt_tokens_total += rollout.num_prompt
            rollout.num_cached_tokens = min(match.num_tokens, rollout.num_prompt)

    def _hold_with_room(self, rollout: LiveRollout, match: Match) -> Match | None:
        """Hold a match and have room for the rest; None if blocks are short.

        A block to copy from costs one more block for this step: where that is one too many, the
        rollout goes without the copy.
        """
        for candidate in (match, match.without_copy()) if match.source is not None else (match,):
            self._kv.hold(candidate)
            if self._make_room_to_admit(rollout, len(candidate.blocks)):
                return candidate
            self._kv.let_go(candidate)
        return None

    def _make_room_to_admit(self, rollout: LiveRollout, num_matched_blocks: int) -> bool:
        """Room for all its present tokens, at the cost of who does not run or matters less.

        One block per running rollout stays free, lest somebody admitted be preempted at once.
        (Chunks need no more: while one waits for its next step, there is no budget to admit.)
        """
        running = self._roster.running
        needed = self._kv.missing_blocks(rollout.kv, len(rollout.ids)) - num_matched_blocks
        if not self._could_make_room(rollout, needed):
            return False
        while True:
            if self._kv.num_free >= needed + len(running):
                return True
            if self._take_from_holder(rollout):
                continue
            if not self._roster.outranks_somebody(rollout.add.priority):
                return False
            victim = self._roster.least_important_running()
            self._preempt(victim)
            self._take_kv(victim)

    def _could_make_room(self, rollout: LiveRollout, needed: int) -> bool:
        """False if not even all that could be taken would do (an upper bound: some is shared)."""
        roster, priority = self._roster, rollout.add.priority
        available = self._kv.num_free - needed
        if available < 0:
            available += sum(len(r.kv.blocks) for r in roster.holders if r is not rollout)
        if available < 0 and roster.outranks_somebody(priority):
            less = (r for r in roster.running if r.add.priority < priority)
            available += sum(len(r.kv.blocks) for r in less)
        return available >= 0

    # memory pressure

    def _make_room(self, rollout: LiveRollout, count: int) -> bool:
        """Free blocks for a running rollout; False if it is itself the one that had to go."""
        while self._kv.num_free < count:
            if self._take_from_holder(rollout):
                continue
            victim = self._roster.least_important_running()
            self._preempt(victim)
            self._take_kv(victim)
            if victim is rollout:
                return False
        return True

    def _take_from_holder(self, asker: LiveRollout) -> bool:
        """Take the blocks of somebody who does not run: the paused first."""
        holders = [rollout for rollout in self._roster.holders if rollout is not asker]
        if not holders:
            return False
        self._take_kv(min(holders, key=lambda r: (r.state != "paused", importance(r))))
        return True

    def _take_from_paused(self) -> None:
        """Those that were paused since the last step give up their blocks, needed or not."""
        for rollout in [r for r in self._roster.holders if r.state == "paused"]:
            if self._on_pause == "park":
                self._take_kv(rollout)
            else:
                self._kv.drop(rollout.kv)
                self._roster.holders.pop(rollout)

    def _take_kv(self, rollout: LiveRollout) -> None:
        park = self._kv.park(rollout.kv)
        if park is None:
            self._kv.drop(rollout.kv)
        else:
            self._draft.parks.append(park)
        self._roster.holders.pop(rollout, None)

    def _preempt(self, rollout: LiveRollout) -> None:
        self._unplan(rollout)
        self._roster.preempt(rollout)
        self._stats.preemptions_total += 1


def _num_charged(rollout: LiveRollout, start: int, end: int) -> int:
    """Tokens of a row that its client pays for: those computed again were paid before."""
    return max(0, end - max(start, rollout.num_reported_rows))
