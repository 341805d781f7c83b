"""The wire structs of /v1, as published (PROTOCOLS.md 11).

Ranges stand in the types; `server/decoding.py` turns a breach into a 400 that names the field and
gives the accepted values. A field that is UNSET is left out of a reply.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from ...engine.rollout import MAX_SAMPLES, LogprobsMode, Record

NonEmpty = Annotated[str, Meta(min_length=1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Alternatives = Annotated[int, Meta(ge=0, le=64)]


class StreamOptions(Struct, frozen=True, kw_only=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(Struct, frozen=True, kw_only=True):
    """How to draw tokens, in the names that every face of ours uses."""

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    """0: the most likely token."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """Keep the most likely tokens of this mass."""
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = 0
    """Keep so many of the most likely; 0 and -1: all."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Keep those of at least this fraction of the most likely one's probability."""
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] = 1.0
    """Over prompt and output; 1: off."""
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]] = {}
    """Token id → what is added to its logit."""
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """Of the noise; samples of one prompt derive one each. Default: one of its own."""
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """No end before so many."""
    stop: NonEmpty | Annotated[list[NonEmpty], Meta(max_length=64)] | None = None
    """Strings that end it; the text is cut before them."""
    stop_token_ids: list[TokenId] = []
    """Tokens that end it."""
    include_stop_str_in_output: bool = False
    """Cut the text behind the stop string."""
    no_stop_trim: bool = False
    """SGLang's name for include_stop_str_in_output."""
    ignore_eos: bool = False
    """Go on past the end-of-sequence tokens."""
    skip_special_tokens: bool = True
    """Leave them out of the text."""
    prompt_logprobs: Alternatives | None = None
    """Alternatives per prompt token; 0: its own logprobs alone."""
    logprobs_mode: LogprobsMode | None = None
    """Which distribution they show; default: the server's openai.logprobs_mode."""


class GenerationRequest(SamplingFields, frozen=True, kw_only=True):
    """What both endpoints take. JSON null means: absent."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """Keep the last k tokens; -1: as many as fit."""
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    return_meta_info: bool = False
    record: list[Record] = []
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    """Larger runs first."""
    user: str | None = None
    metadata: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    """Text, texts, ids or lists of ids; a list holds one kind (checked in completions.py)."""
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 16
    """0 only with echo or prompt_logprobs: score the prompt, give no token."""
    best_of: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = None
    echo: bool = False
    logprobs: Alternatives | None = None
    add_special_tokens: bool = True


class TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class FunctionCall(Struct, frozen=True):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCallIn(Struct, frozen=True, kw_only=True):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Struct, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Meta(min_length=1)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(Struct, frozen=True, kw_only=True):
    name: NonEmpty
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True, kw_only=True):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Tool] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    """False: only the first call of an answer is given."""
    reasoning_effort: str | None = None
    """Handed to the template under its own name."""
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    include_reasoning: bool = True
    separate_reasoning: bool = True
    add_special_tokens: bool = False


# --- replies


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class Usage(Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class CompletionLogprobs(Struct, kw_only=True):
    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class PromptLogprob(Struct):
    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class Routing(Struct):
    """Base64 of [positions, MoE layers, K] arrays, prompt first."""

    shape: list[int]
    ids: str
    ids_dtype: str
    weights: str
    weights_dtype: str = "float32"


class Extension(Struct, kw_only=True):
    """`everstep` in a choice, with `record` or `return_meta_info`: aligned with its token ids."""

    id: str
    seed: int
    finish_reason: dict[str, Any] | None
    versions: list[tuple[int, int]]
    """Run-length: (policy version, number of tokens)."""
    flags: list[int]
    lp_sampled: list[float]
    lp_temp: list[float]
    kept_mass: list[float]
    lp_raw: list[float] | UnsetType = UNSET
    entropy: list[float] | UnsetType = UNSET
    kept_ids: list[list[int]] | UnsetType = UNSET
    routing: Routing | UnsetType = UNSET


class Choice(Struct, kw_only=True):
    """What choices of every kind carry."""

    index: int
    logprobs: CompletionLogprobs | ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    everstep: Extension | UnsetType = UNSET


class CompletionChoice(Choice, kw_only=True):
    text: str
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionResponse(Struct, kw_only=True):
    """Whole, and as a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType = UNSET
    """Numerics id and digest of the weights: equal ones give equal bits for equal seeds."""


class FunctionCallOut(Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCall(Struct, kw_only=True):
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallOut


class ChatMessage(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    refusal: None = None


class ChatChoice(Choice, kw_only=True):
    message: ChatMessage


class ChatResponse(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(Struct, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChunkChoice(Choice, kw_only=True):
    delta: ChatDelta


class ChatChunk(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ModelCard(Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "everstep"
    root: str
    max_model_len: int | None


class ModelList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Struct):
    error: ErrorBody
