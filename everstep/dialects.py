"""The words that vLLM's and SGLang's users know, as tables.

SYNONYMS   other names of a setting
RESPELLED  values of a setting that the other dialects spell otherwise
SWITCHES   flags without a value that set one
FOREIGN    flags that set nothing here: always true, not needed, or refused with the reason
"""

from msgspec import Struct

SYNONYMS: dict[str, tuple[str, ...]] = {
    "engine.model.path": ("--model", "--model-path"),
    "engine.model.dtype": ("--dtype",),
    "engine.model.numerics": ("--numerics",),
    "engine.model.max_model_len": ("--max-model-len", "--context-length"),
    "engine.kv.block_size": ("--block-size", "--page-size"),
    "engine.kv.num_blocks": ("--num-gpu-blocks-override",),
    "engine.kv.memory_bytes": ("--kv-cache-memory-bytes",),
    "engine.batch.max_num_seqs": ("--max-num-seqs", "--max-running-requests"),
    "engine.batch.max_num_batched_tokens": ("--max-num-batched-tokens", "--chunked-prefill-size"),
    "engine.batch.max_queue": ("--max-queued-requests",),
    "engine.num_threads": ("--num-threads",),
    "engine.seed": ("--seed", "--random-seed"),
    "http.host": ("--host",),
    "http.port": ("--port",),
    "http.api_key": ("--api-key",),
    "http.allowed_origins": ("--allowed-origins",),
    "http.admin_key": ("--admin-key", "--admin-api-key"),
    "openai.served_model_name": ("--served-model-name",),
    "openai.logprobs_mode": ("--logprobs-mode",),
    "openai.chat_template": ("--chat-template",),
    "journal.path": ("--journal",),
    "journal.durability": ("--durability",),
    "journal.max_bytes": ("--journal-max-bytes",),
}

RESPELLED = {
    ("engine.model.dtype", "float"): "float32",
    ("engine.model.dtype", "bf16"): "bfloat16",
    ("engine.model.max_model_len", "auto"): "none",
    ("engine.model.max_model_len", "-1"): "none",
    ("openai.logprobs_mode", "raw_logprobs"): "raw",
    ("openai.logprobs_mode", "processed_logprobs"): "sampled",
}


class Switch(Struct, frozen=True):
    """A flag without a value: sets `path` to `value`. Without a help text it is not shown."""

    name: str
    path: str
    value: str
    help: str = ""


SWITCHES = (
    Switch("--enable-prefix-caching", "engine.kv.prefix_caching", "true"),
    Switch(
        "--no-enable-prefix-caching",
        "engine.kv.prefix_caching",
        "false",
        "compute every prompt anew",
    ),
    Switch("--disable-radix-cache", "engine.kv.prefix_caching", "false"),
    Switch(
        "--skip-tokenizer-init",
        "skip_tokenizer_init",
        "true",
        "token ids in and out only; no tokenizer is loaded",
    ),
)


class Foreign(Struct, frozen=True):
    """A flag of another engine that sets nothing here.

    accepts  values that are honoured, with `note` said once (None: any); another is refused
             with `reason`. A flag without a value has `takes_value` False; one that is never
             honoured accepts ().
    """

    names: tuple[str, ...]
    note: str = ""
    takes_value: bool = True
    accepts: tuple[str, ...] | None = None
    reason: str = ""


_ONE = "one process computes the model; start more servers for more throughput"
FOREIGN = (
    Foreign(
        ("--gpu-memory-utilization", "--mem-fraction-static"),
        "there is no GPU memory to divide; engine.kv.memory-bytes sizes the KV cache",
    ),
    Foreign(("--enable-deterministic-inference",), "always so here", takes_value=False),
    Foreign(
        ("--enable-return-routed-experts",),
        'per request here: ask with record=["routing"]',
        takes_value=False,
    ),
    Foreign(
        ("--scheduling-policy", "--schedule-policy"),
        "requests' priorities are always honoured",
        accepts=("priority", "fcfs", "lpm"),
        reason="one policy: priority first, then fair shares in order of arrival",
    ),
    Foreign(
        ("--enable-priority-scheduling",),
        "requests' priorities are always honoured",
        takes_value=False,
    ),
    Foreign(
        ("--kv-cache-dtype",),
        accepts=("auto",),
        reason="the KV cache is kept in the compute dtype (engine.model.dtype)",
    ),
    Foreign(
        ("--quantization",),
        "weights are run as the checkpoint stores them; a bf16 one is not quantised",
        accepts=("fp8", "compressed-tensors", "none"),
        reason="only FP8 checkpoints (block or compressed-tensors) are run, as their files say",
    ),
    Foreign(
        ("--trust-remote-code",),
        "not needed: no code of a model folder is ever run",
        takes_value=False,
    ),
    Foreign(("--tensor-parallel-size", "--tp", "--tp-size"), accepts=("1",), reason=_ONE),
    Foreign(("--pipeline-parallel-size", "--pp-size"), accepts=("1",), reason=_ONE),
    Foreign(("--data-parallel-size", "--dp", "--dp-size"), accepts=("1",), reason=_ONE),
    Foreign(("--device",), accepts=("auto", "cpu"), reason="this build computes on the CPU"),
    Foreign(
        ("--load-format",),
        accepts=("auto", "safetensors"),
        reason="model folders hold safetensors; `everstep convert` and make-checkpoint write them",
    ),
    Foreign(
        ("--enforce-eager", "--disable-cuda-graph"), "there are no CUDA graphs", takes_value=False
    ),
    Foreign(
        ("--enable-chunked-prefill",),
        "always so here, and the bits do not depend on it",
        takes_value=False,
    ),
    Foreign(
        ("--attention-backend", "--sampling-backend", "--moe-runner-backend"),
        "kernels are picked for the machine; `everstep doctor` shows which and why",
    ),
    Foreign(
        ("--reasoning-parser", "--tool-call-parser"),
        "found in the model's chat template; openai.reasoning overrides it",
    ),
    Foreign(("--enable-auto-tool-choice",), "always so here", takes_value=False),
    Foreign(
        ("--disable-log-requests", "--disable-log-stats", "--no-enable-log-requests"),
        "requests are not logged; one status line every 10 s when busy",
        takes_value=False,
    ),
    Foreign(
        ("--tokenizer", "--tokenizer-path"),
        accepts=(),
        reason="a model is served with the tokenizer.json in its folder",
    ),
    Foreign(
        ("--enable-sleep-mode", "--enable-memory-saver"),
        "there is no GPU memory to give back, and no call that would",
        takes_value=False,
    ),
    Foreign(
        ("--weight-version",),
        "a version is the number and digest of the weights; a name of yours is not kept",
    ),
)
