"""C3PO++ over given lengths: the very controller, with an engine that is a formula.

One tick is one new token for each rollout of the pool, in admission order; the last tick of a
budget may be partial (PAPER.md §2.5). A run of ticks in which nothing happens is one event per
rollout, so time grows with endings, not with tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal

from msgspec import Struct, structs

from .c3po import C3po
from .config import C3poConfig
from .ledger import Books
from .words import Abandoned, Command, Ending, Live, Purge, Sample, Submit, Train, TrainGroup

Lengths = Callable[[Sample], int]
"""Output tokens of a sample, from 1; may differ between attempts."""


class Fate(Struct, frozen=True):
    """What becomes of an attempt after `after` tokens, from 1, if it has not ended by then.

    error: it fails, and is drawn anew; abort: somebody cancels it; lost: its tokens are gone.
    """

    after: int
    what: Literal["error", "abort", "lost"]


Fates = Callable[[Sample, int], Fate | None]
"""By sample, and by how often its tokens were lost before."""


class StepCost(Struct, frozen=True, kw_only=True):
    """Seconds of an engine's step: a fixed part (weights are read), one per row, and prefill."""

    fixed_s: float = 1.0
    row_s: float = 0.0
    prefill_token_s: float = 0.0

    def step_s(self, rows: int) -> float:
        return self.fixed_s + self.row_s * rows


class Iteration(Struct, kw_only=True):
    """What one iteration did. pool, stream: what is left at its end."""

    number: int
    ticks: int = 0
    seconds: float = 0.0
    """Of its rollout phase."""
    counted: int = 0
    books: Books
    purged: list[tuple[Sample, int]] = []
    """With the tokens that it had."""
    ended: list[Live] = []
    groups: tuple[TrainGroup, ...] = ()
    abandoned: list[str] = []
    pool: list[Live] = []
    stream: list[Sample] = []
    held: list[Sample] = []


class Simulator:
    """One run; `iterate` until it gives None."""

    def __init__(
        self,
        config: C3poConfig,
        prompts: Iterator[str],
        lengths: Lengths,
        *,
        fates: Fates | None = None,
        cost: StepCost | None = None,
        prompt_tokens: int = 0,
        recomputes_kv: bool = False,
    ) -> None:
        """prompts: maybe endless; `prompt_tokens` of each are prefilled once per attempt.

        recomputes_kv: what is carried is prefilled again in each iteration, under new weights
        """
        self.machine = C3po(config)
        self._prompts = prompts
        self._lengths = lengths
        self._fates = fates
        self._cost = cost or StepCost()
        self._prompt_tokens = prompt_tokens
        self._recomputes_kv = recomputes_kv
        # of what is in the pool: after how many tokens what happens to it
        self._fate: dict[Sample, tuple[int, Ending | Literal["lost"]]] = {}
        self._now = self._blank()

    def run(self, iterations: int) -> list[Iteration]:
        """So many iterations, or fewer if work runs out."""
        found: list[Iteration] = []
        while len(found) < iterations and (iteration := self.iterate()) is not None:
            found.append(iteration)
        return found

    def iterate(self) -> Iteration | None:
        """The next iteration; None when every prompt is delivered or abandoned."""
        machine = self.machine
        self._feed()
        before = {sample: live.length for sample, live in machine.pool.items()}
        before |= {h.sample: h.length for held in machine.hold.values() for h in held.values()}
        self._now = now = self._blank()
        commands = machine.begin()
        if machine.phase == "done":
            return None
        now.purged = [
            (command.sample, before[command.sample])
            for command in commands
            if isinstance(command, Purge)
        ]
        if self._recomputes_kv:
            for live in machine.pool.values():
                if live.spans:
                    self._prefill(live.length)
        self._take(commands)
        while machine.phase == "open":
            self._feed()
            if machine.pool:
                self._tick()
        now.counted = machine.counted
        self._take(machine.settled())
        now.pool = [_copy(live) for live in machine.pool.values()]
        now.stream = list(machine.stream)
        self._take(machine.trained(now.number + 1))
        now.held = [held.sample for hold in machine.hold.values() for held in hold.values()]
        assert machine.last_books is not None
        now.books = machine.last_books
        return now

    def _blank(self) -> Iteration:
        return Iteration(number=self.machine.iteration, books=self.machine.books)

    def _feed(self) -> None:
        while wanted := self.machine.wants_prompts:
            more = [name for _, name in zip(range(wanted), self._prompts, strict=False)]
            self._take(self.machine.extend(more))
            if len(more) < wanted:
                self._take(self.machine.end_stream())

    def _tick(self) -> None:
        """As many whole ticks as nothing ends before, or what is left of the budget."""
        machine, now = self.machine, self._now
        # behind them stand those who wait for a place
        rows = list(islice(machine.pool.values(), machine.config.capacity))
        count = min(self._fate[live.sample][0] - live.length for live in rows)
        if machine.config.mode == "generated":
            left = machine.config.budget - machine.counted
            # the last, partial tick of a budget: those that were admitted first
            rows = rows[:left]
            count = min(count, max(1, left // len(rows)))
        now.ticks += count
        now.seconds += count * self._cost.step_s(len(rows))
        for live in rows:
            self._take(machine.grew(live.sample, count, now.number))
        for live in rows:
            # one whose group was abandoned just now has none
            after, ending = self._fate.get(live.sample, (0, "abort"))
            if live.length == after:
                del self._fate[live.sample]
                self._end(live, ending)

    def _end(self, live: Live, ending: Ending | Literal["lost"]) -> None:
        if ending == "lost":
            self._take(self.machine.lost(live.sample))
            return
        if ending == "stop":
            self._now.ended.append(_copy(live))
        self._take(self.machine.ended(live.sample, ending, live.length))

    def _take(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Submit):
                self._submit(command.sample)
            elif isinstance(command, Purge):
                self._fate.pop(command.sample, None)
            elif isinstance(command, Train):
                self._now.groups = command.groups
            elif isinstance(command, Abandoned):
                self._now.abandoned.append(command.prompt)

    def _submit(self, sample: Sample) -> None:
        self._prefill(0)
        length = self._lengths(sample)
        assert length > 0, f"{sample} has length {length}"
        self._fate[sample] = length, "stop"
        if self._fates is not None:
            fate = self._fates(sample, self.machine.pool[sample].losses)
            if fate is not None and fate.after < length:
                self._fate[sample] = fate.after, fate.what

    def _prefill(self, num_output: int) -> None:
        tokens = self._prompt_tokens + num_output
        self._now.seconds += tokens * self._cost.prefill_token_s


def _copy(live: Live) -> Live:
    return structs.replace(live, spans=list(live.spans))
