"""What the controller of C3PO++ is told, what it answers, and its state at rest."""

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from .config import C3poConfig
from .ledger import Books, LedgerState

STATE_FORMAT = 1

Ending = Literal["stop", "length", "abort", "error"]
"""`FinishReason.type`: the first two end a sample well."""
PurgeReason = Literal["age", "lag", "abandoned"]
Phase = Literal["idle", "open", "stopping", "training", "done"]
"""idle: between iterations; open: tokens come; stopping: the last ones come; training: `Train` is
out; done: nothing is left."""


class Sample(Struct, frozen=True, order=True, array_like=True):
    """The name of one rollout. A prompt's name is unique in a run: it holds the epoch."""

    prompt: str
    index: int
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.prompt}.{self.index}" + f"'{self.attempt}" * bool(self.attempt)


class Span(Struct, frozen=True, array_like=True):
    """A run of tokens sampled under one version of the weights.

    version  of the weights; where a trainer went back before it, the one that it went back to
    undone   updates that were undone between that one and the weights that sampled
    """

    count: int
    version: int
    undone: int = 0

    @property
    def standing(self) -> int:
        """The version that is as many updates away from what serves as these weights are."""
        return self.version - self.undone

    def back(self, version: int) -> "Span":
        """The same once a trainer has gone back to `version`."""
        steps = max(0, self.version - version)
        return Span(self.count, self.version - steps, self.undone + steps)

    def __str__(self) -> str:
        return f"{self.count}@{self.version}" + f"+{self.undone}" * bool(self.undone)


def oldest_of(spans: Iterable[Span]) -> int | None:
    """The least standing; None: there are no tokens."""
    return min((span.standing for span in spans), default=None)


def length_of(spans: list[Span] | tuple[Span, ...]) -> int:
    return sum(span.count for span in spans)


# events -----------------------------------------------------------------------------------------


class Extend(Struct, tag="extend", frozen=True):
    """More prompts, at the tail of the stream."""

    prompts: tuple[str, ...]


class EndStream(Struct, tag="end_stream", frozen=True):
    """No prompt will follow."""


class Begin(Struct, tag="begin", frozen=True):
    """An iteration begins."""


class Grew(Struct, tag="grew", frozen=True):
    """`count` more tokens of the sample are journaled, sampled under `version`."""

    sample: Sample
    count: int
    version: int


class Ended(Struct, tag="ended", frozen=True):
    """The sample ended with `length` tokens in all, every one of them told before."""

    sample: Sample
    reason: Ending
    length: int


class Lost(Struct, tag="lost", frozen=True):
    """The engine has never heard of it: what was sampled of it is gone."""

    sample: Sample


class Reject(Struct, tag="reject", frozen=True):
    """No engine can ever run the sample, nor its siblings: the prompt is too long, say."""

    sample: Sample
    reason: str


class Settled(Struct, tag="settled", frozen=True):
    """The budget is spent or closed, and all that happened under it has been told."""


class Trained(Struct, tag="trained", frozen=True):
    """The trainer has the groups of the last `Train`; weights of this version serve now."""

    version: int


class Turned(Struct, tag="turned", frozen=True):
    """The trainer went back to an earlier checkpoint: this version serves, in a new lineage.

    Told before the first token under it. What later versions sampled may still come after it.
    """

    version: int


Event = Extend | EndStream | Begin | Grew | Ended | Lost | Reject | Settled | Trained | Turned


# commands ---------------------------------------------------------------------------------------


class Open(Struct, tag="open", frozen=True):
    """Open a budget for the pool. tokens: None = as many as come until `Stop`."""

    iteration: int
    tokens: int | None


class Submit(Struct, tag="submit", frozen=True):
    """Send it to an engine. Idempotent: after a loss the same name is submitted again."""

    sample: Sample


class Purge(Struct, tag="purge", frozen=True):
    """Cancel it in its engine, where it may have ended; its tokens are never trained."""

    sample: Sample
    reason: PurgeReason


class Stop(Struct, tag="stop", frozen=True):
    """Close the budget; then tell what still came, and `Settled`."""

    iteration: int


class TrainSample(Struct, frozen=True):
    """A finished member of a group."""

    sample: Sample
    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        return length_of(self.spans)


class TrainGroup(Struct, frozen=True):
    """A complete group, members in order of their index."""

    prompt: str
    samples: tuple[TrainSample, ...]

    @property
    def num_tokens(self) -> int:
        return sum(sample.length for sample in self.samples)

    @property
    def oldest_version(self) -> int | None:
        """The least `Span.standing`; None if no member has a token."""
        return oldest_of(span for sample in self.samples for span in sample.spans)


class Train(Struct, tag="train", frozen=True):
    """Train on these, in the order in which they became complete; maybe none."""

    iteration: int
    groups: tuple[TrainGroup, ...]


class Abandoned(Struct, tag="abandoned", frozen=True):
    """The prompt will not be trained: `sample` came to nothing more often than is allowed."""

    prompt: str
    sample: Sample
    reason: str


class Done(Struct, tag="done", frozen=True):
    """Every prompt was delivered or abandoned, and no more will come."""


Command = Open | Submit | Purge | Stop | Train | Abandoned | Done


# state ------------------------------------------------------------------------------------------


class Waiting(Struct):
    """In the stream. losses: how often its tokens were lost."""

    sample: Sample
    losses: int = 0


class Live(Struct):
    """In the pool. retention: iterations that ended while it had tokens and had not ended."""

    sample: Sample
    spans: list[Span]
    length: int = 0
    """The tokens of all spans."""
    retention: int = 0
    losses: int = 0


class Held(Struct):
    """Ended well, waiting for its group."""

    sample: Sample
    spans: list[Span]
    losses: int = 0

    @property
    def length(self) -> int:
        return length_of(self.spans)


class C3poState(Struct, kw_only=True):
    """The controller at rest; encodes with msgspec. `format` is STATE_FORMAT of who wrote it.

    stream, pool   in order; hold: by prompt, in order of arrival, finished members by arrival
    complete       prompts whose group is complete, in order of completion
    leaving        given up in this iteration: their last tokens are counted where they went
    purges         of this iteration, which a restarted driver may have to carry out again
    turned         version that a trainer went back to, while nothing was trained since
    """

    format: int = STATE_FORMAT
    config: C3poConfig
    phase: Phase
    iteration: int
    version: int | None
    turned: int | None = None
    counted: int
    is_stream_ended: bool
    num_accepted: int
    num_abandoned: int
    stream: list[Waiting]
    pool: list[Live]
    hold: list[tuple[str, list[Held]]]
    complete: list[str]
    leaving: list[tuple[Sample, str]]
    purges: list[Purge]
    ledger: LedgerState
    last_books: Books | None = None
