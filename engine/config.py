"""The engine's settings: one frozen tree. Limits live in the types; `Meta` text is the help.

Each class takes the smallest subtree it needs. A value that is worked out at start (number of
blocks, context) is a new object, `ResolvedKV`; the config is never written.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

# Torch's threads sleep while they wait for each other: beside one other busy process, threads that
# spin can share a core with the one they wait for, and a step then takes a second
# (benchmarks/RESULTS.md). Read by the OpenMP runtime when torch is loaded. The C++ library has
# threads of its own, which do both (kernels/cpu/pool.cpp).
PATIENCE = {"OMP_WAIT_POLICY": "PASSIVE"}

# the default; the rest of the steps' time is what running rollouts keep
STAGE_SHARE = 0.06

OnPause = Literal["keep", "park", "drop"]
Durability = Literal["process", "accepts", "power"]


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which weights, and in which numbers they are run."""

    path: Annotated[str, Meta(description="folder or hub id; 'default' is the embedded model")] = (
        "default"
    )
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Meta(description="compute dtype; auto = what the checkpoint is stored in"),
    ] = "auto"
    numerics: Annotated[
        Literal["exact", "w8a8"],
        Meta(description="exact: weights dequantised; w8a8: FP8 activations too, as GPUs run FP8"),
    ] = "exact"
    dequantize: Annotated[
        Literal["use", "load"],
        Meta(description="FP8 weights: expand block by block at use, or once at load"),
    ] = "use"
    max_model_len: (
        Annotated[int, Meta(ge=2, description="context in tokens; default: the model's own")] | None
    ) = None
    rope_tables: Annotated[
        Literal["float32", "model"],
        Meta(description="model: rotary tables in the model dtype, for comparisons with HF"),
    ] = "float32"


class KVConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paged KV cache."""

    block_size: Annotated[int, Meta(ge=1, le=1024, description="tokens per KV block")] = 16
    num_blocks: (
        Annotated[int, Meta(ge=2, description="blocks; default: from memory_bytes")] | None
    ) = None
    memory_bytes: (
        Annotated[
            int,
            Meta(ge=1, description="KV memory; default: a fifth of what the weights leave free"),
        ]
        | None
    ) = None
    prefix_caching: Annotated[bool, Meta(description="reuse computed prefixes")] = True
    parking_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="host memory for the KV of paused and preempted rollouts; 0 = recompute",
        ),
    ] = 256 * 2**20
    on_pause: Annotated[
        OnPause,
        Meta(
            description="KV of a paused rollout: keep until memory is short, park in host memory "
            "at once (drop where that is full), or drop at once and recompute"
        ),
    ] = "keep"


class BatchConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much runs at once."""

    max_num_seqs: Annotated[int, Meta(ge=1, description="rollouts running at once")] = 128
    max_num_batched_tokens: Annotated[int, Meta(ge=1, description="tokens per step")] = 512
    max_queue: Annotated[int, Meta(ge=1, description="rollouts waiting; beyond it: 429")] = 65536


class JournalConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file in which durable rollouts outlive the process (docs/explain/journal.md)."""

    path: (
        Annotated[
            str, Meta(min_length=1, description="the file; off: none; default: one for each port")
        ]
        | None
    ) = None
    durability: Annotated[
        Durability,
        Meta(
            description="what also survives power loss; process: nothing promised, accepts: all "
            "but the newest tokens, power: everything; kill -9 loses nothing at any level"
        ),
    ] = "accepts"
    max_bytes: Annotated[
        int, Meta(ge=2**20, description="size beyond which no new rollout is accepted")
    ] = 16 * 2**30
    retain_acked_s: Annotated[
        float, Meta(ge=0, description="how long the name of an acknowledged rollout is kept")
    ] = 3600.0
    retain_keys_s: Annotated[
        float, Meta(ge=0, description="how long an Idempotency-Key is remembered")
    ] = 86400.0
    other_weights: Annotated[
        Literal["refuse", "continue"],
        Meta(description="when live rollouts were begun with other weights than the model has"),
    ] = "refuse"


class RestartConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is done about a core that dies. Its rollouts wait, and go on from the tokens they have."""

    attempts: (
        Annotated[
            int,
            Meta(ge=0, description="deaths in a row, without a token in between, that are mended"),
        ]
        | None
    ) = 10
    """None: for ever."""
    first_delay_s: Annotated[
        float, Meta(gt=0, description="wait before the first start; four times as long each time")
    ] = 0.1
    max_delay_s: Annotated[float, Meta(gt=0, description="longest wait before a start")] = 30.0


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a core needs."""

    model: ModelConfig = ModelConfig()
    kv: KVConfig = KVConfig()
    batch: BatchConfig = BatchConfig()
    num_threads: (
        Annotated[int, Meta(ge=1, description="compute threads; default: free cores")] | None
    ) = None
    stage_share: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="time for the next weights in the background, as a share of that of steps",
        ),
    ] = STAGE_SHARE
    seed: (
        Annotated[int, Meta(description="run seed: rollouts without a seed derive theirs from it")]
        | None
    ) = None


class ResolvedKV(Struct, frozen=True, kw_only=True):
    """What the KV cache came to: worked out once, when the core starts."""

    block_size: int
    num_blocks: int
    max_model_len: int
    prefix_caching: bool
    num_parking_blocks: int
    on_pause: OnPause = "keep"
