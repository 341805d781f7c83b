"""What becomes of the KV of live rollouts when the weights change between two steps.

keep              tables stay; the next token is drawn over KV of older weights
recompute         tables are given up; each rollout computes its tokens again, in its turn
recompute-prompt  tables stay, and the positions of prompts are written again, in place, in steps of
                  their own before anything else runs (`Rewriting`)

Whatever the policy, KV over which no token was drawn yet (a prompt half computed) is given up: so a
boundary between weights is always where a segment begins, and segments say all there is to know.
Parked KV cannot be written in place: under recompute-prompt it is given up too.
"""

from msgspec import Struct

from ..messages import KVPolicy
from .admission import LiveRollout
from .decoding import row_of
from .kv_cache import KVCacheManager
from .plan import Row, RowResult, StepResult
from .roster import Roster


class FlipCounts(Struct, frozen=True):
    """Rollouts that go on over KV of older weights; tokens whose KV is to be computed again."""

    kept_rollouts: int
    dropped_tokens: int


class Rewriting:
    """Prompts that are computed again in place, before anything else runs.

    A block that several rollouts share is written once, wherever they come to it: two of them may
    share a block and not the one before it, of which each has a copy. In each of its plans a row
    reads only what earlier plans have written, and no block is written by two rows.
    """

    def __init__(self, block_size: int, *, budget: int, max_num_seqs: int) -> None:
        self._block_size = block_size
        self._budget = budget
        self._max_num_seqs = max_num_seqs
        self._left: dict[LiveRollout, None] = {}
        self._done: dict[int, int] = {}
        """Block → how many of its first positions are written again."""
        self._rows: list[tuple[LiveRollout, Row]] = []

    def __bool__(self) -> bool:
        return bool(self._left)

    def begin(self, rollouts: list[LiveRollout]) -> None:
        self._left = dict.fromkeys(rollouts)
        self._done = {}

    def take_left(self) -> list[LiveRollout]:
        """Give up: those whose prompts are written in part, or not yet."""
        left, self._left = list(self._left), {}
        return left

    def rows(self) -> list[Row]:
        """Of the next step; none once all is written."""
        self._rows = []
        budget, written = self._budget, set[int]()
        for rollout in list(self._left):
            if rollout.state == "ended":
                del self._left[rollout]
                continue
            start = self._start(rollout)
            if start == rollout.num_prompt:
                del self._left[rollout]
                continue
            blocks = rollout.kv.blocks[: -(-rollout.num_prompt // self._block_size)]
            if len(self._rows) == self._max_num_seqs or budget == 0:
                break
            if not written.isdisjoint(blocks):
                continue
            end = self._end(rollout, start, start + budget)
            row = row_of(rollout, start, end)
            row.block_table = blocks
            self._rows.append((rollout, row))
            budget -= end - start
            written.update(blocks[start // self._block_size : -(-end // self._block_size)])
        return [row for _, row in self._rows]

    def commit(self, result: StepResult) -> list[tuple[LiveRollout, Row, RowResult]]:
        """Note what was written; returns those whose rows could not be computed."""
        bad: list[tuple[LiveRollout, Row, RowResult]] = []
        size = self._block_size
        for index, (rollout, row) in enumerate(self._rows):
            if rollout.state == "ended":
                continue
            if (outcome := result.outcome(index)).is_bad:
                bad.append((rollout, row, outcome))
                continue
            for at in range(row.start // size, -(-row.end // size)):
                self._done[row.block_table[at]] = min(size, row.end - at * size)
        self._rows = []
        return bad

    def _start(self, rollout: LiveRollout) -> int:
        """The first position of the prompt that is not written again."""
        size, end = self._block_size, rollout.num_prompt
        for index in range(-(-end // size)):
            done = self._done.get(rollout.kv.blocks[index], 0)
            if done < min(size, end - index * size):
                return index * size + done
        return end

    def _end(self, rollout: LiveRollout, start: int, most: int) -> int:
        """Where a row from `start` on ends: at the prompt's end, before a block of which another
        rollout has written something, and never beyond `most`."""
        size, end = self._block_size, min(rollout.num_prompt, most)
        for index in range(start // size + 1, -(-end // size)):
            if rollout.kv.blocks[index] in self._done:
                return index * size
        return end


def apply_policy(
    roster: Roster, kv: KVCacheManager, rewriting: Rewriting, policy: KVPolicy
) -> FlipCounts:
    """Give up, keep or have written again; `kv.set_version` was called."""
    half_written = set(rewriting.take_left())
    kept: list[LiveRollout] = []
    dropped_tokens = 0
    for rollout in list(roster.live.values()):
        table = rollout.kv
        if not table.blocks and table.parking_key is None:
            continue
        is_kept = rollout.has_drawn and rollout not in half_written and policy != "recompute"
        if is_kept and policy == "recompute-prompt":
            is_kept = table.parking_key is None
        if is_kept:
            kept.append(rollout)
        else:
            dropped_tokens += table.num_computed_tokens
            roster.restart(rollout)
    if policy == "recompute-prompt":
        apart = _with_shared_outputs(kept, kv.block_size)
        for rollout in apart:
            dropped_tokens += rollout.kv.num_computed_tokens
            roster.restart(rollout)
        kept = [rollout for rollout in kept if rollout not in apart]
        dropped_tokens += sum(rollout.num_prompt for rollout in kept)
        for rollout in kept:
            kv.forget_prompt(rollout.kv, rollout.num_prompt)
            rollout.length_before = len(rollout.ids)
        rewriting.begin(kept)
    for rollout in kept:
        roster.note_kv(rollout, "keep" if policy == "keep" else "recompute-prompt")
    return FlipCounts(len(kept), dropped_tokens)


def _with_shared_outputs(rollouts: list[LiveRollout], size: int) -> set[LiveRollout]:
    """Those whose prompt holds a block that is output of another (a turn that follows on it): to
    write it again for the one would change it for the other."""
    least: dict[int, int] = {}
    for rollout in rollouts:
        for index, block in enumerate(rollout.kv.blocks):
            part = min(max(rollout.num_prompt - index * size, 0), size)
            least[block] = min(part, least.get(block, size))
    return {
        rollout
        for rollout in rollouts
        for index, block in enumerate(rollout.kv.blocks)
        if min(max(rollout.num_prompt - index * size, 0), size) > least[block]
    }
