"""One line of a batch's input → a `Job`, or the InvalidRequest that becomes its error record.

Lines are OpenAI's ({"custom_id", "method", "url", "body"}), and a body means what it means when it
is sent to that url; or plain ({"prompt": text | ids} or {"messages": […]}, with `custom_id` or
`id`, any sampling field, `n`, `logprobs`, `tools`, `metadata`; unknown fields are refused).
"""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from ...engine.errors import InvalidRequest, UnknownModel
from ...engine.rollout import SamplingParams, derive_seed
from ..config import OpenAIConfig
from ..decoding import decode_fields
from ..openai import chat_request, completion_request
from ..openai.generation import truncated
from ..openai.wire import ChatRequest, CompletionRequest, SamplingFields
from ..service import Service

Kind = Literal["chat", "completion"]
Fields = dict[str, Any]
URLS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)
_OTHER_FIELDS = frozenset(
    {"n", "model", "logprobs", "max_completion_tokens", "return_token_ids", "tools", "user"}
    | {"chat_template_kwargs", "metadata"}
)
_PLAIN_FIELDS = SAMPLING_FIELDS | _OTHER_FIELDS | {"prompt", "messages", "custom_id", "id"}
# what a record does not show: better an error than silence
_REFUSED = ("stream", "echo", "prompt_logprobs", "record", "return_meta_info")


class Defaults(Struct, frozen=True, kw_only=True):
    """What holds where a line says nothing.

    model_names  what a line may call the model; the first is the one in records
    """

    sampling: SamplingParams = SamplingParams()
    run_seed: int = 0
    model_names: tuple[str, ...] = ("default",)
    openai: OpenAIConfig = OpenAIConfig()
    return_token_ids: bool = False


class Job(Struct, frozen=True, kw_only=True):
    """A line that can be run: every prompt `n` times.

    starts_open       whether a chat's answer begins inside its reasoning
    return_token_ids  who speaks in ids is answered in ids
    """

    custom_id: str
    request: ChatRequest | CompletionRequest
    prompts: list[list[int]]
    sampling: SamplingParams
    starts_open: bool = False
    return_token_ids: bool = False
    metadata: Any = None

    @property
    def n(self) -> int:
        return self.request.n

    @property
    def num_rollouts(self) -> int:
        return len(self.prompts) * self.n

    def sampling_of(self, index: int) -> SamplingParams:
        """Sampling of prompt `index`: two prompts of one line do not share their noise."""
        if index == 0 or self.sampling.seed is None:
            return self.sampling
        seed = derive_seed("prompt", self.sampling.seed, index)
        return replace(self.sampling, seed=seed)


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


async def job_of(
    line: Mapping[str, Any], custom_id: str, defaults: Defaults, service: Service
) -> Job:
    """The job of a line; raises InvalidRequest naming the field."""
    kind, fields = _fields_of(line, defaults)
    _check_fields(fields, defaults)
    # of a plain line it may be any JSON
    metadata = fields.pop("metadata", None) if "body" not in line else None
    request: ChatRequest | CompletionRequest
    starts_open, prompts = False, []
    if kind == "chat":
        decoded = decode_fields(fields, ChatRequest)
        request = decoded.request
        chat_request.check(request)
        text = chat_request.prompt_of(service, request, decoded.raw)
        prompts = await chat_request.prompt_ids_of(service, request, text)
        sampling = chat_request.sampling_in(request, service.config.openai)
        starts_open = chat_request.starts_open(service, request, text)
    else:
        request = decode_fields(fields, CompletionRequest).request
        completion_request.check(request)
        prompts = await completion_request.prompts_of(service, request)
        sampling = completion_request.sampling_in(request, service.config.openai)
        if "body" not in line and "max_tokens" not in fields:
            sampling = replace(sampling, max_tokens=None)
    if sampling.seed is None:
        # from the id, not from the order: a resumed run draws what an uninterrupted one would
        seed = derive_seed("batch", defaults.run_seed, custom_id)
        sampling = replace(sampling, seed=seed)
    info = service.manager.known_info
    in_ids = kind == "completion" and not isinstance(fields["prompt"], str)
    return Job(
        custom_id=custom_id,
        request=request,
        prompts=[truncated(prompt, request, sampling, info) for prompt in prompts],
        sampling=sampling,
        starts_open=starts_open,
        return_token_ids=bool(fields.get("return_token_ids", in_ids or defaults.return_token_ids)),
        metadata=request.metadata if metadata is None else metadata,
    )


def _fields_of(line: Mapping[str, Any], defaults: Defaults) -> tuple[Kind, Fields]:
    """The line's request as fields of its url's body, nulls left out, defaults filled in."""
    kind, body = _body_of(line)
    fields = {name: value for name, value in body.items() if value is not None}
    if "body" not in line:
        fields = _from_plain(kind, fields)
    usual = msgspec.to_builtins(SamplingParams(), str_keys=True)
    own = msgspec.to_builtins(defaults.sampling, str_keys=True)
    wanted = {
        name: own[name]
        for name in (*SamplingFields.__struct_fields__, "max_tokens")
        if name in own and own[name] != usual[name]
    }
    if "max_completion_tokens" in fields:
        wanted.pop("max_tokens", None)
    return kind, wanted | fields


def _from_plain(kind: Kind, fields: Fields) -> Fields:
    """In the names of OpenAI's bodies."""
    fields = {name: value for name, value in fields.items() if name not in ("custom_id", "id")}
    if kind == "completion":
        if "max_completion_tokens" in fields:
            fields["max_tokens"] = fields.pop("max_completion_tokens")
        if fields.get("logprobs") is True:
            fields["logprobs"] = fields.pop("top_logprobs", 0)
        elif "top_logprobs" in fields:
            raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
        elif fields.get("logprobs") is False:
            del fields["logprobs"]
    return fields


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


def _check_fields(fields: Fields, defaults: Defaults) -> None:
    model = fields.pop("model", None)
    if model is not None and model not in defaults.model_names:
        raise UnknownModel(
            f"model {model!r} is not the one that runs; accepted: "
            f"{', '.join(defaults.model_names)} (--served-model-name adds names)",
            field="model",
        )
    for name in _REFUSED:
        if fields.get(name) not in (None, False, []):
            raise InvalidRequest(f"{name} is not possible in a batch", field=name)
