"""What a benchmark asks for: random tokens, or the prompts of a file."""

import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from ..engine.errors import ConfigError

Prompt = str | list[int]


class Ask(Struct, frozen=True):
    """One request."""

    prompt: Prompt
    output_tokens: int


class _Line(Struct, frozen=True):
    """A line of a data set; other fields are left aside."""

    prompt: str | Annotated[list[int], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None


def random_asks(
    *,
    count: int,
    input_tokens: int,
    output_tokens: int,
    vocab_size: int,
    seed: int,
    never: Collection[int] = (),
) -> list[Ask]:
    """`count` prompts of uniformly drawn ids below `vocab_size`, without those of `never`."""
    draw = random.Random(seed)
    known = [i for i in range(vocab_size) if i not in never]
    return [Ask(draw.choices(known, k=input_tokens), output_tokens) for _ in range(count)]


def read_dataset(path: Path, *, count: int, output_tokens: int, seed: int) -> list[Ask]:
    """`count` lines of {"prompt": text or ids, "max_tokens": N}; a short file is gone through again.

    output_tokens  where a line says nothing. The order is drawn from `seed`.
    Raises ConfigError naming file and line.
    """
    try:
        raw = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--dataset {path}: {error.strerror}") from None
    lines = []
    for number, text in enumerate(raw, 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f'--dataset {path}, line {number}: {error}; expected {{"prompt": text or ids}}'
            ) from None
        lines.append(Ask(line.prompt, line.max_tokens or output_tokens))
    if not lines:
        raise ConfigError(f"--dataset {path}: no lines")
    random.Random(seed).shuffle(lines)
    return [lines[i % len(lines)] for i in range(count)]


def warm_up(asks: Sequence[Ask], count: int) -> list[Ask]:
    """The first request `count` times with its prompt backwards: nothing of it is cached by this."""
    return [Ask(asks[0].prompt[::-1], asks[0].output_tokens)] * count


def with_ids(asks: Sequence[Ask], encode: Callable[[str], list[int]]) -> list[Ask]:
    """The same with every text as token ids."""
    return [
        Ask(encode(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt, ask.output_tokens)
        for ask in asks
    ]
