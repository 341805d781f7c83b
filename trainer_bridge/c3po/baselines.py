"""What C3PO++ is compared with, on the same engine: the same Ω, costs, prompts and lengths.

    synchronous   a batch of groups is submitted and waited for
    stop_at       more is kept in flight; when enough groups are complete all others are aborted
                  and submitted again, from their first token (`restart`) or from where they were
                  (`resume`: what they have is prefilled again)

Both are given what favours them: a free place is filled at once, a finished member of an
unfinished group is kept, and what was aborted comes first in the next iteration.
"""

from collections import deque
from collections.abc import Iterator
from typing import Literal

from msgspec import Struct

from .simulator import Lengths, StepCost
from .words import Sample

Resubmission = Literal["restart", "resume"]


class Step(Struct, kw_only=True):
    """One rollout phase. wasted: tokens thrown away at its end."""

    seconds: float
    sampled: int
    wasted: int
    lengths: list[int]
    """Of what the trainer gets."""


class _Row(Struct):
    sample: Sample
    length: int
    done: int = 0


class _Engine:
    """Rows that decode, one token per tick each; a run of ticks without an ending is one step."""

    def __init__(self, capacity: int, lengths: Lengths, cost: StepCost, prompt_tokens: int) -> None:
        self._capacity = capacity
        self._lengths = lengths
        self._cost = cost
        self._prompt_tokens = prompt_tokens
        self.rows: list[_Row] = []
        self.seconds = 0.0
        self.sampled = 0

    @property
    def has_room(self) -> bool:
        return len(self.rows) < self._capacity

    def submit(self, sample: Sample, done: int = 0) -> None:
        self.rows.append(_Row(sample, self._lengths(sample), done))
        self.seconds += (self._prompt_tokens + done) * self._cost.prefill_token_s

    def run(self) -> list[_Row]:
        """Up to the next ending: the rows that end."""
        count = min(row.length - row.done for row in self.rows)
        self.seconds += count * self._cost.step_s(len(self.rows))
        self.sampled += count * len(self.rows)
        for row in self.rows:
            row.done += count
        ended = [row for row in self.rows if row.done == row.length]
        self.rows = [row for row in self.rows if row.done < row.length]
        return ended


def synchronous(
    prompts: Iterator[str],
    lengths: Lengths,
    *,
    batch: int,
    group: int,
    capacity: int,
    cost: StepCost,
    prompt_tokens: int = 0,
) -> Iterator[Step]:
    """`batch` prompts a step, `group` samples each; ends with the prompts."""
    while True:
        names = [name for _, name in zip(range(batch), prompts, strict=False)]
        if len(names) < batch:
            return
        waiting = deque(Sample(name, index) for name in names for index in range(group))
        engine = _Engine(capacity, lengths, cost, prompt_tokens)
        trained: list[int] = []
        while waiting or engine.rows:
            while waiting and engine.has_room:
                engine.submit(waiting.popleft())
            trained += [row.length for row in engine.run()]
        yield Step(seconds=engine.seconds, sampled=engine.sampled, wasted=0, lengths=trained)


def stop_at(
    prompts: Iterator[str],
    lengths: Lengths,
    *,
    batch: int,
    group: int,
    capacity: int,
    cost: StepCost,
    resubmission: Resubmission,
    prompt_tokens: int = 0,
) -> Iterator[Step]:
    """A step ends when `batch` groups are complete; without prompts for that many no more come."""
    waiting: deque[tuple[Sample, int]] = deque()
    hold: dict[str, list[int]] = {}
    complete: list[str] = []
    while True:
        engine = _Engine(capacity, lengths, cost, prompt_tokens)
        while len(complete) < batch:
            while engine.has_room:
                if not waiting and (name := next(prompts, None)) is not None:
                    hold[name] = []
                    waiting.extend((Sample(name, index), 0) for index in range(group))
                if not waiting:
                    break
                engine.submit(*waiting.popleft())
            if not engine.rows:
                return
            for row in engine.run():
                members = hold[row.sample.prompt]
                members.append(row.length)
                if len(members) == group:
                    complete.append(row.sample.prompt)
        # endings of one tick may complete more groups than were asked for: all are trained
        trained = [length for name in complete for length in hold.pop(name)]
        complete.clear()
        wasted = 0
        for row in reversed(engine.rows):
            if resubmission == "resume":
                waiting.appendleft((row.sample, row.done))
            else:
                wasted += row.done
                again = Sample(row.sample.prompt, row.sample.index, row.sample.attempt + 1)
                waiting.appendleft((again, 0))
        yield Step(seconds=engine.seconds, sampled=engine.sampled, wasted=wasted, lengths=trained)
