"""What a manager and a core say to each other: two tagged unions, msgpack on the wire.

Manager → core: `ToCore`. Core → manager: `FromCore`. A core holds nothing that `Add` could not
give it again, so any rollout can be moved to another core by its prompt and output ids alone.
"""

from collections.abc import Iterator
from typing import Literal

import msgspec
from msgspec import Struct

from .core.plan import Draws
from .rollout import FinishReason, KVState, SamplingParams

PROTOCOL_VERSION = 3

KVPolicy = Literal["keep", "recompute", "recompute-prompt"]
Priority = Literal["background", "full"]


class Add(Struct, tag="add", kw_only=True):
    """Generate, or continue to generate, one rollout.

    prompt_ids     the prompt
    output_ids     tokens that it already has (a resumed or moved rollout); penalties, min_tokens,
                   the seed position and the remaining budget follow from their number
    seed           key of the counter-based draw; output token t uses counter t
    stop_ids       ids that end it: the end-of-sequence ids (unless ignore_eos) and stop_token_ids
    banned_ids     ids that min_tokens bans until it is reached (a superset of stop_ids)
    max_tokens     output tokens in all, those in output_ids included
    pool           whose output tokens a `Meter` may limit; "": nobody's
    start_paused   keep it paused until a Resume
    """

    rollout_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    seed: int
    max_tokens: int
    output_ids: list[int] = []
    stop_ids: list[int] = []
    banned_ids: list[int] = []
    priority: int = 0
    client: str = ""
    pool: str = ""
    start_paused: bool = False


class Cancel(Struct, tag="cancel"):
    """End these rollouts and free what they hold at once. Unknown ids are ignored."""

    rollout_ids: list[str]


class Pause(Struct, tag="pause"):
    """Stop scheduling these rollouts (None: all, and whatever is added until Resume)."""

    rollout_ids: list[str] | None = None


class Resume(Struct, tag="resume"):
    """Schedule them again (None: all)."""

    rollout_ids: list[str] | None = None


class Meter(Struct, tag="meter"):
    """At most `limit` output tokens of a pool are sampled in this core (None: any number), counted
    as in its answer, `Metered`, until another one says more or less; and at most `places` of its
    rollouts run at once (None: any number).

    Rollouts for which there is no room stand as paused ones do. Pool "" has no meter.
    """

    pool: str
    limit: int | None
    places: int | None = None


class Shutdown(Struct, tag="shutdown"):
    """Finish the step in hand and end the core."""


class Stage(Struct, tag="stage"):
    """Load a version beside the one that serves, check it, and hold it ready.

    path      a checkpoint folder with its manifest
    digest    what it must be, where the folder has no manifest (the model that was served first)
    priority  beside steps of generation
              background: gets a stated share of the time that they take (engine.stage_share)
              full: as much between every two of them as may hold up one (`swap.FULL_SLICE_S`)
              While nothing is generated there is no difference.

    Answered with `Staging` now and then, then `Staged` or `Refused`. What was staged before, or is
    being staged, is given up first.
    """

    version: int
    path: str
    digest: str = ""
    priority: Priority = "background"


class Flip(Struct, tag="flip"):
    """Serve the staged version from the next step on; answered with `Flipped` or `Refused`.

    kv  what becomes of the KV of live rollouts:
        keep              it stays as it is, and the rollout goes on over it
        recompute         dropped, and computed again from the tokens
        recompute-prompt  positions of the prompt are computed again, those of the output stay
        KV that was not complete (a prompt half computed) is begun again under every policy.
    """

    version: int
    digest: str
    kv: KVPolicy = "keep"


class Unstage(Struct, tag="unstage"):
    """Give up what is staged under this number, or is being staged."""

    version: int


ToCore = Add | Cancel | Pause | Resume | Meter | Stage | Flip | Unstage | Shutdown


class Loading(Struct, tag="loading"):
    """Progress of the start: stage is one of resolve, read, check, warm-up."""

    stage: str
    done: int
    total: int
    detail: str = ""


