"""Text of one rollout as its tokens arrive, with stop strings.

    at any time   text given so far == tokenizer.decode(ids so far)[:offset]

whatever the chunking. Held back: half a UTF-8 character, and a suffix that may become a stop
string. Work per token is O(its characters), amortised, however many stop strings there are.
"""

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

# a trailing U+FFFD may still turn into a character; after this many tokens it is taken as it is
MAX_HELD_TOKENS = 8


class Detokenizer:
    """Push each output token once, in order; stop pushing once `matched` is set.

    offset    characters given so far (`Rollout.text_offset`)
    position  characters decoded so far, before what is held back for stop strings: read before
              a push, it is where that token's text begins
    matched   the stop string that was completed: of several, the one complete at the earliest
              character, and of those the longest. Text is cut before it, or after it with
              `include_stop`; the token that completes it is the last.

    The text of the first `min_tokens` tokens is not searched (as vLLM does).
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._num_unchecked = min_tokens
        self._skip_special_tokens = skip_special_tokens
        self._decoder: _Decoder = (
            _ByteDecoder(tokenizer) if tokenizer.is_byte_level else _WindowDecoder(tokenizer)
        )
        self._automaton = _automaton(tuple(stop)) if stop else None
        self._state = 0
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None
        self.position = 0
        self.offset = 0

    def push(self, token_id: int) -> str:
        """The text that became final with this token; "" after a match."""
        if self.matched is not None:
            return ""
        self._num_unchecked -= 1
        if self._skip_special_tokens and self._tokenizer.is_skipped(token_id):
            return ""
        return self._release(self._decoder.push(token_id))

    def extend(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Push several: the new text, and how many were used (fewer than given after a match)."""
        pieces = []
        for index, token_id in enumerate(token_ids):
            pieces.append(self.push(token_id))
            if self.matched is not None:
                return "".join(pieces), index + 1
        return "".join(pieces), len(token_ids)

    def finish(self) -> str:
        """What was held back; no token may follow."""
        if self.matched is not None:
            return ""
        tail = self._decoder.finish()
        self.position += len(tail)
        text, self._held = self._held + tail, ""
        self.offset += len(text)
        return text

    def _release(self, text: str) -> str:
        self.position += len(text)
        automaton = self._automaton
        if automaton is None or self._num_unchecked >= 0:
            self.offset += len(text)
            return text
        held = self._held + text
        self._state, end = automaton.scan(self._state, text)
        if end is None:
            keep = 0 if self._include_stop else automaton.depth[self._state]
            cut = len(held) - keep
            self._held = held[cut:]
        else:
            self.matched = automaton.longest[self._state]
            assert self.matched is not None
            cut = len(held) - len(text) + end
            if not self._include_stop:
                cut -= len(self.matched)
            self._held = ""
        self.offset += cut
        return held[:cut]


class _Automaton:
    """Aho-Corasick over the stop strings: a state is the longest suffix of the text that is the
    beginning of one of them.

    depth    state → length of that suffix
    longest  state → the longest stop string that ends here
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.depth = [0]
        self.longest: list[str | None] = [None]
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        for text in stop:
            self._insert(text)
        self._link()

    def _insert(self, text: str) -> None:
        state = 0
        for char in text:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.longest.append(None)
            state = self._next[state][char]
        self.longest[state] = text

    def _link(self) -> None:
        """Breadth first: where to go on when a character does not fit."""
        queue = list(self._next[0].values())
        for state in queue:
            for char, child in self._next[state].items():
                queue.append(child)
                self._fail[child] = self._step(self._fail[state], char)
            if self.longest[state] is None:
                self.longest[state] = self.longest[self._fail[state]]

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def scan(self, state: int, text: str) -> tuple[int, int | None]:
        """The state after `text`, or at the first match and the index just behind it."""
        if not state and self._next[0].keys().isdisjoint(text):
            return 0, None
        for index, char in enumerate(text):
            state = self._step(state, char)
            if self.longest[state] is not None:
                return state, index + 1
        return state, None


@lru_cache(maxsize=64)
def _automaton(stop: tuple[str, ...]) -> _Automaton:
    return _Automaton(stop)


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteDecoder:
    """Byte-level tokens: the bytes, through Python's incremental decoder, whose replacement of
    broken sequences equals that of `tokenizers` (tested)."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return self._decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._decode(b"", True)


class _WindowDecoder:
    """Any other decoder: decode a window of the last tokens, give what is new.

    The window begins at a token whose predecessors no longer change its text. Runs of
    byte-fallback tokens are held whole: one bad byte changes the text of the entire run.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_given = 0
        self._num_pending = 0

    def push(self, token_id: int) -> str:
        if not self._tokenizer.is_known(token_id):
            return ""
        self._window.append(token_id)
        self._num_pending += 1
        if self._tokenizer.is_byte_fallback(token_id):
            return ""
        text = self._decode()
        if text.endswith("\ufffd") and self._num_pending < MAX_HELD_TOKENS:
            return ""
        return self._give(text)

    def finish(self) -> str:
        return self._give(self._decode()) if self._num_pending else ""

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)

    def _give(self, text: str) -> str:
        new = text[self._num_given :]
        pending = self._window[-self._num_pending :]
        length = len(self._tokenizer.decode(pending, skip_special_tokens=False))
        if length:
            self._window, self._num_given = pending, length
        else:
            # alone these tokens show nothing, so they cannot stand for what precedes
            self._num_given = len(text)
        self._num_pending = 0
        return new
