"""Tokenizer and chat templates of a random checkpoint: text is its bytes, templates as published."""

from pathlib import Path
from typing import Literal

from ..errors import CheckpointError
from .json_keys import write_json

_PUBLISHED_SPECIALS = {
    "<|startoftext|>": 156891,
    "<|endoftext|>": 156892,
    "[CLS]": 156893,
    "[gMASK]": 156894,
    "<|role_end|>": 156895,
    "<think>": 156896,
    "</think>": 156897,
    "<tool_call>": 156898,
    "</tool_call>": 156899,
    "<tool_response>": 156900,
    "</tool_response>": 156901,
    "<role>": 157151,
    "</role>": 157152,
}
# tags that parsers must still see in decoded text
_VISIBLE = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)

SIMPLE_TEMPLATE = """\
{% for message in messages %}
{% set role = {'user': 'HUMAN'}.get(message['role'], message['role'] | upper) %}
{{ '<role>' + role + '</role>' + message['content'] }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<role>ASSISTANT</role><think>\\n' }}
{%- endif %}
"""
"""Ring-mini's form (MODEL.md §5.3): no separators, no end tokens, thinking opened by the prompt."""

FULL_TEMPLATE = """\
{% set thinking_option = 'off' %}
{% set last = namespace(user=-1) %}
{% for message in messages %}
{% if message.role == 'user' and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
{% set last.user = loop.index0 %}
{% endif %}
{% endfor %}
{{ '<role>SYSTEM</role>' }}
{%- if messages and messages[0].role == 'system' %}
{{ messages[0].content + '\\n' }}
{%- endif %}
{% if tools %}
{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}
{{ '\\n' + (tool | tojson) }}
{%- endfor %}
{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>\\n' }}
{%- endif %}
{{ 'detailed thinking ' + thinking_option + '<|role_end|>' }}
{%- for message in messages %}
{% set content = message.content or '' %}
{% if message.role == 'user' %}
{{ '<role>HUMAN</role>' + content + '<|role_end|>' }}
{%- elif message.role == 'system' and not loop.first %}
{{ '<role>SYSTEM</role>' + content + '<|role_end|>' }}
{%- elif message.role == 'assistant' %}
{% set reasoning = message.reasoning_content or '' %}
{% if not reasoning and '</think>' in content %}
{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{% endif %}
{% if '</think>' in content %}
{% set content = content.split('</think>')[-1].lstrip('\\n') %}
{% endif %}
{{ '<role>ASSISTANT</role>' }}
{%- if reasoning and loop.index0 > last.user %}
{{ '\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
{%- endif %}
{{ content }}
{%- for call in message.tool_calls or [] %}
{% set function = call.function or call %}
{{ ('\\n' if content or not loop.first else '') + '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{ '<|role_end|>' }}
{%- elif message.role == 'tool' %}
{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}
{{ '<role>OBSERVATION</role>' }}
{%- endif %}
{{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
{{ '<|role_end|>' }}
{%- endif %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<role>ASSISTANT</role>' }}
{%- endif %}
"""
"""The chat models' form (MODEL.md §5.3): every turn ends with <|role_end|>, tools and reasoning."""


def special_tokens(vocab_size: int) -> dict[str, int]:
    """Special tokens and their ids: the published ones, or the last ids of a smaller vocabulary.

    Raises CheckpointError if the vocabulary has no room for them and 256 byte tokens.
    """
    if vocab_size > max(_PUBLISHED_SPECIALS.values()):
        return dict(_PUBLISHED_SPECIALS)
    first = vocab_size - len(_PUBLISHED_SPECIALS)
    if first < 256:
        raise CheckpointError(
            f"vocab_size is {vocab_size}; accepted: at least {256 + len(_PUBLISHED_SPECIALS)} "
            f"(256 bytes and {len(_PUBLISHED_SPECIALS)} special tokens)"
        )
    return {token: first + i for i, token in enumerate(_PUBLISHED_SPECIALS)}


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(b)) if b in others else chr(b) for b in range(256)]


def write_tokenizer(
    folder: Path, vocab_size: int, tokens: dict[str, int], template: Literal["simple", "full"]
) -> None:
    """Byte-level BPE without merges: text is its bytes; the other ids decode to made-up words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    vocab |= tokens
    taken = set(tokens.values())
    # ids that no text encodes to, but that a random model samples all the time
    top = max(taken) if vocab_size > max(_PUBLISHED_SPECIALS.values()) else vocab_size - 1
    vocab |= {_filler_word(i): i for i in range(256, top + 1) if i not in taken}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(t, special=t not in _VISIBLE, normalized=False) for t in tokens]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|role_end|>" if template == "full" else "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "cls_token": "[CLS]",
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "gmask_token": "[gMASK]",
        "model_max_length": 10**30,
        "chat_template": FULL_TEMPLATE if template == "full" else SIMPLE_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", named | settings)
    write_json(folder / "special_tokens_map.json", named)


def _filler_word(number: int) -> str:
    """A space and letters, unique to the number."""
    word = ""
    while number:
        number, letter = divmod(number, 26)
        word = chr(ord("a") + letter) + word
    return "Ġ" + word
