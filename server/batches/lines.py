"""One line of a batch's input → a `Job`, or the InvalidRequest that becomes its error record.

Lines are OpenAI's ({"custom_id", "method", "url", "body"}; unknown fields of a body are ignored,
as the server does) or plain ({"prompt": text | ids} or {"messages": […]}, with `custom_id` or
`id`, any sampling field, `n`, `logprobs`, `tools`, `metadata`; unknown fields are refused).
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from ...engine.errors import InvalidRequest, UnknownModel
from ...engine.rollout import MAX_SAMPLES, SamplingParams, derive_seed
from ...engine.tokenizer import Tokenizer

Kind = Literal["chat", "completion"]
URLS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
# OpenAI's default for completions, where neither the line nor the command names a limit
COMPLETION_TOKENS = 16
SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)
_OTHER_FIELDS = frozenset(
    {"n", "model", "logprobs", "max_completion_tokens", "return_token_ids", "tools", "user"}
    | {"chat_template_kwargs", "metadata"}
)
_PLAIN_FIELDS = SAMPLING_FIELDS | _OTHER_FIELDS | {"prompt", "messages", "custom_id", "id"}
# asked for, these would change the answer, and a batch cannot do them: better an error than silence
_REFUSED = ("stream", "suffix", "echo", "functions", "audio", "prediction")


class Defaults(Struct, frozen=True, kw_only=True):
    """What holds where a line says nothing.

    model_names  what a line may call the model; the first is the one in records
    """

    sampling: SamplingParams = SamplingParams()
    run_seed: int = 0
    model_names: tuple[str, ...] = ("default",)
    return_token_ids: bool = False


class Job(Struct, frozen=True, kw_only=True):
    """A line that can be run: every prompt `n` times.

    prompt_text  the rendered conversation (it says whether the output begins in reasoning)
    num_top      alternatives per token that the record shows; None: no logprobs
    """

    custom_id: str
    kind: Kind
    prompts: list[list[int]]
    prompt_text: str = ""
    sampling: SamplingParams
    n: int = 1
    num_top: int | None = None
    return_token_ids: bool = False
    tools: list[dict[str, Any]] = []
    metadata: Any = None

    @property
    def num_rollouts(self) -> int:
        return len(self.prompts) * self.n

    def sampling_of(self, index: int) -> SamplingParams:
        """Sampling of prompt `index`: two prompts of one line do not share their noise."""
        if index == 0 or self.sampling.seed is None:
            return self.sampling
        seed = derive_seed("prompt", self.sampling.seed, index)
        return msgspec.structs.replace(self.sampling, seed=seed)


def parse_line(raw: bytes) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        line = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the line is not JSON: {error}") from None
    if not isinstance(line, dict):
        raise InvalidRequest("the line must be a JSON object")
    return line


def explicit_id(line: Mapping[str, Any]) -> str | None:
    """`custom_id`, or a plain line's `id`, as text; None where a line has none."""
    value = line.get("custom_id")
    if value is None and "body" not in line:
        value = line.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InvalidRequest(
            f"custom_id must be a non-empty string or a number, got {value!r}", field="custom_id"
        )
    return str(value)


def job_of(
    line: Mapping[str, Any], custom_id: str, defaults: Defaults, tokenizer: Tokenizer | None
) -> Job:
    """The job of a line; raises InvalidRequest naming the field."""
    kind, body = _body_of(line)
    _check_fields(body, defaults)
    chat = kind == "chat"
    num_top = _num_top(body, chat=chat)
    sampling = _sampling(body, custom_id, defaults, num_top)
    text, prompts = "", []
    if chat:
        text = _render(body, tokenizer)
        assert tokenizer is not None
        prompts = [tokenizer.encode(text)]
    else:
        prompts = _prompts(body.get("prompt"), tokenizer)
        if sampling.max_tokens is None and "body" in line:
            sampling = msgspec.structs.replace(sampling, max_tokens=COMPLETION_TOKENS)
    in_ids = not chat and not isinstance(body["prompt"], str)
    return Job(
        custom_id=custom_id,
        kind=kind,
        prompts=prompts,
        prompt_text=text,
        sampling=sampling,
        n=_whole(body, "n", 1, 1, MAX_SAMPLES),
        num_top=num_top,
        # who speaks in ids is answered in ids
        return_token_ids=bool(body.get("return_token_ids", in_ids or defaults.return_token_ids)),
        tools=body.get("tools") or [],
        metadata=body.get("metadata"),
    )


def _body_of(line: Mapping[str, Any]) -> tuple[Kind, Mapping[str, Any]]:
    if "body" not in line and "url" not in line:
        return _plain_body(line)
    url, method, body = line.get("url"), line.get("method", "POST"), line.get("body")
    if method != "POST":
        raise InvalidRequest(f"method must be POST, got {method!r}", field="method")
    if url not in URLS:
        raise InvalidRequest(f"url must be one of {', '.join(URLS)}, got {url!r}", field="url")
    if not isinstance(body, dict):
        raise InvalidRequest("body must be a JSON object", field="body")
    needed = "messages" if URLS[url] == "chat" else "prompt"
    if needed not in body:
        raise InvalidRequest(f"body.{needed} is missing", field=needed)
    return URLS[url], body