class Ready(Struct, tag="ready", kw_only=True):
    """The core has weights and takes work."""

    core_id: str
    protocol: int = PROTOCOL_VERSION
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    version: int
    digest: str
    path: str = ""
    """Folder that the weights were read from."""
    numerics: str
    """Device class, kernel level, dtypes: equal ids promise equal bits (DESIGN.md §3)."""
    eos_ids: list[int] = []
    """From the checkpoint's configs; a tokenizer may add its own."""
    num_moe_layers: int
    num_experts: int
    num_experts_per_tok: int
    kernels: dict[str, str] = {}
    """Operation → what was picked and why, for `doctor`."""

    @property
    def routing_id_bytes(self) -> int:
        """Of one expert id in recorded routing: uint8, or uint16 beyond 256 experts."""
        return 1 if self.num_experts <= 256 else 2

    @property
    def routing_widths(self) -> tuple[int, int]:
        """Bytes of a position's expert ids, and of their float32 weights."""
        choices = self.num_moe_layers * self.num_experts_per_tok
        return choices * self.routing_id_bytes, choices * 4


class RolloutTokens(Struct, kw_only=True, omit_defaults=True):
    """New output tokens of one rollout, aligned lists; `start` is the index of the first.

    Optional lists are empty unless the sampling parameters ask for them.
    `routing_start` is the position (in prompt + output) of the first routed row in this message.
    """

    rollout_id: str
    start: int
    ids: list[int] = []
    lp_sampled: list[float] = []
    lp_temp: list[float] = []
    kept_mass: list[float] = []
    flags: list[int] = []
    lp_raw: list[float] = []
    entropy: list[float] = []
    kept_ids: list[list[int]] = []
    top: list[list[tuple[int, float]]] = []
    prompt_start: int = 0
    """Position of the first prompt logprob in this message."""
    prompt_lp: list[float | None] = []
    prompt_top: list[list[tuple[int, float]]] = []
    routing_start: int = 0
    routing_ids: bytes = b""
    routing_weights: bytes = b""
    num_cached_tokens: int | None = None
    """Prompt tokens that a prefix hit spared; sent once, when it is first admitted."""
    finish: FinishReason | None = None


class PlainTokens(Struct):
    """One new output token each, of rollouts with no other news: parallel lists.

    `starts` are indexes of the tokens in the output, as `RolloutTokens.start`.
    """

    rollout_ids: list[str]
    starts: list[int]
    draws: Draws

    def rows(self) -> "Iterator[PlainToken]":
        """(rollout id, start, token id, lp_sampled, lp_temp, kept_mass, flags) of each."""
        draws = self.draws
        return zip(
            self.rollout_ids,
            self.starts,
            draws.token_ids,
            draws.lp_sampled,
            draws.lp_temp,
            draws.kept_mass,
            draws.flags,
            strict=True,
        )

    def __iter__(self) -> Iterator[RolloutTokens]:
        return (tokens_of(row) for row in self.rows())


PlainToken = tuple[str, int, int, float, float, float, int]


def tokens_of(row: PlainToken) -> RolloutTokens:
    """The same news in the words of all news."""
    rollout_id, start, token_id, lp_sampled, lp_temp, kept_mass, flags = row
    return RolloutTokens(
        rollout_id=rollout_id,
        start=start,
        ids=[token_id],
        lp_sampled=[lp_sampled],
        lp_temp=[lp_temp],
        kept_mass=[kept_mass],
        flags=[flags],
    )


class Tokens(Struct, tag="tokens"):
    """The outcome of one step, under one policy version. No rollout is in it twice.

    `drawn`: of metered pools that drew in it, all that they drew so far (see `Meter`).
    """

    version: int
    digest: str
    rollouts: list[RolloutTokens] = []
    plain: PlainTokens | None = None
    drawn: dict[str, int] = {}

    def each(self) -> Iterator[RolloutTokens]:
        """The news rollout by rollout."""
        yield from self.rollouts
        if self.plain is not None:
            yield from self.plain


