"""A checkpoint's own tokenizer.json and chat template. Needs no torch and runs no code from files.

Token ids above the last entry of tokenizer.json (a padded vocabulary) decode to nothing.
The tags that parsers look for (`<think>`, `<tool_call>` …) are never stripped as special tokens.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders

from .errors import CheckpointError, InvalidRequest

STRUCTURAL_TAGS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# marks where the last message ends, so that what a template adds after it can be cut off
END_MARK = "\ue000everstep:end\ue000"
RESERVED_KWARGS = frozenset({"messages", "tools", "add_generation_prompt", *SPECIAL_NAMES})


class Tokenizer:
    """Text ⇄ ids and messages → text, as one checkpoint defines them. Immutable once built."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`chat_template`: one template, or named ones of which `default` is the default.

        Raises CheckpointError if a template does not parse.
        """
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self._skip_ids = frozenset(
            token_id
            for token_id, token in added.items()
            if token.special and token.content not in STRUCTURAL_TAGS
        )
        self.vocab_size: int = max(
            backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1
        )
        self.eos_ids: tuple[int, ...] = tuple(sorted(set(eos_ids)))
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}
        self._digest: str | None = None
        self._environment = _environment()
        self._compiled: dict[str, jinja2.Template] = {}
        named = (
            {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
        )
        self.chat_templates: dict[str, str] = dict(named)
        for name, source in self.chat_templates.items():
            try:
                self._compiled[source] = self._environment.from_string(source)
            except jinja2.TemplateError as error:
                raise CheckpointError(f"chat template {name!r} does not parse: {error}") from None

    @classmethod
    def from_folder(cls, folder: Path | str) -> "Tokenizer":
        """Read tokenizer.json, and where present tokenizer_config, generation_config, config and
        chat_template.jinja. Raises CheckpointError naming the file that is absent or broken."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: not found; a model folder needs its tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer: {error}") from None
        settings = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(settings)
        eos_ids = _declared_eos(_read_json(folder / "generation_config.json"))
        eos_ids |= _declared_eos(_read_json(folder / "config.json"))
        eos_id = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
        if eos_id is not None:
            eos_ids.add(eos_id)
        template = _read_template(folder, settings)
        return cls(backend, eos_ids=sorted(eos_ids), chat_template=template, special_tokens=special)

    @property
    def digest(self) -> str:
        """Of all that decides how text and ids correspond; equal digests, equal texts."""
        if self._digest is None:
            said = self._backend.to_str().encode()
            self._digest = hashlib.blake2b(said, digest_size=16).hexdigest()
        return self._digest

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Raises InvalidRequest for text that is no Unicode (bytes of another encoding)."""
        # its `encode` holds the interpreter's lock: a long text on a thread would stop a server
        try:
            [encoding] = self._backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except TypeError:
            # what Python makes of bytes that it cannot read
            index = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
            raise InvalidRequest(
                f"the text is not Unicode: a lone surrogate ({text[index]!a}) at character {index}; "
                "was it written in UTF-8?",
                field="prompt",
            ) from None
        return encoding.ids

    @cached_property
    def longest_token_bytes(self) -> int | None:
        """UTF-8 bytes of text that one token stands for at most; None where that is not known."""
        added = self._backend.get_added_tokens_decoder().values()
        swallows_spaces = any(token.lstrip or token.rstrip for token in added)
        if not self.is_byte_level or swallows_spaces or self._backend.normalizer is not None:
            return None
        return max(len(token.encode()) for token in self._backend.get_vocab())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self._skip_ids]
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def is_skipped(self, token_id: int) -> bool:
        """Whether `decode` leaves it out as a special token."""
        return token_id in self._skip_ids

    def is_added(self, token_id: int) -> bool:
        """Whether it is a whole added token (a tag or an end mark), not a piece of text."""
        return token_id in self._added_ids

    def token_id(self, text: str) -> int | None:
        """The id of the token spelled exactly so in tokenizer.json, if there is one."""
        return self._backend.token_to_id(text)

    def token_text(self, token_id: int) -> str:
        """One token decoded alone; half a UTF-8 character gives U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; b"" for an id that tokenizer.json does not have."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = b"" if token is None else self._to_bytes(token)
            self._bytes[token_id] = known
        return known

    def is_known(self, token_id: int) -> bool:
        """Whether tokenizer.json has it; the model's padded vocabulary may be larger."""
        return self._backend.id_to_token(token_id) is not None

    def is_byte_fallback(self, token_id: int) -> bool:
        """Whether it is a `<0x0A>` token, whose text depends on its neighbours."""
        token = self._backend.id_to_token(token_id)
        return token is not None and _fallback_byte(token) is not None

    def _to_bytes(self, token: str) -> bytes:
        if self.is_byte_level:
            # a token with any character outside the byte alphabet stands for itself
            try:
                return bytes([BYTE_OF[char] for char in token])
            except KeyError:
                return token.encode()
        byte = _fallback_byte(token)
        return token.replace("▁", " ").encode() if byte is None else bytes([byte])

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt text for a conversation.

        chat_template           a template, or the name of one of the checkpoint's
        continue_final_message  end inside the last message, so that the model goes on with it
        Raises InvalidRequest with the template's own message where it refuses the conversation.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other: "
                "set add_generation_prompt to false to continue the last message",
                field="continue_final_message",
            )
        taken = sorted(RESERVED_KWARGS & template_kwargs.keys())
        if taken:
            raise InvalidRequest(
                f"chat_template_kwargs may not set {', '.join(taken)}", field="chat_template_kwargs"
            )
        rendered_messages = [dict(message) for message in messages]
        if continue_final_message:
            rendered_messages = _mark_end(rendered_messages)
        template = self._template(chat_template, has_tools=bool(tools))
        try:
            text = template.render(
                messages=rendered_messages,
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
                **template_kwargs,
            )
        except Exception as error:  # whatever a template does wrong is about these messages
            raise InvalidRequest(
                f"the chat template refuses these messages: {error}", field="messages"
            ) from None
        if continue_final_message:
            text, mark, _ = text.rpartition(END_MARK)
            if not mark:
                raise InvalidRequest(
                    "the chat template drops the last message's content, so it cannot be continued",
                    field="continue_final_message",
                )
        return text

    def _template(self, override: str | None, *, has_tools: bool) -> jinja2.Template:
        if override is None:
            named = self.chat_templates
            source = named.get("tool_use") if has_tools else None
            source = source or named.get("default") or next(iter(named.values()), None)
            if source is None:
                raise InvalidRequest(
                    "this checkpoint has no chat template: give one with --chat-template FILE, "
                    "or send a prompt to /v1/completions",
                    field="messages",
                )
        else:
            source = self.chat_templates.get(override, override)
        compiled = self._compiled.get(source)
        if compiled is None:
            try:
                compiled = self._environment.from_string(source)
            except jinja2.TemplateError as error:
                raise InvalidRequest(
                    f"chat_template does not parse: {error}", field="chat_template"
                ) from None
        return compiled


def _mark_end(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        raise InvalidRequest(
            "continue_final_message needs a last message with text content",
            field="continue_final_message",
        )
    return [*messages[:-1], {**messages[-1], "content": content + END_MARK}]


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` (training masks) renders as its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} if there is no file; raises CheckpointError if it is broken."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def _declared_eos(settings: Mapping[str, Any]) -> set[int]:
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return {number for number in ids if isinstance(number, int) and not isinstance(number, bool)}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in SPECIAL_NAMES:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _read_template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """chat_template.jinja first, else tokenizer_config's, which may be a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = settings.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    try:
        return {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string "
            "or a list of {name, template}"
        ) from None


def _fallback_byte(token: str) -> int | None:
    """The byte of a `<0x0A>` token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 stands for itself, the other bytes,
    in order, are the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(rest)})
    return alphabet


BYTE_OF = _byte_alphabet()