def _plain_body(line: Mapping[str, Any]) -> tuple[Kind, Mapping[str, Any]]:
    if ("prompt" in line) == ("messages" in line):
        raise InvalidRequest(
            "a line needs a prompt or messages (one of them), or OpenAI's url and body",
            field="prompt",
        )
    for name in line:
        if name not in _PLAIN_FIELDS:
            near = difflib.get_close_matches(name, _PLAIN_FIELDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InvalidRequest(f"unknown field {name}{hint}", field=name)
    return ("chat" if "messages" in line else "completion"), line


def _check_fields(body: Mapping[str, Any], defaults: Defaults) -> None:
    model = body.get("model")
    if model is not None and model not in defaults.model_names:
        raise UnknownModel(
            f"model {model!r} is not the one that runs; accepted: "
            f"{', '.join(defaults.model_names)} (--served-model-name adds names)",
            field="model",
        )
    for name in _REFUSED:
        if body.get(name):
            raise InvalidRequest(f"{name} is not possible in a batch", field=name)
    best_of = body.get("best_of")
    if best_of is not None and best_of != body.get("n", 1):
        raise InvalidRequest("best_of is not possible in a batch; use n", field="best_of")
    form = body.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        raise InvalidRequest("response_format: only text is supported", field="response_format")
    tools = body.get("tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise InvalidRequest("tools must be a list of objects", field="tools")


def _num_top(body: Mapping[str, Any], *, chat: bool) -> int | None:
    """Alternatives asked for: chat's `logprobs` is a flag beside top_logprobs, else a number."""
    asked = body.get("logprobs")
    if asked is None or asked is False:
        return None
    if asked is True:
        return _whole(body, "top_logprobs", 0, 0, 64)
    if chat:
        raise InvalidRequest(f"logprobs must be true or false, got {asked!r}", field="logprobs")
    return _whole(body, "logprobs", 0, 0, 64)


def _whole(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(
            f"{name} must be a whole number from {low} to {high}, got {value!r}", field=name
        )
    return value


def _sampling(
    body: Mapping[str, Any], custom_id: str, defaults: Defaults, num_top: int | None
) -> SamplingParams:
    values = msgspec.to_builtins(defaults.sampling, str_keys=True)
    values |= {k: v for k, v in body.items() if k in SAMPLING_FIELDS and v is not None}
    values["max_tokens"] = (
        body.get("max_completion_tokens") or body.get("max_tokens") or values["max_tokens"]
    )
    if isinstance(values["stop"], str):
        values["stop"] = [values["stop"]]
    if num_top is not None:
        values["top_logprobs"] = num_top
        values["record"] = [*values["record"], "lp_raw"]
    if values["seed"] is None:
        # from the id, not from the order: a resumed run draws what an uninterrupted one would
        values["seed"] = derive_seed("batch", defaults.run_seed, custom_id)
    try:
        return msgspec.convert(values, SamplingParams, str_keys=True)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`").split("[")[0].split(".")[0] or None
        value = values.get(field) if field else None
        raise InvalidRequest(f"{field}: {text.lower()}, got {value!r}", field=field) from None


def _render(body: Mapping[str, Any], tokenizer: Tokenizer | None) -> str:
    messages = body["messages"]
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a non-empty list", field="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRequest(
                f"messages[{index}] must be an object with a role", field=f"messages[{index}]"
            )
    if tokenizer is None:
        raise InvalidRequest(
            "messages need a tokenizer; give prompt as token ids", field="messages"
        )
    kwargs = body.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise InvalidRequest("chat_template_kwargs must be an object", field="chat_template_kwargs")
    flat = [{**message, "content": _flat(message.get("content"))} for message in messages]
    return tokenizer.render_chat(flat, tools=body.get("tools"), **kwargs)


def _flat(content: Any) -> Any:
    """Text parts as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise InvalidRequest("messages: only text parts are supported", field="messages")
        texts.append(text)
    return "".join(texts)


def _prompts(prompt: Any, tokenizer: Tokenizer | None) -> list[list[int]]:
    """A text, ids, or a list of such."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return [_prompt(one, tokenizer) for one in prompt]
    return [_prompt(prompt, tokenizer)]


def _prompt(prompt: object, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequest("prompt: text needs a tokenizer; give token ids", field="prompt")
        return tokenizer.encode(prompt)
    if isinstance(prompt, Sequence) and all(type(token) is int for token in prompt):
        return list(prompt)
    raise InvalidRequest("prompt must be text, token ids, or a list of these", field="prompt")
