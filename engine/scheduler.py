"""Who runs in the next step, and what became of it.

vLLM's rule: a rollout has `num_computed_tokens`, and each step closes a part of the gap to its
tokens. A gap of one is decode; a larger one is a prompt, a hit's rest or a resumption, in chunks.
Decode rows are planned first, so that a long prompt never holds them up.

    state       where it is            its KV
    queued      queue, or a follower   none; kept or parked after a pause
    running     running                in its table
    preempted   queue, or a follower   kept (its slot was taken), parked or dropped (its blocks were)
    paused      nowhere                kept until memory is short, then parked or dropped

Blocks are taken, in this order, from the paused, from those that wait, from the least important
running rollout (lowest priority, then latest admitted). The most important one is never
preempted, so it ends; hence every rollout ends.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from .admission import LiveRollout, Move, Shares, WaitingQueue
from .config import BatchConfig, ResolvedKV
from .kv_cache import NO_MATCH, KVCacheManager, Match
from .messages import Add, FromCore, Rejected, RolloutTokens, StateChanged, Stats, Tokens
from .plan import Copy, Park, Row, RowResult, StepPlan, StepResult, Unpark
from .prefix_watch import PrefixWatch
from .reporting import ending, report

NO_BAN: list[int] = []


class Draft:
    """The plan of a step while it is being made; `rollouts` is aligned with `rows`."""

    __slots__ = ("budget", "copies", "parks", "prefilling", "rollouts", "rows", "unparks")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.rows: list[Row] = []
        self.rollouts: list[LiveRollout] = []
        self.prefilling: list[LiveRollout] = []
        """Running rollouts with a larger gap: the blocks to close it are promised to them."""
        self.parks: list[Park] = []
        self.unparks: list[Unpark] = []
        self.copies: list[Copy] = []


class Scheduler:
    """Plans steps over a KV cache that it owns. Not thread safe; no clock, no I/O.

    `schedule` and `commit` alternate; `commit` is due if the plan has work. Other calls may come
    between the two: a row whose rollout was cancelled meanwhile is not booked. `set_version`
    may not: weights change between two steps.
    """

    def __init__(self, kv: ResolvedKV, batch: BatchConfig) -> None:
        self._max_model_len = kv.max_model_len
        self._budget = batch.max_num_batched_tokens
        # no more running than tokens in a step: all of them decode, or a chunk gets a token
        self._max_running = min(batch.max_num_seqs, self._budget)
        self._kv = KVCacheManager(kv)
        self._watch = PrefixWatch(self._kv)
        self._live: dict[str, LiveRollout] = {}
        self._running: dict[LiveRollout, None] = {}
        self._running_priorities: Counter[int] = Counter()
        self._waiting = WaitingQueue()
        self._holders: dict[LiveRollout, None] = {}
        """Not running, yet with blocks."""
        self._shares = Shares()
        self._is_pausing_adds = False
        self._moves: list[tuple[str, Move]] = []
        self._unpark_drops: list[str] = []
        self._draft = Draft(0)
        self._is_in_flight = False
        self._num_steps = self._num_adds = self._num_admissions = 0
        self._stats = Stats(
            num_running=0,
            num_waiting=0,
            num_paused=0,
            num_blocks_used=0,
            num_blocks=self._kv.num_blocks,
            steps_total=0,
            prompt_tokens_total=0,
            generation_tokens_total=0,
            prefix_queries_total=0,
            prefix_hits_total=0,
            preemptions_total=0,
            kv_resume_total={"kept": 0, "host": 0, "recomputed": 0},
        )

    # what the front asks for

    def add(self, add: Add) -> Rejected | None:
        """Queue a rollout, or say why it can never run here.

        Raises ValueError if its id is live: ids are the front's to keep apart.
        """
        if add.rollout_id in self._live:
            raise ValueError(f"rollout {add.rollout_id} is live in this core")
        reason = self._reason_to_reject(add)
        if reason is not None:
            return Rejected(add.rollout_id, reason)
        self._num_adds += 1
        ids = [*add.prompt_ids, *add.output_ids]
        rollout = LiveRollout(add, ids, self._kv.open(ids), arrival=self._num_adds)
        self._live[rollout.id] = rollout
        if add.start_paused or self._is_pausing_adds:
            self._move(rollout, "paused")
        else:
            self._enqueue(rollout)
        return None

    def cancel(self, rollout_ids: Iterable[str]) -> None:
        """Forget rollouts and free what they hold; unknown ids are ignored."""
        gone = {rollout_id for rollout_id in rollout_ids if rollout_id in self._live}
        for rollout_id in gone:
            self._end(self._live[rollout_id])
        if gone:
            self._moves = [move for move in self._moves if move[0] not in gone]

    def pause(self, rollout_ids: Iterable[str] | None = None) -> None:
        """Stop scheduling these (None: all, and later adds); unknown ids are ignored."""
        if rollout_ids is None:
            self._is_pausing_adds = True
        for rollout in self._named(rollout_ids):
            if rollout.state == "paused":
                continue
            self._withdraw(rollout)
            if rollout.kv.blocks:
                self._holders[rollout] = None
            self._shares.deactivate(rollout)
            self._move(rollout, "paused")

    def resume(self, rollout_ids: Iterable[str] | None = None) -> None:
        """Schedule these again (None: all), at the place of their arrival."""
        if rollout_ids is None:
            self._is_pausing_adds = False
        for rollout in self._named(rollout_ids):
            if rollout.state == "paused":
                self._move(rollout, "queued")
                self._enqueue(rollout)

    def set_version(self, digest: str) -> None:
        """Weights changed: nothing computed before is shared any more; live KV is kept."""
        if digest != self._kv.version:
            self._kv.set_version(digest)
            self._requeue(self._watch.clear())

    def take_events(self) -> list[FromCore]:
        """Moves since the last call; `commit` takes them too."""
        if not self._moves:
            return []
        moves, self._moves = self._moves, []
        return [StateChanged(moves)]

    @property
    def has_unpaused(self) -> bool:
        """Whether `schedule` would find something to run."""
        return bool(self._running or len(self._waiting) or self._watch.num_followers)

    def stats(self) -> Stats:
        num_waiting = len(self._waiting) + self._watch.num_followers
        return msgspec.structs.replace(
            self._stats,
            num_running=len(self._running),
            num_waiting=num_waiting,
            num_paused=len(self._live) - len(self._running) - num_waiting,
            num_blocks_used=self._kv.num_used,
            kv_resume_total=dict(self._stats.kv_resume_total),
        )

    # a step

    def schedule(self) -> StepPlan:
        """Decide the next step. If the plan has no work, nothing unpaused is left."""
        assert not self._is_in_flight, "the last plan was not committed"
        draft = self._draft = Draft(self._budget)
        self._plan_running()
        while draft.budget > 0:
            rollout = self._waiting.best()
            if rollout is None or not self._admit(rollout):
                break
        self._kv.end_plan()
        plan = StepPlan(
            step=self._num_steps,
            rows=draft.rows,
            parks=draft.parks,
            unparks=draft.unparks,
            copies=draft.copies,
            unpark_drops=self._unpark_drops,
        )
        self._unpark_drops = []
        if plan.has_work:
            self._is_in_flight = True
            self._num_steps += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[FromCore]:
        """Book what the runner made of the plan; returns the news for the front, in order."""
        assert self._is_in_flight, "no plan is in flight"
        assert plan.rows is self._draft.rows, "not the plan in flight"
        self._is_in_flight = False
        # rows computed under other weights than they were planned for are shared with nobody
        self.set_version(result.digest)
        news: list[RolloutTokens] = []
        for rollout, row, row_result in zip(
            self._draft.rollouts, plan.rows, result.rows, strict=True
        ):
            if rollout.state != "ended":
                tokens = self._book(rollout, row, row_result)
                if tokens is not None:
                    news.append(tokens)
        self._kv.end_step()
        self._stats.steps_total += 1
        messages = self.take_events()
        if news:
            messages.append(Tokens(result.version, result.digest, news))
        return messages

    def _book(self, rollout: LiveRollout, row: Row, result: RowResult) -> RolloutTokens | None:
        if result.nonfinite is None:
            self._kv.book(rollout.kv, row.start + len(row.token_ids))
            assert (result.sampled is not None) == row.samples, f"{row.rollout_id}: a draw too few"
        if result.sampled is not None:
            rollout.ids.append(result.sampled.token_id)
            self._stats.generation_tokens_total += 1
        if rollout.parent_hash is not None:
            self._requeue(self._watch.advance(rollout, is_done=row.samples))
        finish = ending(rollout, result)
        tokens = report(rollout, row, result, finish)
        if finish is not None:
            self._end(rollout, is_poisoned=finish.type == "error")
        return tokens

    def _plan_running(self) -> None:
        """Rows of the running: gaps of one, then chunks by importance."""
        size = self._kv.block_size
        chunks: list[LiveRollout] = []
        for rollout in list(self._running):
            if rollout.state != "running":
                continue  # preempted for one before it
            kv = rollout.kv
            start = kv.num_computed_tokens
            if len(rollout.ids) - start > 1:
                chunks.append(rollout)
                continue
            if start % size == 0 and start == len(kv.blocks) * size:
                if not self._make_room(rollout, 1):
                    continue
                self._kv.grow(kv, start + 1)
            self._plan_row(rollout, start, start + 1)
        chunks.sort(key=_importance, reverse=True)
        for rollout in chunks:
            if rollout.state == "running" and self._draft.budget > 0:
                self._plan_chunk(rollout)

    def _plan_chunk(self, rollout: LiveRollout) -> None:
        start = rollout.kv.num_computed_tokens
        end = min(len(rollout.ids), start + self._draft.budget)
        if self._make_room(rollout, self._kv.missing_blocks(rollout.kv, end)):
            self._kv.grow(rollout.kv, end)
            self._plan_row(rollout, start, end)
            self._draft.prefilling.append(rollout)

    def _plan_row(self, rollout: LiveRollout, start: int, end: int) -> None:
        draft, ids, add = self._draft, rollout.ids, rollout.add
        position = len(ids) - rollout.num_prompt
        banned_ids = add.banned_ids if position < add.sampling.min_tokens else NO_BAN
        draft.rows.append(
            Row(
                rollout.id,
                ids[start:end],
                start,
                rollout.kv.blocks,
                end == len(ids),
                position,
                rollout.num_prompt,
                ids,
                add.sampling,
                add.seed,
                banned_ids,
            )
        )
        draft.rollouts.append(rollout)
        draft.budget -= end - start
        # tokens that are computed again were paid for
        rollout.share.served_tokens += max(0, end - max(start, rollout.num_reported_rows))

    def _unplan(self, rollout: LiveRollout) -> None:
        draft = self._draft
        if rollout in draft.prefilling:
            draft.prefilling.remove(rollout)
        if rollout not in draft.rollouts:
            return
        index = draft.rollouts.index(rollout)
        del draft.rollouts[index]
        row = draft.rows.pop(index)
        end = row.start + len(row.token_ids)
        draft.budget += len(row.token_ids)
        rollout.share.served_tokens -= max(0, end - max(row.start, rollout.num_reported_rows))

    # admission

    def _admit(self, rollout: LiveRollout) -> bool:
        """Admit the best of the queue, or let it follow; False: nobody gets in this step."""
        kv = rollout.kv
        if not self._has_slot(rollout):
            return False
        match = NO_MATCH
        if not kv.blocks and kv.parking_key is None:
            limit = len(rollout.ids) - 1
            if rollout.needs_every_row:
                limit = min(limit, rollout.num_reported_rows)
            match = self._kv.match(kv, limit)
            if self._watch.follow(rollout, match, limit):
                self._waiting.remove(rollout)
                return True
        held = self._hold_with_room(rollout, match)
        if held is None:
            return False
        if len(self._running) == self._max_running:
            self._preempt(self._least_important_running(), keeps_kv=True)
        self._waiting.remove(rollout)
        self._holders.pop(rollout, None)
        self._count_admission(rollout, held)
        if kv.parking_key is not None:
            self._draft.unparks.append(self._kv.unpark(kv))
        elif not kv.blocks:
            copy = self._kv.adopt(kv, held)
            if copy is not None:
                self._draft.copies.append(copy)
        self._start_running(rollout)
        return True

    def _start_running(self, rollout: LiveRollout) -> None:
        self._num_admissions += 1
        rollout.admission = self._num_admissions
        rollout.is_admitted_before = True
        self._running[rollout] = None
        self._running_priorities[rollout.add.priority] += 1
        self._move(rollout, "running")
        start = rollout.kv.num_computed_tokens
        if len(rollout.ids) - start > 1:
            self._watch.begin(rollout)
        end = min(len(rollout.ids), start + self._draft.budget)
        self._kv.grow(rollout.kv, end)
        self._plan_row(rollout, start, end)
        self._draft.prefilling.append(rollout)

    def _count_admission(self, rollout: LiveRollout, match: Match) -> None:
        stats, kv = self._stats, rollout.kv
        if not kv.blocks and kv.parking_key is None:
            stats.prefix_queries_total += len(rollout.ids)
            stats.prefix_hits_total += match.num_tokens
        if rollout.is_admitted_before or rollout.add.output_ids:
            kind = "host" if kv.parking_key else "kept" if kv.blocks else "recomputed"
            stats.kv_resume_total[kind] += 1
        if not rollout.is_admitted_before:
            stats.prompt_tokens_total += rollout.num_prompt
            rollout.num_cached_tokens = min(match.num_tokens, rollout.num_prompt)

    def _has_slot(self, rollout: LiveRollout) -> bool:
        """A free slot, or one to be taken from somebody of lower priority."""
        is_full = len(self._running) >= self._max_running
        return not is_full or min(self._running_priorities) < rollout.add.priority

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
        """
        missing_blocks = self._kv.missing_blocks
        needed = missing_blocks(rollout.kv, len(rollout.ids)) - num_matched_blocks
        if not self._could_make_room(rollout, needed):
            return False
        while True:
            promised = sum(missing_blocks(r.kv, len(r.ids)) for r in self._draft.prefilling)
            if self._kv.num_free >= needed + promised + len(self._running):
                return True
            if self._take_from_holder(rollout):
                continue
            if not self._running or min(self._running_priorities) >= rollout.add.priority:
                return False
            self._preempt(self._least_important_running(), keeps_kv=False)

    def _could_make_room(self, rollout: LiveRollout, needed: int) -> bool:
        """False if not even all that could be taken would do (an upper bound: some is shared)."""
        available = self._kv.num_free - needed
        if available >= 0:
            return True
        available += sum(len(r.kv.blocks) for r in self._holders if r is not rollout)
        if self._running and min(self._running_priorities) < rollout.add.priority:
            available += sum(
                len(r.kv.blocks) for r in self._running if r.add.priority < rollout.add.priority
            )
        return available >= 0

    # memory pressure

    def _make_room(self, rollout: LiveRollout, count: int) -> bool:
        """Free blocks for a running rollout; False if it is itself the one that had to go."""
        while self._kv.num_free < count:
            if self._take_from_holder(rollout):
                continue
            victim = self._least_important_running()
            self._preempt(victim, keeps_kv=False)
            if victim is rollout:
                return False
        return True

    def _take_from_holder(self, asker: LiveRollout) -> bool:
        """Take the blocks of somebody who does not run: the paused first."""
        holders = [rollout for rollout in self._holders if rollout is not asker]
        if not holders:
            return False
        self._take_kv(min(holders, key=lambda r: (r.state != "paused", _importance(r))))
        return True

    def _take_kv(self, rollout: LiveRollout) -> None:
        park = self._kv.park(rollout.kv)
        if park is None:
            self._kv.drop(rollout.kv)
        else:
            self._draft.parks.append(park)
        self._holders.pop(rollout, None)

    def _least_important_running(self) -> LiveRollout:
        return min(self._running, key=_importance)

    def _preempt(self, rollout: LiveRollout, *, keeps_kv: bool) -> None:
        self._unplan(rollout)
        self._withdraw(rollout)
        self._move(rollout, "preempted")
        self._stats.preemptions_total += 1
        self._waiting.push(rollout)
        if keeps_kv:
            self._holders[rollout] = None
        else:
            self._take_kv(rollout)

    # bookkeeping

    def _reason_to_reject(self, add: Add) -> str | None:
        num_prompt, num_output = len(add.prompt_ids), len(add.output_ids)
        total = num_prompt + add.max_tokens
        if num_prompt == 0:
            return "the prompt is empty: give at least one token"
        if total > self._max_model_len:
            return (
                f"prompt ({num_prompt}) and max_tokens ({add.max_tokens}) come to {total} tokens; "
                f"the context holds {self._max_model_len}"
            )
        # the last token is never an input, so it needs no KV
        needed = self._kv.blocks_for(total - 1)
        if needed > self._kv.num_blocks:
            return (
                f"prompt ({num_prompt}) and max_tokens ({add.max_tokens}) need {needed} KV blocks "
                f"of {self._kv.block_size} tokens; there are {self._kv.num_blocks}"
            )
        if num_output >= add.max_tokens or (num_output and add.output_ids[-1] in add.stop_ids):
            return f"it has ended already: {num_output} output tokens of {add.max_tokens}"
        return None

    def _named(self, rollout_ids: Iterable[str] | None) -> Sequence[LiveRollout]:
        if rollout_ids is None:
            return list(self._live.values())
        return [self._live[name] for name in rollout_ids if name in self._live]

    def _move(self, rollout: LiveRollout, state: Move) -> None:
        rollout.state = state
        self._moves.append((rollout.id, state))

    def _enqueue(self, rollout: LiveRollout) -> None:
        self._shares.activate(rollout)
        self._waiting.push(rollout)

    def _requeue(self, followers: Iterable[LiveRollout]) -> None:
        for rollout in followers:
            self._waiting.push(rollout)

    def _withdraw(self, rollout: LiveRollout) -> None:
        """Take a rollout from where it runs or waits."""
        if rollout in self._running:
            del self._running[rollout]
            priority = rollout.add.priority
            self._running_priorities[priority] -= 1
            if self._running_priorities[priority] == 0:
                del self._running_priorities[priority]
            self._requeue(self._watch.end(rollout))
        elif rollout.follows is not None:
            self._watch.unfollow(rollout)
        elif rollout.is_queued:
            self._waiting.remove(rollout)
        self._holders.pop(rollout, None)

    def _end(self, rollout: LiveRollout, *, is_poisoned: bool = False) -> None:
        self._withdraw(rollout)
        self._shares.deactivate(rollout)
        parking_key = self._kv.close(rollout.kv, is_poisoned=is_poisoned)
        if parking_key is not None:
            self._unpark_drops.append(parking_key)
        rollout.state = "ended"
        del self._live[rollout.id]

    def check_invariants(self) -> None:
        """Raise AssertionError if the books contradict each other; for tests."""
        self._kv.check_invariants()
        self._watch.check_invariants()
        assert len(self._running) <= self._max_running
        for rollout in self._live.values():
            is_running = rollout in self._running
            places = [is_running, rollout.follows is not None, rollout.is_queued]
            assert sum(places) == (rollout.state != "paused"), f"{rollout.id}: {rollout.state}"
            assert is_running == (rollout.state == "running")
            assert (rollout in self._holders) == (bool(rollout.kv.blocks) and not is_running)
            assert rollout.is_counted_active == (rollout.state != "paused")
            assert rollout.kv.num_computed_tokens < len(rollout.ids)
        assert Counter(r.add.priority for r in self._running) == self._running_priorities


def _importance(rollout: LiveRollout) -> tuple[int, int]:
    """Priority, then who was admitted first."""
    return rollout.add.priority, -rollout.admission
