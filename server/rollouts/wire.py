"""The wire structs of /rollouts (docs/reference/rollouts-api.md).

As JSON, and as msgpack where that is asked for; only a rollout itself is another struct there
(`engine.trajectory.Trajectory`, whose columns are binary). This protocol is ours, so a field that
is not known is refused and the nearest known one is named.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from ...engine.errors import InvalidRequest
from ...engine.journal.ops import Budget
from ...engine.rollout import (
    MAX_SAMPLES,
    FinishReason,
    Record,
    RolloutState,
    SamplingParams,
    Segment,
)
from ..openai.wire import Alternatives, ErrorBody, Message, Routing, SamplingFields, TokenId, Tool

# a name that a user gives: of a group, of a pool
Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")]
Pool = Annotated[str, Meta(max_length=128, pattern=r"^[\x21-\x7e]*$")]
Ids = Annotated[list[str], Meta(min_length=1, max_length=65536)]
PairList = list[list[tuple[int, float]]]


class Sampling(SamplingFields, frozen=True, kw_only=True):
    """How to draw, in the names of the OpenAI face."""

    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """Default: up to the end of the context."""
    top_logprobs: Alternatives = 0
    """Alternatives per output token; which distribution they show: `logprobs_mode`."""


class SubmitRequest(Struct, frozen=True, kw_only=True):
    """POST /rollouts. Exactly one of prompt_ids, prompt and messages."""

    model: str | None = None
    """A served name; only checked."""
    prompt_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    """Token ids, as they are."""
    prompt: str | None = None
    """Text, as it is."""
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    """A conversation, put in words by the checkpoint's template, as in chat."""
    tools: list[Tool] = []
    """Of messages, as in chat."""
    chat_template_kwargs: dict[str, Any] = {}
    """What else the template is told."""
    add_generation_prompt: bool | None = None
    """Default: unless the final message is continued."""
    continue_final_message: bool = False
    """Go on inside the last message."""
    add_special_tokens: bool | None = None
    """Default: yes for a prompt; no for messages, whose template has them."""
    samples: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 1
    """Rollouts of this prompt, each with noise of its own."""
    sampling: Sampling = Sampling()
    """How to draw."""
    record: list[Record] = []
    """What else to keep per token."""
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    """Larger runs first."""
    group_id: Name | None = None
    """Default: a new one."""
    pool: Pool = ""
    """Whose token budget it counts on."""
    attempt: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """Which try at this sample it is; comes back. With a seed of its own it is another sample."""
    user: Annotated[str, Meta(max_length=256)] | None = None
    """Whose share of the machine it counts on."""
    metadata: Any = None
    """Any JSON; comes back untouched."""


class Submitted(Struct, frozen=True, kw_only=True):
    """What was accepted: durable from this answer on."""

    group_id: str
    rollout_ids: list[str]
    """In sample order."""


class SubmitManyRequest(Struct, frozen=True, kw_only=True):
    """POST /rollouts/submit: what several POST /rollouts would say, each for itself."""

    submissions: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=65536)]
    """As `SubmitRequest`, each with an `idempotency_key` of its own, if it has one."""


