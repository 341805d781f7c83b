"""Who runs in the next step, and what became of it.

vLLM's rule: a rollout has `num_computed_tokens`, and each step closes a part of the gap to its
tokens. A gap of one is decode; a larger one is a prompt, what a hit left of it, or a resumption,
in chunks. One path for all.
"""

from collections import Counter
from collections.abc import Iterable
from operator import attrgetter

import msgspec

from ..config import BatchConfig, ResolvedKV
from ..errors import ContextTooLong, InvalidRequest
from ..messages import (
    Add,
    FromCore,
    KVChanged,
    KVPolicy,
    Meter,
    Metered,
    RolloutTokens,
    StateChanged,
    Stats,
    Tokens,
)
from .admission import LiveRollout
from .flipping import FlipCounts, Rewriting, apply_policy
from .kv_cache import KVCacheManager
from .metering import PoolMeter
from .plan import StepPlan, StepResult
from .planner import Draft, Planner
from .reporting import ending, report
from .roster import Roster


class Scheduler:
    """Plans steps over a KV cache that it owns. Not thread safe; no clock, no I/O.

    `schedule` and `commit` alternate; `commit` is due if the plan has work. Other calls may come
    between the two: a row whose rollout was cancelled meanwhile is not booked. `set_version`
    and `meter` may not: weights and limits change between two steps.
    """

    def __init__(self, kv: ResolvedKV, batch: BatchConfig) -> None:
        self._max_model_len = kv.max_model_len
        self._kv = KVCacheManager(kv)
        self._roster = Roster(self._kv)
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
        self._planner = Planner(
            self._roster,
            self._kv,
            self._stats,
            budget=batch.max_num_batched_tokens,
            max_num_seqs=batch.max_num_seqs,
            on_pause=kv.on_pause,
        )
        self._rewriting = Rewriting(
            kv.block_size,
            budget=batch.max_num_batched_tokens,
            max_num_seqs=batch.max_num_seqs,
        )
        self._is_rewriting = False
        """The plan in flight writes prompts again, and nothing else."""
        self._is_pausing_adds = False
        self._num_adds = self._num_drawn = 0
        self._drawn: dict[str, int] = {}
        """Of metered pools that drew in the step that is being booked: all that they drew."""
        self._in_flight: Draft | None = None

    # what the front asks for

    def add(self, add: Add) -> None:
        """Queue a rollout.

        Raises ContextTooLong if it can never fit the context or the blocks, InvalidRequest if it
        has no prompt or has ended already; ValueError if its id is live (ids are the front's).
        """
        if add.rollout_id in self._roster.live:
            raise ValueError(f"rollout {add.rollout_id} is live in this core")
        self._check(add)
        self._num_adds += 1
        ids = [*add.prompt_ids, *add.output_ids]
        rollout = LiveRollout(add, ids, self._kv.open(ids), arrival=self._num_adds)
        self._roster.live[rollout.id] = rollout
        self._roster.meters.enter(rollout)
        if add.start_paused or self._is_pausing_adds:
            self._roster.pause(rollout)
        else:
            self._roster.enqueue(rollout)

    def cancel(self, rollout_ids: Iterable[str]) -> None:
        """Forget rollouts and free what they hold; unknown ids are ignored."""
        gone = self._roster.named(rollout_ids)
        for rollout in gone:
            if rollout.state != "ended":
                self._roster.end(rollout)
        self._roster.forget_moves({rollout.id for rollout in gone})

    def pause(self, rollout_ids: Iterable[str] | None = None) -> None:
        """Stop scheduling these (None: all, and later adds); unknown ids are ignored.

        A row in flight is still booked, so one more token may come.
        """
        if rollout_ids is None:
            self._is_pausing_adds = True
        for rollout in self._roster.named(rollout_ids):
            self._roster.pause(rollout)

    def resume(self, rollout_ids: Iterable[str] | None = None) -> None:
        """Schedule these again (None: all), at the place of their arrival."""
        if rollout_ids is None:
            self._is_pausing_adds = False
        for rollout in self._roster.named(rollout_ids):
            self._roster.resume(rollout)

    def meter(self, meter: Meter) -> Metered:
        """Limit a pool, from the next step on; what it drew so far."""
        drawn = self._roster.meters.set_limit(meter.pool, meter.limit, meter.places).drawn
        return Metered(meter.pool, drawn)

    def set_version(self, digest: str) -> None:
        """The weights are those of `digest` now.

        Nothing computed under others is shared from here on; the KV of live rollouts is kept.
        """
        if digest != self._kv.version:
            self._kv.set_version(digest)
            self._roster.requeue(self._roster.watch.clear())

    def flip(self, digest: str, policy: KVPolicy) -> FlipCounts:
        """As `set_version`, and what becomes of the KV of live rollouts."""
        self.set_version(digest)
        return apply_policy(self._roster, self._kv, self._rewriting, policy)

    def take_events(self) -> list[FromCore]:
        """Moves since the last call; `commit` takes them too."""
        events: list[FromCore] = []
        if moves := self._roster.take_moves():
            events.append(StateChanged(moves))
        if kv_moves := self._roster.take_kv_moves():
            events.append(KVChanged(kv_moves))
        return events

    @property
    def has_unpaused(self) -> bool:
        """Whether `schedule` will find something to run."""
        return bool(self._roster.running or self._roster.num_waiting or self._rewriting)

    def stats(self) -> Stats:
        """Counters and gauges of this moment; a copy. `step_seconds_total` is the loop's to fill."""
        return msgspec.structs.replace(
            self._stats,
            num_running=len(self._roster.running),
            num_waiting=self._roster.num_waiting,
            num_paused=self._roster.num_paused,
            num_blocks_used=self._kv.num_used,
            generation_tokens_total=self._num_drawn,
            kv_resume_total=dict(self._stats.kv_resume_total),
        )

    # a step

    def schedule(self) -> StepPlan:
        """Decide the next step. It has rows unless nothing unpaused is live."""
        assert self._in_flight is None, "the last plan was not committed"
        if self._rewriting and (rows := self._rewriting.rows()):
            self._is_rewriting = True
            self._roster.apply_limits()
            drops, self._roster.unpark_drops = self._roster.unpark_drops, []
            return StepPlan(step=self._stats.steps_total, rows=rows, unpark_drops=drops)
        draft = self._planner.make()
        drops, self._roster.unpark_drops = self._roster.unpark_drops, []
        plan = StepPlan(
            step=self._stats.steps_total,
            rows=draft.rows,
            parks=draft.parks,
            unparks=draft.unparks,
            copies=draft.copies,
            unpark_drops=drops,
        )
        if plan.has_work:
            self._in_flight = draft
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[FromCore]:
        """Book what the runner made of the plan; returns the news for the front, in order."""
        if self._is_rewriting:
            return self._commit_rewriting(result)
        draft, self._in_flight = self._in_flight, None
        assert draft is not None, "no plan is in flight"
        assert plan.rows is draft.rows, "not the plan in flight"
        assert result.draws.lengths == {len(plan.rows)}, "columns of another length than the plan"
        # rows computed under other weights than they were planned for are shared with nobody
        self.set_version(result.digest)
        apart, gone = self._apart(draft, result)
        plain = draft.decodes.book(result.draws, apart | gone)
        if plain is not None:
            self._num_drawn += len(plain.starts)
        if draft.decodes.meters:
            self._count_plain(draft, apart | gone)
        news: list[RolloutTokens] = []
        alone = {draft.decodes.rollouts[index]: index for index in apart}
        # which of two blocks with one content is kept, and which is evicted first, is not left
        # to chance: it goes by admission
        todo = sorted({*alone, *draft.due}, key=attrgetter("admission")) if alone else draft.due
        for rollout in todo:
            if rollout in alone:
                self._book(rollout, plan, alone[rollout], result, news)
            elif rollout.state != "ended":
                self._kv.register(rollout.kv)
        for index, rollout in enumerate(draft.rollouts, len(draft.decodes.rows)):
            if rollout.state != "ended":
                self._book(rollout, plan, index, result, news)
        self._kv.end_step()
        self._stats.steps_total += 1
        messages = self.take_events()
        if news or plain is not None:
            drawn, self._drawn = self._drawn, {}
            messages.append(Tokens(result.version, result.digest, news, plain, drawn))
        return messages

    def _count_plain(self, draft: Draft, apart: set[int]) -> None:
        """Count on their meters the tokens of those that decode, but for the rows `apart`."""
        counts: Counter[PoolMeter | None] = Counter(draft.decodes.meters)
        counts.subtract(draft.decodes.rollouts[index].meter for index in apart)
        for meter, count in counts.items():
            if meter is not None and count:
                self._count(meter, count)

    def _count(self, meter: PoolMeter, count: int) -> None:
        meter.drawn += count
        if meter.limit is not None:
            self._drawn[meter.pool] = meter.drawn

    def _commit_rewriting(self, result: StepResult) -> list[FromCore]:
        """No token comes of it; whose row cannot be computed ends."""
        self._is_rewriting = False
        self.set_version(result.digest)
        self._stats.steps_total += 1
        news: list[RolloutTokens] = []
        for rollout, row, outcome in self._rewriting.commit(result):
            tokens = report(rollout, row, outcome, ending(rollout, outcome))
            assert tokens is not None
            news.append(tokens)
            self._roster.end(rollout, is_poisoned=True)
        messages = self.take_events()
        if news:
            messages.append(Tokens(result.version, result.digest, news))
        return messages

    def _apart(self, draft: Draft, result: StepResult) -> tuple[set[int], set[int]]:
        """Rows of those that decode that are not booked with the others: by themselves; never.

        By themselves: who ends, and whose outcome is not just a token. Never: who has ended
        since the plan was made.
        """
        decodes, token_ids = draft.decodes, result.draws.token_ids
        rollouts = decodes.rollouts
        apart = {index for index in result.rows if index < len(rollouts)}
        if draft.last:
            apart.update(index for index, r in enumerate(rollouts) if r in draft.last)
        if not decodes.stop_ids.isdisjoint(token_ids):
            drawn = enumerate(zip(rollouts, token_ids, strict=False))
            apart.update(index for index, (r, token_id) in drawn if token_id in r.stop_ids)
        gone: set[int] = set()
        if not self._roster.decoding.is_still(decodes):
            gone.update(index for index, r in enumerate(rollouts) if r.state == "ended")
        return apart - gone, gone

    def _book(
        self,
        rollout: LiveRollout,
        plan: StepPlan,
        index: int,
        result: StepResult,
        news: list[RolloutTokens],
    ) -> None:
        """Book one row by itself."""
        row, outcome = plan.rows[index], result.outcome(index)
        sampled = outcome.sampled
        assert outcome.is_bad or (sampled is not None) == row.samples, (
            f"{row.rollout_id}: a draw is missing, or one too many"
        )
        finish = ending(rollout, outcome)
        tokens = report(rollout, row, outcome, finish)
        if tokens is not None:
            news.append(tokens)
        end = row.end
        rollout.num_unreported_rows = len(rollout.ids) - max(end, rollout.num_reported_rows)
        if sampled is not None:
            rollout.ids.append(sampled.token_id)
            rollout.num_unreported_rows += 1
            self._num_drawn += 1
            if rollout.meter is not None:
                self._count(rollout.meter, 1)
        if not outcome.is_bad:
            self._kv.book(rollout.kv, end)
        if rollout.parent_hash is not None:
            self._roster.requeue(self._roster.watch.advance(rollout, is_done=row.samples))
        if finish is not None:
            self._roster.end(rollout, is_poisoned=finish.type == "error")
        elif sampled is not None and rollout in self._roster.catching_up:
            self._roster.settle(rollout)

    def _check(self, add: Add) -> None:
        num_prompt, num_output = len(add.prompt_ids), len(add.output_ids)
        total = num_prompt + add.max_tokens
        asked = f"prompt ({num_prompt}) and max_tokens ({add.max_tokens})"
        if num_prompt == 0:
            raise InvalidRequest("prompt is empty: give at least one token", field="prompt")
        if total > self._max_model_len:
            raise ContextTooLong(
                f"{asked} come to {total} tokens; the context holds {self._max_model_len}: "
                f"ask for {self._max_model_len - num_prompt} or less",
                field="max_tokens",
            )
        # the last token is never an input, so it needs no KV
        needed = self._kv.blocks_for(total - 1)
        if needed > self._kv.num_blocks:
            raise ContextTooLong(
                f"{asked} need {needed} KV blocks of {self._kv.block_size} tokens; there are "
                f"{self._kv.num_blocks}: ask for less or raise kv.num_blocks",
                field="max_tokens",
            )
        if num_output >= add.max_tokens or (num_output and add.output_ids[-1] in add.stop_ids):
            raise InvalidRequest(
                f"output_ids: the rollout has ended already ({num_output} of {add.max_tokens} "
                "tokens, or a stop id): it is the front's to finish",
                field="output_ids",
            )

    def check_invariants(self) -> None:
        """Raise AssertionError if the books contradict each other; for tests."""
        self._kv.check_invariants()
        self._roster.check_invariants()
