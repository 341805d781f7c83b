"""What a journal is told, what it answers, and what any journal must do.

`Journal` (SQLite) and `MemoryJournal` are two stores of one protocol; the hypothesis machine in
tests/engine/journal compares them. What is given to a store belongs to it: the caller writes none
of it until the commit is done.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from msgspec import Struct

from ..errors import IllegalState
from ..rollout import Rollout, RolloutState, Segment


class Origin(Struct, frozen=True):
    """Under what tokens were made: a `Segment` without its start."""

    version: int
    digest: str
    numerics: str
    core: str
    kv: str = "computed"

    def segment(self, start: int) -> Segment:
        return Segment(start, self.version, self.digest, self.numerics, self.core, self.kv)


class RequestKey(Struct, frozen=True):
    """An Idempotency-Key in its scope: the holder of an API key, and the route.

    holder       hash of the API key, or ""
    body_digest  of the request it was first used with
    """

    holder: str
    route: str
    key: str
    body_digest: str
    created_s: float = 0.0

    @property
    def name(self) -> tuple[str, str, str]:
        """What it is found by: the key in its scope."""
        return self.holder, self.route, self.key

    @property
    def is_all_that_reads(self) -> bool:
        """Whether its rollouts are read by sending the key again, as those of /v1 are: nobody
        acknowledges them, so they are let go with the key."""
        return self.route.startswith("/v1/")


class Extra(Struct, kw_only=True, omit_defaults=True):
    """What only some rollouts record; as in `messages.RolloutTokens`, and only what is new.

    Lists per output token are aligned with `Grown.ids`; prompt_lp and prompt_top begin at position
    prompt_start of the prompt; routing continues where the rollout's routing ends.
    """

    lp_raw: list[float] = []
    entropy: list[float] = []
    kept_ids: list[list[int]] = []
    top: list[list[tuple[int, float]]] = []
    prompt_start: int = 0
    prompt_lp: list[float | None] = []
    prompt_top: list[list[tuple[int, float]]] = []
    routing_ids: bytes = b""
    routing_weights: bytes = b""


class Grown(Struct, kw_only=True):
    """New tokens of one rollout, aligned lists; `start` = how many output tokens it had before."""

    rollout_id: str
    start: int
    ids: list[int] = []
    lp_sampled: list[float] = []
    lp_temp: list[float] = []
    kept_mass: list[float] = []
    flags: list[int] = []
    extra: Extra | None = None
    num_cached_tokens: int | None = None


class Accept(Struct, tag="accept"):
    """New rollouts; forks and imports too, which come with tokens and may have ended.

    number  of the submission, as its seeds were derived from; `Recovered.num_accepted` is the
            largest ever, so that no seed repeats after a restart
    """

    rollouts: list[Rollout]
    key: RequestKey | None = None
    number: int = 0


class Append(Struct, tag="append"):
    """The new tokens of one step. time_s: when (0 = unknown); gives `first_token_s`."""

    origin: Origin
    grown: list[Grown]
    time_s: float = 0.0


class End(Struct, tag="end"):
    """The final rollout, whole: it replaces what was appended."""

    rollout: Rollout


class Pause(Struct, tag="pause"):
    """None: all, and whatever is accepted until `Resume(None)`. Ended ones are left alone."""

    rollout_ids: list[str] | None = None


class Resume(Struct, tag="resume"):
    """None: all. Ended ones are left alone."""

    rollout_ids: list[str] | None = None


class Ack(Struct, tag="ack"):
    """Their reader has them. What was acknowledged or forgotten before is left as it is."""

    rollout_ids: list[str]


class BudgetState(StrEnum):
    """spent: as many tokens were used as it had; closed: ended before."""

    OPEN = "open"
    SPENT = "spent"
    CLOSED = "closed"


class Budget(Struct, kw_only=True):
    """Output tokens that a pool may grow by, as stored and as shown.

    A pool is metered from its first budget on, for ever: it grows under an open one only, and has
    at most one of these. used: tokens of it that are journaled since the budget was opened. places:
    rollouts of the pool that may run at once (None: any number).
    """

    id: str
    pool: str
    tokens: int
    used: int = 0
    state: BudgetState = BudgetState.OPEN
    created_s: float = 0.0
    """Unix time, as `ended_s`."""
    ended_s: float | None = None
    places: int | None = None


class OpenBudget(Struct, tag="open_budget"):
    """From here on new tokens of its pool are counted; it ends by itself when it is used up."""

    budget: Budget
    key: RequestKey | None = None


class CloseBudget(Struct, tag="close_budget"):
    """It ends here. One that has ended is left as it is."""

    budget_id: str


class Flip(Struct, tag="flip", frozen=True):
    """From here on these weights are current.

    folder   where they can be read again
    parent   digest of those that they were trained on from; "": unknown
    lineage  which run of numbers the version belongs to
    base     the model that the server was started with: started with another, it is not to come
             back with these weights
    """

    version: int
    digest: str
    folder: str = ""
    parent: str = ""
    lineage: str = ""
    base: str = ""


Op = Accept | Append | End | Pause | Resume | Ack | OpenBudget | CloseBudget | Flip
# what is refused where there is no room; all else was promised, and is kept until there is some
NEW = Accept | OpenBudget


class Summary(Struct, kw_only=True):
    """A rollout in a list. `state` is the journal's: a live one is queued or paused."""

    number: int
    """Order of acceptance, from 1."""
    id: str
    group_id: str
    index: int
    pool: str
    state: RolloutState
    created_s: float
    ended_s: float | None
    num_output_tokens: int
    is_acked: bool


