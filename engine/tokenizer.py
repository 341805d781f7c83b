"""Tokenizer, chat template and incremental detokeniser (interface; the body follows)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Detokenizer:
    """Text of one rollout as its tokens arrive (body follows)."""


class Tokenizer:
    """A checkpoint's own tokenizer.json and chat template (body follows)."""

    vocab_size: int
    eos_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        raise NotImplementedError

    def render_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        raise NotImplementedError
