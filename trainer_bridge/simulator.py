"""C3PO++ over given lengths: the very controller, with an engine that is a formula.

One tick is one new token for each rollout of the pool, in admission order; the last tick of a
budget may be partial (PAPER.md §2.5). A run of ticks in which nothing happens is one event per
rollout, so time grows with endings, not with tokens.
"""

from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct, structs

from .c3po import C3po
from .c3po_config import C3poConfig
from .c3po_words import Abandoned, Command, Live, Purge, Sample, Submit, Train, TrainGroup
from .ledger import Books

Lengths = Callable[[Sample], int]
"""Output tokens of a sample, from 1; may differ between attempts."""


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
        cost: StepCost | None = None,
        prompt_tokens: int = 0,
    ) -> None:
        """prompts: maybe endless; `prompt_tokens` of each are prefilled once per attempt."""
        self.machine = C3po(config)
        self._prompts = prompts
        self._lengths = lengths
        self._cost = cost or StepCost()
        self._prefill_s = prompt_tokens * self._cost.prefill_token_s
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
        self._now = now = self._blank()
        commands = machine.begin()
        if machine.phase == "done":
            return None
        now.purged = [
            (command.sample, before[command.sample])
            for command in commands
            if isinstance(command, Purge)
        ]
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
        rows = list(machine.pool.values())
        lengths = [self._lengths(live.sample) for live in rows]
        count = min(length - live.length for live, length in zip(rows, lengths, strict=True))
        assert count > 0, "a length below 1"
        if machine.config.mode == "generated":
            left = machine.config.budget - machine.counted
            if left < len(rows):
                rows, count = rows[:left], 1
            count = min(count, left // len(rows))
        now.ticks += count
        now.seconds += count * self._cost.step_s(len(rows))
        version = now.number
        for live in rows:
            self._take(machine.grew(live.sample, count, version))
        for live, length in zip(rows, lengths, strict=False):
            if live.length == length:
                now.ended.append(_copy(live))
                self._take(machine.ended(live.sample, "stop", length))

    def _take(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Submit):
                self._now.seconds += self._prefill_s
            elif isinstance(command, Train):
                self._now.groups = command.groups
            elif isinstance(command, Abandoned):
                self._now.abandoned.append(command.prompt)


def _copy(live: Live) -> Live:
    return structs.replace(live, spans=list(live.spans))
