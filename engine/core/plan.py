"""What the scheduler hands to a runner, and what it gets back: plain data, torch-free.

One step: `Scheduler.schedule()` → StepPlan → `Runner.run()` → StepResult → `Scheduler.commit()`.
"""

from collections.abc import Sequence
from typing import Protocol, Self

from msgspec import Struct

from ..rollout import SamplingParams


class Row(Struct):
    """The share of one rollout in a step: tokens [start, start + num_tokens) of it.

    A view of the rollout's own lists, valid until the step is committed: while a rollout
    decodes, its row is one and the same object in every step, and nobody writes to it.

    all_ids       prompt + output so far; shared with the scheduler, read only
    num_missing   how many of them, at the end, were not computed before; the row begins there
    num_tokens    how many of those it computes, prompt and output not distinguished
    block_table   physical blocks; entry j covers positions j·block_size …; covers the row too
    banned_ids    not to be drawn in this step
    """

    rollout_id: str
    all_ids: list[int]
    num_missing: int
    num_tokens: int
    block_table: list[int]
    num_prompt: int
    sampling: SamplingParams
    seed: int
    banned_ids: list[int]

    @property
    def start(self) -> int:
        """Position of the first token = num_computed_tokens."""
        return len(self.all_ids) - self.num_missing

    @property
    def end(self) -> int:
        return len(self.all_ids) - self.num_missing + self.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """Ids to compute, in order."""
        return self.all_ids[self.start : self.end]

    @property
    def samples(self) -> bool:
        """Whether the last token is the newest one, so that its logits are drawn from."""
        return self.num_tokens == self.num_missing

    @property
    def position(self) -> int:
        """Index of the output token to draw (counter of the draw; penalties see as many)."""
        return len(self.all_ids) - self.num_prompt


class Copy(Struct, frozen=True):
    """Copy one KV block of all layers before the step (copy on write)."""

    source: int
    target: int


class Park(Struct, frozen=True):
    """Before the step: save these blocks to host memory under `key` (their blocks are reused after)."""

    key: str
    blocks: list[int]


class Unpark(Struct, frozen=True):
    """Before the step: load what was saved under `key` into these blocks, and forget it."""

    key: str
    blocks: list[int]


class StepPlan(Struct, kw_only=True):
    """One step. Moves are carried out in this order: parks, unparks, copies, then the rows."""

    step: int
    rows: list[Row]
    parks: list[Park] = []
    unparks: list[Unpark] = []
    copies: list[Copy] = []
    unpark_drops: list[str] = []
    """Saved KV to forget (a cancelled rollout's)."""

    @property
    def has_work(self) -> bool:
        return bool(self.rows or self.parks or self.unparks or self.copies or self.unpark_drops)


class Sampled(Struct, kw_only=True):
    """One drawn token and what is known of it; optional fields as `SamplingParams` asks."""

    token_id: int
    lp_sampled: float
    lp_temp: float
    kept_mass: float
    flags: int
    lp_raw: float | None = None
    entropy: float | None = None
    kept_ids: list[int] | None = None
    top: list[tuple[int, float]] | None = None


NO_DRAW = Sampled(token_id=0, lp_sampled=0.0, lp_temp=0.0, kept_mass=0.0, flags=0)


class RowResult(Struct, kw_only=True):
    """The outcome for one row of a plan.

    prompt_lp[i], prompt_top[i] belong to prompt position start + 1 + i (given those before it).
    routing_* hold one record per token of the row.
    nonfinite names step and layer where a value was first not finite; fault is what this row
    raised, run alone. With either the rollout ends, and `sampled` is None.
    """

    sampled: Sampled | None = None
    prompt_lp: list[float] = []
    prompt_top: list[list[tuple[int, float]]] = []
    routing_ids: bytes = b""
    routing_weights: bytes = b""
    nonfinite: str | None = None
    fault: str | None = None

    @property
    def is_bad(self) -> bool:
        return self.nonfinite is not None or self.fault is not None

    @property
    def is_plain(self) -> bool:
        """Whether it is one drawn token, nothing more and nothing else."""
        sampled = self.sampled
        if sampled is None or self.is_bad or self.prompt_lp or self.prompt_top or self.routing_ids:
            return False
        return (sampled.lp_raw, sampled.entropy, sampled.kept_ids, sampled.top) == (None,) * 4


class Draws(Struct, kw_only=True):
    """Drawn tokens of many rows as parallel lists: what `Sampled` always has."""

    token_ids: list[int]
    lp_sampled: list[float]
    lp_temp: list[float]
    kept_mass: list[float]
    flags: list[int]

    @property
    def lengths(self) -> set[int]:
        """Of the lists: one, if they are parallel."""
        columns = (self.token_ids, self.lp_sampled, self.lp_temp, self.kept_mass, self.flags)
        return {len(column) for column in columns}

    def sampled(self, index: int) -> Sampled:
        """Entry `index` by itself."""
        return Sampled(
            token_id=self.token_ids[index],
            lp_sampled=self.lp_sampled[index],
            lp_temp=self.lp_temp[index],
            kept_mass=self.kept_mass[index],
            flags=self.flags[index],
        )


class StepResult(Struct, kw_only=True):
    """Rows' outcomes under one policy version.

    draws   one entry per row of the plan; that of a row in `rows` means nothing
    rows    index of the row → its outcome, for all that is not one drawn token and no more
    """

    version: int
    digest: str
    draws: Draws
    rows: dict[int, RowResult] = {}

    @classmethod
    def of(cls, version: int, digest: str, outcomes: Sequence[RowResult]) -> Self:
        """From one outcome per row."""
        draws = Draws(token_ids=[], lp_sampled=[], lp_temp=[], kept_mass=[], flags=[])
        rows = {}
        for index, outcome in enumerate(outcomes):
            if not outcome.is_plain:
                rows[index] = outcome
            sampled = outcome.sampled or NO_DRAW
            draws.token_ids.append(sampled.token_id)
            draws.lp_sampled.append(sampled.lp_sampled)
            draws.lp_temp.append(sampled.lp_temp)
            draws.kept_mass.append(sampled.kept_mass)
            draws.flags.append(sampled.flags)
        return cls(version=version, digest=digest, draws=draws, rows=rows)

    def outcome(self, index: int) -> RowResult:
        """What became of one row."""
        return self.rows.get(index) or RowResult(sampled=self.draws.sampled(index))


class Runner(Protocol):
    """What the core's loop needs of a model runner (engine/model/runner.py; FakeRunner in tests)."""

    def run(self, plan: StepPlan) -> StepResult:
        """Carry out a plan. Bits of a row depend on that row alone (DESIGN.md §3)."""
        ...