class StateChanged(Struct, tag="state"):
    """The scheduler moved rollouts: (id, new state) in order."""

    moves: list[tuple[str, Literal["running", "preempted", "paused", "queued"]]]


class Metered(Struct, tag="metered"):
    """A `Meter` holds now; so far the pool drew `drawn` tokens, and all of them have been told."""

    pool: str
    drawn: int


class Rejected(Struct, tag="rejected"):
    """An Add that this core cannot run (too long for its KV, say)."""

    rollout_id: str
    message: str


class Stats(Struct, tag="stats", kw_only=True):
    """The core's counters; gauges are of this moment, `*_total` since the start."""

    num_running: int
    num_waiting: int
    num_paused: int
    num_blocks_used: int
    num_blocks: int
    steps_total: int
    prompt_tokens_total: int
    generation_tokens_total: int
    prefix_queries_total: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits_total: int
    preemptions_total: int
    kv_resume_total: dict[str, int] = {}
    """kind (kept, host, recomputed) → resumptions."""
    step_seconds_total: float = 0.0


class Staging(Struct, tag="staging"):
    """Progress of a `Stage`: part is one of layout, digests, read, canaries."""

    version: int
    part: str
    done: int
    total: int


class StageReport(Struct, frozen=True, kw_only=True):
    """What it took to stage a version, and what its canaries said.

    num_bytes        of its tensors as they are stored
    seconds          from the message to ready; busy_seconds: of those, taken from the step loop
    parts            busy seconds by part: layout, digests, read, canaries
    slices           between two steps, that this was done in; longest_slice_s: how long one held up
                     a step
    canary_tokens    scored; 0: the manifest has no canaries
    max_delta, mean_delta  of |lp − the trainer's|; bound: what they had to stay below
    experts_reached  share of all routed experts that a canary was sent to; None: there are none
    """

    num_bytes: int
    seconds: float
    busy_seconds: float
    slices: int
    longest_slice_s: float
    parts: dict[str, float] = {}
    canary_tokens: int = 0
    max_delta: float = 0.0
    mean_delta: float = 0.0
    max_bound: float = 0.0
    mean_bound: float = 0.0
    experts_reached: float | None = None


class Staged(Struct, tag="staged"):
    """The version is checked, in memory, and can be flipped to."""

    version: int
    digest: str
    report: StageReport


class Refused(Struct, tag="refused"):
    """A `Stage` or `Flip` that cannot be; what serves goes on serving. See `WeightsRefused`."""

    version: int
    message: str
    tensor: str | None = None
    layer: int | None = None
    what: Literal["stage", "flip"] = "stage"


class Flipped(Struct, tag="flipped", kw_only=True):
    """Tokens are of this version from here on; the last message before the first of them.

    stall_s         end of the last step under the old weights to start of the first under the new;
                    0 where nothing ran
    flip_s          of that, what the flip itself took
    steps_lost      stall_s in steps, as long as those before it
    kept_rollouts   go on over KV of older weights
    dropped_tokens  of KV that is to be computed again
    """

    version: int
    digest: str
    kv: KVPolicy
    stall_s: float
    flip_s: float
    steps_lost: float
    kept_rollouts: int
    dropped_tokens: int


class KVChanged(Struct, tag="kv"):
    """Over what KV these rollouts draw from here on: (id, `Segment.kv`) in order."""

    moves: list[tuple[str, KVState]]


class Died(Struct, tag="died"):
    """The last message of a core that cannot go on; made up by the backend when it just vanished.

    `code` is the code of the error in engine/errors.py: a start that failed for the user's own
    fault keeps its kind.
    """

    message: str
    code: str = "service_unavailable"


FromCore = (
    Loading
    | Ready
    | Tokens
    | StateChanged
    | Metered
    | Rejected
    | Stats
    | Staging
    | Staged
    | Refused
    | Flipped
    | KVChanged
    | Died
)

encode = msgspec.msgpack.Encoder().encode
decode_to_core = msgspec.msgpack.Decoder(list[ToCore]).decode
decode_from_core = msgspec.msgpack.Decoder(list[FromCore]).decode
