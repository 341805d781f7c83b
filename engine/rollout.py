"""The unit of everything: a rollout, its sampling parameters, its states.

An OpenAI choice, a batch line and an RL sample are each one `Rollout`. Only the
`RolloutManager` (engine/manager/manager.py) writes one; everybody else reads.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta, Struct

from .errors import ContextTooLong, InvalidRequest

Record = Literal["lp_raw", "entropy", "kept_ids", "routing"]
LogprobsMode = Literal["raw", "temp", "sampled"]

# the search for stop strings has a state per character, made while nothing else is answered
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 8192
MAX_SAMPLES = 1024
# below it logits ÷ temperature may overflow float32
MIN_TEMPERATURE = 1e-3

# per-token flags (`Rollout.flags`)
SAMPLED = 1
FORCED = 2
TRUNCATED_SUPPORT = 4


class RolloutState(StrEnum):
    """Where a rollout is in its life; `LEGAL` below says what may follow what."""

    QUEUED = "queued"
    RUNNING = "running"
    PREEMPTED = "preempted"
    PAUSED = "paused"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"

    @property
    def is_ended(self) -> bool:
        return self in ENDED


ENDED = frozenset({RolloutState.FINISHED, RolloutState.ABORTED, RolloutState.FAILED})
LIVE = frozenset(RolloutState) - ENDED

# the one table of legal transitions; an ended rollout never moves again
LEGAL: dict[RolloutState, frozenset[RolloutState]] = {
    RolloutState.QUEUED: frozenset({RolloutState.RUNNING, RolloutState.PAUSED}) | ENDED,
    RolloutState.RUNNING: frozenset(
        {RolloutState.PREEMPTED, RolloutState.PAUSED, RolloutState.QUEUED}
    )
    | ENDED,
    RolloutState.PREEMPTED: frozenset(
        {RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.QUEUED}
    )
    | ENDED,
    RolloutState.PAUSED: frozenset({RolloutState.QUEUED, RolloutState.RUNNING}) | ENDED,
    RolloutState.FINISHED: frozenset(),
    RolloutState.ABORTED: frozenset(),
    RolloutState.FAILED: frozenset(),
}


class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drawn. The order of operations is fixed (DESIGN.md §2):

    penalties and logit_bias, then ÷temperature and log-softmax (= `lp_temp`); then min_tokens'
    ban of stop ids, top_k, top_p, min_p cut the support; `lp_sampled` is renormalised over it.

    Raises InvalidRequest through `check()`, which every face calls once; msgspec checks
    the ranges below when a value comes from the wire.
    """

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = 0
    """0 and -1 mean: no limit."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] = 1.0
    """Over prompt and output, as Hugging Face and vLLM do; 1 means off."""
    logit_bias: dict[int, Annotated[float, Meta(ge=-100.0, le=100.0)]] = {}
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """None: derived for the rollout by `derive_seed`; with several samples each derives its own."""
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    """None: up to the end of the context."""
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Meta(ge=0, le=64)] | None = None
    """Number of alternatives per prompt token; 0 = the prompt's own tokens only."""
    top_logprobs: Annotated[int, Meta(ge=0, le=64)] = 0
    """Number of alternatives per output token."""
    logprobs_mode: LogprobsMode = "raw"
    """Which distribution the alternatives show: T = 1 without processors, tempered, or sampled from."""
    record: tuple[Record, ...] = ()

    def ending_ids(self, eos_ids: Iterable[int]) -> set[int]:
        """Ids that end a rollout, where `eos_ids` are the model's."""
        return {*self.stop_token_ids, *(() if self.ignore_eos else eos_ids)}

    def check(self, *, vocab_size: int) -> Self:
        """Return self, or raise InvalidRequest naming the field and the accepted values.

        Values built in Python (not decoded) are checked here too.
        """
        try:
            msgspec.convert(msgspec.to_builtins(self, str_keys=False), type(self))
        except msgspec.ValidationError as error:
            text = str(error)
            field = text.rsplit("`$.", 1)[-1].rstrip("`").split("[")[0] if "`$." in text else None
            raise InvalidRequest(text, field=field) from None
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if value != value:
                raise InvalidRequest(f"{name} must be a number, got nan", field=name)
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            raise InvalidRequest(
                f"temperature must be 0 (greedy) or from {MIN_TEMPERATURE} to 100, "
                f"got {self.temperature}",
                field="temperature",
            )
        for token in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"logit_bias: token id {token} is outside the vocabulary (0..{vocab_size - 1})",
                    field="logit_bias",
                )
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"stop_token_ids: token id {token} is outside the vocabulary "
                    f"(0..{vocab_size - 1})",
                    field="stop_token_ids",
                )
        if any(not text for text in self.stop):
            raise InvalidRequest("stop: an empty stop string matches everywhere", field="stop")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop: {len(self.stop)} strings, at most {MAX_STOP_STRINGS}", field="stop"
            )
        num_chars = sum(map(len, self.stop))
        if num_chars > MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop: {num_chars} characters in all, at most {MAX_STOP_CHARS}", field="stop"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
                field="min_tokens",
            )
        return self