class Outcome(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of one of several submissions: ids, or its error."""

    group_id: str | None = None
    rollout_ids: list[str] = []
    """In sample order."""
    is_replay: bool = False
    """They were there already, under the same key."""
    error: ErrorBody | None = None
    """As an answer of its own would say it; the others are accepted all the same."""


class SubmittedMany(Struct, frozen=True, kw_only=True):
    """In the order of the request."""

    data: list[Outcome]


class GetManyRequest(Struct, frozen=True, kw_only=True):
    """POST /rollouts/get: several as they are now; with `wait`, those that have ended, once one has,
    and at most 64 of them."""

    ids: Ids


class ForkRequest(Struct, frozen=True, kw_only=True):
    """POST /rollouts/{id}/fork: new rollouts that begin with the first `at` output tokens."""

    at: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    """How many output tokens to keep, at most as many as there are."""
    samples: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 1
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """Default: with one sample the source's noise, hence its very tokens; else new noise."""
    pool: Pool = ""
    """Whose token budget they count on; that of the source only where it is named."""


class Selection(Struct, frozen=True, kw_only=True):
    """POST /rollouts/{pause,resume,cancel,ack}. Exactly one of the three."""

    ids: Ids | None = None
    group: str | None = None
    """Its group_id."""
    all: bool | None = None
    """Of pause and resume: those that come later too."""


class Empty(Struct, frozen=True, kw_only=True):
    """A call that takes no field."""


class Done(Struct, frozen=True, kw_only=True):
    """Which rollouts a control call holds for."""

    rollout_ids: list[str]


class BudgetRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """POST /rollouts/budget: let the rollouts of a pool grow by so many output tokens in all."""

    pool: Name
    """From its first budget on, a pool grows under an open one only."""
    tokens: Annotated[int, Meta(ge=1, le=2**53)]
    places: Annotated[int, Meta(ge=1, le=2**53)] | None = None
    """How many of its rollouts run at once, the first that came; the others stand by, and the next
    of them takes a free place in the same step. Default: any number."""


class BudgetList(Struct, frozen=True, kw_only=True):
    """In order of opening. Of those that ended longer ago than `journal.retain_keys_s`, only the
    newest of each pool is there."""

    data: list[Budget]


class RolloutUsage(Struct, kw_only=True):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    """Prompt tokens that the prefix cache spared."""


class RolloutAnswer(Struct, kw_only=True):
    """A rollout as JSON. Lists from output_ids to flags have one length."""

    id: str
    group_id: str
    index: int = 0
    """Which sample of its group."""
    pool: str = ""
    state: RolloutState
    waits_for: Literal["resume", "budget", "disk", "weights"] | None = None
    """What one that is paused stands still for: the user, a budget of its pool, room for the
    journal, the weights that it goes on with."""
    finish_reason: FinishReason | None = None
    prompt_ids: list[int]
    output_ids: list[int] = []
    text: str = ""
    text_offset: int = 0
    """Characters of the decoded output_ids that text holds: it is cut at a stop string."""
    lp_sampled: list[float] = []
    """ln p under the distribution that was drawn from."""
    lp_temp: list[float] = []
    """Tempered, untruncated."""
    kept_mass: list[float] = []
    """Mass that top_k, top_p and min_p left: lp_sampled = lp_temp − ln kept_mass."""
    flags: list[int] = []
    """1 sampled, 2 forced, 4 truncated support, added up."""
    versions: list[tuple[int, int]] = []
    """Run-length: [policy version, number of tokens]."""
    segments: list[Segment] = []
    """Runs of tokens made under the same weights, KV policy, numerics and core."""
    seed: int
    attempt: int = 0
    forked_from: tuple[str, int] | None = None
    """[rollout, number of its output tokens that were kept]."""
    usage: RolloutUsage | UnsetType = UNSET
    metadata: Any = None
    sampling: SamplingParams
    max_tokens: int
    """As resolved: sampling.max_tokens, or what the context had room for."""
    priority: int = 0
    client: str = ""
    """`user` of the request."""
    num_preemptions: int = 0
    created_s: float = 0.0
    """Unix time, as the two below."""
    first_token_s: float | None = None
    ended_s: float | None = None

    lp_raw: list[float] | UnsetType = UNSET
    """T = 1, no processors."""
    entropy: list[float] | UnsetType = UNSET
    kept_ids: list[list[int]] | UnsetType = UNSET
    top: PairList | UnsetType = UNSET
    """[id, logprob] of the alternatives, best first."""
    prompt_lp: list[float | None] | UnsetType = UNSET
    """Of the prompt's tokens; nothing precedes the first, so it has none: null."""
    prompt_top: PairList | UnsetType = UNSET
    routing: Routing | UnsetType = UNSET

    vocab_size: int | UnsetType | None = UNSET
    """In an export: of the engine it comes from, which an importer compares."""
    tokenizer: str | UnsetType | None = UNSET
    """In an export: digest of that engine's tokenizer."""


class StreamEvent(Struct, kw_only=True):
    """One event of GET /rollouts/{id}/stream. Its `id:` line is `end`: send it as `after`, or as
    Last-Event-ID, and the stream goes on behind it."""

    start: int
    end: int
    """Output tokens [start, end)."""
    output_ids: list[int]
    lp_sampled: list[float]
    lp_temp: list[float]
    kept_mass: list[float]
    versions: list[tuple[int, int]]
    text: str
    """What became final with them."""
    state: RolloutState
    finish_reason: FinishReason | None = None
    """Of the last event, and only there."""


class RolloutSummary(Struct, kw_only=True):
    """A rollout in a list."""

    id: str
    group_id: str
    index: int
    pool: str
    state: RolloutState
    created_s: float
    ended_s: float | None
    num_output_tokens: int
    is_acked: bool


class RolloutsAnswer(Struct, kw_only=True):
    """Several rollouts; as msgpack, `data` holds a `Trajectory` for each."""

    data: list[RolloutAnswer]
    unknown: dict[str, str]
    """Id → why it is not here."""


class PackedRollouts(Struct, kw_only=True):
    """`RolloutsAnswer` as msgpack."""

    data: list[Raw]
    unknown: dict[str, str]


class RolloutList(Struct, kw_only=True):
    """A page, in order of acceptance; next_cursor null: the last one."""

    data: list[RolloutSummary]
    next_cursor: str | None


def prompt_field(request: Struct) -> str:
    """Which of the three says what to go on from; raises InvalidRequest unless one does."""
    names = ("prompt_ids", "prompt", "messages")
    given = [name for name in names if getattr(request, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"exactly one of {', '.join(names)} is required, got {' and '.join(given) or 'none'}",
            field=given[1] if given else "prompt",
        )
    return given[0]
