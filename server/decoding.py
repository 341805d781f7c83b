"""Bytes of a request → a wire struct, or an InvalidRequest that names the field and what it takes."""

import re
from functools import cache
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct, inspect

from ..engine.errors import InvalidRequest

RequestT = TypeVar("RequestT", bound=Struct)

_NO_GRAMMAR = "structured output is not supported yet"
# fields that would change the output: never ignored. A falsy value asks for nothing and passes.
REFUSED = {
    **dict.fromkeys(
        (
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_json_object",
            "guided_decoding_backend",
            "guided_whitespace_pattern",
            "structural_tag",
            "json_schema",
            "regex",
            "ebnf",
            "stop_regex",
        ),
        _NO_GRAMMAR,
    ),
    "allowed_token_ids": "not supported yet; logit_bias with -100 bans single tokens",
    "bad_words": "not supported yet; logit_bias with -100 bans single tokens",
    "logprob_token_ids": "not supported yet",
    "thinking_token_budget": "not supported yet",
    "use_beam_search": "not supported: only sampling is",
    "custom_logit_processor": "not supported: requests may not carry code",
    "lora_path": "not supported yet: there are no adapters",
    "return_hidden_states": "not supported yet",
    "return_routed_experts": 'not supported under this name; send "record": ["routing"]',
    "chat_template": "not accepted from requests; start the server with --chat-template",
    "suffix": "not supported: the model does not fill in the middle",
    "input_ids": "not supported here; send token ids as `prompt` to /v1/completions",
    "functions": "removed by OpenAI; send `tools`",
    "function_call": "removed by OpenAI; send `tool_choice`",
    "audio": "not supported: the model gives text only",
}


class Decoded(Struct, Generic[RequestT]):
    """A checked request, what it was made of (nulls left out), and the names nobody reads."""

    request: RequestT
    raw: dict[str, Any]
    ignored: list[str]


def decode_request(body: bytes, kind: type[RequestT]) -> Decoded[RequestT]:
    """Raises InvalidRequest; its `field` is the path of the offending value."""
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if not isinstance(raw, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {_name_of(raw)}")
    # openai clients send null for what they leave open
    fields = {name: value for name, value in raw.items() if value is not None}
    known = kind.__struct_fields__
    for name, reason in REFUSED.items():
        if fields.get(name) and (name not in known):
            raise InvalidRequest(f"{name}: {reason}", field=name)
    _check_response_format(fields.get("response_format"))
    ignored = [
        name
        for name in fields
        if name not in known and name not in REFUSED and name != "response_format"
    ]
    try:
        request = msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error), fields, kind) from None
    return Decoded(request, fields, ignored)


def _check_response_format(value: Any) -> None:
    if value is None or (isinstance(value, dict) and value.get("type") == "text"):
        return
    raise InvalidRequest(
        f"response_format: {_NO_GRAMMAR}; the accepted value is {{'type': 'text'}}",
        field="response_format",
    )


def _explain(text: str, fields: dict[str, Any], kind: type[Struct]) -> InvalidRequest:
    """msgspec's message, in the words of our fields."""
    missing = re.fullmatch(r"Object missing required field `(\w+)`", text)
    if missing:
        name = missing.group(1)
        return InvalidRequest(f"{name} is required: {accepted(kind)[name]}", field=name)
    reason, _, place = text.partition(" - at ")
    found = re.search(r"`\$\.([^`]+)`$", place)
    if found is None:
        return InvalidRequest(text)
    path = found.group(1)
    steps = re.findall(r"\w+|\[[^]]*\]", path)
    if place.startswith("`key`"):
        value = _short(fields.get(steps[0]))
        return InvalidRequest(
            f"{path} must be an object with token ids for keys, got {value}", field=path
        )
    if path == steps[0]:
        value = _short(fields.get(path))
        return InvalidRequest(f"{path} must be {accepted(kind)[path]}, got {value}", field=path)
    field = path.removesuffix("[...]")
    expected = _walk(inspect.type_info(kind), steps)
    if "missing" in reason or expected is None:
        return InvalidRequest(f"{field}: {reason[0].lower()}{reason[1:]}", field=field)
    return InvalidRequest(f"{field} must be {expected} ({reason.lower()})", field=field)


def _walk(info: inspect.Type, steps: list[str]) -> str | None:
    """What is accepted at a path; None where the path leads out of the type."""
    if not steps:
        return _describe(info)
    head, rest = steps[0], steps[1:]
    match info:
        case inspect.UnionType(types=types):
            return next((text for part in types if (text := _walk(part, steps))), None)
        case inspect.StructType(tag_field=tag_field, tag=tag) if tag_field == head:
            return repr(tag)
        case inspect.StructType(fields=fields):
            inner = [field.type for field in fields if field.name == head]
            return _walk(inner[0], rest) if inner else None
        case inspect.ListType(item_type=item) if head.startswith("["):
            return _walk(item, rest)
        case inspect.DictType(value_type=value) if head.startswith("["):
            return _walk(value, rest)
    return None


@cache
def accepted(kind: type[Struct]) -> dict[str, str]:
    """Field → what it takes, in words, from its type."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return {field.name: _describe(field.type) for field in info.fields}


def _describe(info: inspect.Type) -> str:
    match info:
        case inspect.UnionType(types=types):
            parts = [_describe(part) for part in types if not isinstance(part, inspect.NoneType)]
            return " or ".join(parts)
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(repr(value) for value in values)
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "an integer" + _range(info)
        case inspect.FloatType():
            return "a number" + _range(info)
        case inspect.StrType():
            return "a non-empty string" if info.min_length else "a string"
        case inspect.ListType(item_type=item):
            most = f"at most {info.max_length} of: " if info.max_length else ""
            kind = "a non-empty list" if info.min_length else "a list"
            return f"{kind} ({most}{_describe(item)})"
        case inspect.DictType() | inspect.StructType():
            return "an object"
    return "any value"


def _range(info: inspect.IntType | inspect.FloatType) -> str:
    low, high = info.ge, info.le
    if info.gt is not None:
        return f" above {info.gt:g}" + (f" up to {high:g}" if high is not None else "")
    if low is not None and high is not None and high < 2**31 - 1:
        return f" from {low:g} to {high:g}"
    if low is not None and low > -(2**31):
        return f" of at least {low:g}"
    return " of 32 bits" if high == 2**31 - 1 else " of 64 bits" if high else ""


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _name_of(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
