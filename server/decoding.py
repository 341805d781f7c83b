"""Bytes of a request → a wire struct, or an InvalidRequest that names the field and what it takes."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Generic, Literal, TypeVar

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
    "echo": "not supported here; /v1/completions has it",
    "sampling_seed": 'not supported under this name; send "seed"',
    "repetition_detection": "not supported yet",
}


# taken where they ask for what is given anyway
_TEXT_ONLY = ("response_format", "modalities")


class Decoded(Struct, Generic[RequestT]):
    """A checked request, what it was made of (nulls left out), and the names nobody reads."""

    request: RequestT
    raw: dict[str, Any]
    ignored: list[str]


def decode_request(body: bytes, kind: type[RequestT]) -> Decoded[RequestT]:
    """Raises InvalidRequest; its `field` is the path of the offending value."""
    return decode_fields(fields_of(body, "json"), kind)


def decode_fields(fields: dict[str, Any], kind: type[RequestT]) -> Decoded[RequestT]:
    """As `decode_request`, of a body whose nulls are left out."""
    known = kind.__struct_fields__
    for name, reason in REFUSED.items():
        if fields.get(name) and (name not in known):
            raise InvalidRequest(f"{name}: {reason}", field=name)
    _check_text_only(fields)
    ignored = [
        name
        for name in fields
        if name not in known and name not in REFUSED and name not in _TEXT_ONLY
    ]
    try:
        request = msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error), fields, kind) from None
    return Decoded(request, fields, ignored)


def fields_of(body: bytes, media: Literal["json", "msgpack"]) -> dict[str, Any]:
    """The object in a body, without its nulls: openai clients send them for what they leave open.

    Raises InvalidRequest.
    """
    name = "JSON" if media == "json" else "msgpack"
    try:
        raw = msgspec.json.decode(body) if media == "json" else msgspec.msgpack.decode(body)
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise InvalidRequest(f"the body is not {name}: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if not isinstance(raw, dict):
        raise InvalidRequest(f"the body must be a {name} object, got {_name_of(raw)}")
    if not all(isinstance(key, str) for key in raw):
        raise InvalidRequest(f"the body must be a {name} object with strings for keys")
    return {key: value for key, value in raw.items() if value is not None}


def decode_own(
    fields: dict[str, Any], kind: type[RequestT], *, inner: Sequence[str] = ()
) -> RequestT:
    """A request of our own protocol, where nothing is ignored.

    inner  names of fields that are such structs themselves; nulls in them mean absent too
    Raises InvalidRequest: an unknown field is named with the nearest that there is.
    """
    fields = dict(fields)
    types = {field.name: field.type for field in fields_info(kind)}
    places = {
        name: outer
        for outer in inner
        if isinstance(info := types[outer], inspect.StructType)
        for name in accepted(info.cls)
    }
    check_names(fields, accepted(kind), places=places)
    for name in inner:
        value, info = fields.get(name), types[name]
        if isinstance(value, dict) and isinstance(info, inspect.StructType):
            fields[name] = {key: item for key, item in value.items() if item is not None}
            check_names(fields[name], accepted(info.cls), place=f"{name}.")
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error), fields, kind) from None


def check_names(
    given: Iterable[Any],
    known: Iterable[str],
    *,
    place: str = "",
    places: Mapping[str, str] = {},
) -> None:
    """Raise InvalidRequest for the first name that is not known, with the nearest one.

    place   of the names themselves, for the message
    places  names that stand elsewhere: name → field that has it
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {place}{near[0]}?" if near else f"known: {', '.join(known)}"
            if name in places:
                hint = f"did you mean {places[name]}.{name}?"
            shown = f"{place}{name}"[:80]
            raise InvalidRequest(f"{shown} is no field here; {hint}", field=shown)


@cache
def fields_info(kind: type[Struct]) -> tuple[inspect.Field, ...]:
    # inspecting a tree of structs takes longer than all else of a request
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return info.fields


def _check_text_only(fields: dict[str, Any]) -> None:
    form = fields.get("response_format")
    if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
        raise InvalidRequest(
            f"response_format: {_NO_GRAMMAR}; the accepted value is {{'type': 'text'}}",
            field="response_format",
        )
    if fields.get("modalities", ["text"]) != ["text"]:
        raise InvalidRequest(
            "modalities: the model gives text only; the accepted value is ['text']",
            field="modalities",
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
        limit = f" ({reason.lower()})" if "<= 2147483647" in reason else ""
        return InvalidRequest(
            f"{path} must be {accepted(kind)[path]}{limit}, got {value}", field=path
        )
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
    return {field.name: _describe(field.type) for field in fields_info(kind)}


def _describe(info: inspect.Type) -> str:
    match info:
        case inspect.UnionType(types=types):
            parts = [_describe(part) for part in types if not isinstance(part, inspect.NoneType)]
            return " or ".join(parts)
        case inspect.LiteralType(values=values):
            return "true" if values == (True,) else "one of " + ", ".join(map(repr, values))
        case inspect.EnumType(cls=cls):
            return "one of " + ", ".join(repr(member.value) for member in cls)
        case inspect.TupleType(item_types=items):
            return f"[{', '.join(map(_describe, items))}]"
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "an integer" + _range(info)
        case inspect.FloatType():
            return "a number" + _range(info)
        case inspect.StrType(pattern=pattern, max_length=longest) if pattern is not None:
            kind = "a non-empty string" if info.min_length else "a string"
            most = f"at most {longest} " if longest else ""
            return f"{kind} of {most}printable ASCII characters without spaces"
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