class FinishReason(Struct, frozen=True, omit_defaults=True):
    """Why a rollout ended. `matched` is the stop token id or stop string."""

    type: Literal["stop", "length", "abort", "error"]
    matched: int | str | None = None
    detail: str | None = None
    """For `error`: `nonfinite: step 12, layer 3`, say."""


KVState = Literal["computed", "keep", "recompute-prompt"]


class Segment(Struct, frozen=True):
    """A run of output tokens made under the same weights, KV, numerics and core.

    kv  what the tokens were drawn over:
        computed          KV of these weights, all of it (whether it was ever of others or not)
        keep              positions before the segment keep the KV that they had before the flip
        recompute-prompt  as keep, but for the prompt, which is of these weights
    """

    start: int
    version: int
    digest: str
    numerics: str
    core: str
    kv: str = "computed"


class Rollout(Struct, kw_only=True):
    """One generation: what went in and, aligned with `output_ids`, what came out.

    Invariants (tested): the lists from `output_ids` to `versions` share one length;
    `text == decode(output_ids)[:text_offset]` and `text_offset == len(text)`.
    """

    id: str
    group_id: str
    index: int = 0
    prompt_ids: list[int]
    sampling: SamplingParams
    seed: int
    max_tokens: int
    """Resolved: never None, never beyond the context."""
    priority: int = 0
    """Larger runs first and preempts smaller."""
    client: str = ""
    """Whose share of the machine this is charged to (fair queueing)."""
    metadata: Any = None
    attempt: int = 0
    pool: str = ""
    """Whose token budget it grows on."""
    is_durable: bool = False
    """Journaled: readers see journaled tokens only, and it outlives the process."""
    forked_from: tuple[str, int] | None = None
    """(rollout, number of its output tokens that were kept)."""
    state: RolloutState = RolloutState.QUEUED
    finish_reason: FinishReason | None = None

    output_ids: list[int] = []
    lp_sampled: list[float] = []
    """ln of the probability under the distribution really sampled from."""
    lp_temp: list[float] = []
    """tempered, untruncated; at temperature 0 taken at T = 1."""
    kept_mass: list[float] = []
    flags: list[int] = []
    versions: list[int] = []

    lp_raw: list[float] = []
    """T = 1, no processors; filled when `record` asks or alternatives are of that kind."""
    entropy: list[float] = []
    kept_ids: list[list[int]] = []
    top: list[list[tuple[int, float]]] = []
    """Alternatives per output token, best first."""
    prompt_lp: list[float | None] = []
    """lp_raw of each prompt token given those before it; the first is None."""
    prompt_top: list[list[tuple[int, float]]] = []
    routing_ids: bytearray = msgspec.field(default_factory=bytearray)
    """[computed positions, MoE layers, K] of uint8 (uint16 beyond 256 experts), prompt first."""
    routing_weights: bytearray = msgspec.field(default_factory=bytearray)
    """float32, same shape and order as `routing_ids`."""

    text: str = ""
    text_offset: int = 0
    """Characters of decode(output_ids) that `text` holds (it is cut at a stop string)."""
    segments: list[Segment] = []
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    created_s: float = 0.0
    first_token_s: float | None = None
    ended_s: float | None = None

    def move(self, state: RolloutState) -> None:
        """Change state; raises ValueError where `LEGAL` has no such transition."""
        if state not in LEGAL[self.state]:
            raise ValueError(f"rollout {self.id}: {self.state} may not become {state}")
        self.state = state


class Found(Struct, frozen=True):
    """Of several that were asked for. unknown: id → why it is not here."""

    rollouts: Sequence[Rollout]
    unknown: Mapping[str, str] = {}


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from what identifies a rollout: run seed, prompt, epoch, sample, attempt.

    Two rollouts that differ in any part never share noise (DESIGN.md §2).
    """
    text = "\x1f".join(repr(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def check_prompt(prompt_ids: Sequence[int], *, vocab_size: int, max_model_len: int) -> None:
    """Raise InvalidRequest unless the prompt can run: not empty, known ids, room for one token."""
    if not prompt_ids:
        raise InvalidRequest("prompt is empty: give at least one token", field="prompt")
    if len(prompt_ids) >= max_model_len:
        raise ContextTooLong(
            f"prompt has {len(prompt_ids)} tokens; the context holds {max_model_len}, "
            f"so a prompt may have at most {max_model_len - 1}",
            field="prompt",
        )
    for position, token in enumerate(prompt_ids):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"prompt: token id {token!r} at position {position} is outside the vocabulary "
                f"(0..{vocab_size - 1})",
                field="prompt",
            )