class Query(Struct, kw_only=True, frozen=True):
    """Which rollouts, in order of acceptance; None: any."""

    state: RolloutState | None = None
    group_id: str | None = None
    pool: str | None = None
    after: int = 0
    """Only numbers above it: `number` of the last summary of the page before."""
    limit: int = 100


class Recovered(Struct, kw_only=True):
    """What a journal knows when it is opened.

    live          in order of acceptance, tokens and segments in place, text empty (the manager
                  rebuilds it), state QUEUED or PAUSED
    num_accepted  the largest number of a submission, or how many there were if that is more
    flips         all of them, in order; of a journal begun before they were kept, the later ones
    budgets       in order of opening; those that ended long ago are gone, but the newest of a pool
    """

    live: list[Rollout]
    is_all_paused: bool
    keys: list[tuple[RequestKey, list[str]]]
    flip: tuple[int, str] | None
    num_accepted: int
    flips: list[Flip] = []
    budgets: list[Budget] = []


class JournalStore(Protocol):
    """What every journal does. One thread uses it.

    commit     all or nothing, durable at return as its level says. Raises JournalFull (may be
               retried), Conflict, IllegalState and InvalidTrajectory (the ops contradict what
               is there, or cannot be written): nothing of the call is written, and it goes on. Any other
               JournalError poisons: every later call raises it.
    read       live or ended, whole; None for what is unknown or acknowledged
    summary    acknowledged ones too, for `retain_acked_s`
    compact    forgets what was acknowledged long ago, expired keys and budgets as old, gives back free space;
               does a part of it, and True says that more is left; acknowledges what has ended
               under an expired key `is_all_that_reads`, and keeps such a key while one of its
               rollouts is live
    check      what is wrong with it, one line each; [] is good
    """

    @property
    def num_bytes(self) -> int:
        """Of what is kept; space that is free to be used again does not count."""

    @property
    def num_rollouts(self) -> int:
        """Live, or ended and not yet acknowledged."""

    def recover(self) -> Recovered: ...

    def check(self) -> list[str]: ...

    def commit(self, ops: Sequence[Op]) -> None: ...

    def read(self, rollout_id: str) -> Rollout | None: ...

    def summary(self, rollout_id: str) -> Summary | None: ...

    def list(self, query: Query) -> list[Summary]: ...

    def compact(self) -> bool: ...

    def close(self) -> None: ...


def grow(rollout: Rollout, origin: Origin, grown: Grown, time_s: float = 0.0) -> None:
    """Append what is new; a segment opens where the origin changes.

    Raises IllegalState unless the new tokens begin where the rollout ends.
    """
    if grown.start != len(rollout.output_ids):
        raise IllegalState(
            f"rollout {rollout.id}: tokens from {grown.start} on do not follow the "
            f"{len(rollout.output_ids)} that it has"
        )
    if grown.num_cached_tokens is not None:
        rollout.num_cached_tokens = grown.num_cached_tokens
    if grown.ids:
        segments = rollout.segments
        if not segments or origin.segment(segments[-1].start) != segments[-1]:
            segments.append(origin.segment(grown.start))
        if rollout.first_token_s is None and time_s:
            rollout.first_token_s = time_s
    rollout.output_ids += grown.ids
    rollout.lp_sampled += grown.lp_sampled
    rollout.lp_temp += grown.lp_temp
    rollout.kept_mass += grown.kept_mass
    rollout.flags += grown.flags
    rollout.versions += [origin.version] * len(grown.ids)
    if grown.extra is not None:
        _grow_extra(rollout, grown.extra)


def _grow_extra(rollout: Rollout, extra: Extra) -> None:
    rollout.lp_raw += extra.lp_raw
    rollout.entropy += extra.entropy
    rollout.kept_ids += extra.kept_ids
    rollout.top += extra.top
    if extra.prompt_lp:
        skip = len(rollout.prompt_lp) - extra.prompt_start
        if skip < 0:
            raise IllegalState(
                f"rollout {rollout.id}: prompt logprobs from {extra.prompt_start} on do not "
                f"follow the {len(rollout.prompt_lp)} that it has"
            )
        rollout.prompt_lp += extra.prompt_lp[skip:]
        rollout.prompt_top += extra.prompt_top[skip:]
    rollout.routing_ids += extra.routing_ids
    rollout.routing_weights += extra.routing_weights
