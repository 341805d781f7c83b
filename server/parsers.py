"""Reasoning and tool calls in a model's text (MODEL.md 5.4).

One state machine each, fed text in pieces of any size: what it gives depends on the text alone,
not on the pieces, so a streamed reply and a whole one always agree.
"""

import json
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"


class Reasoning(Struct, frozen=True):
    """A piece of the model's reasoning."""

    text: str


class Content(Struct, frozen=True):
    """A piece of the answer."""

    text: str


class ToolCallFound(Struct, frozen=True):
    """One whole call; `arguments` is JSON text."""

    index: int
    name: str
    arguments: str


Event = Reasoning | Content | ToolCallFound


def starts_in_reasoning(prompt: str) -> bool:
    """Whether the rendered prompt opened the reasoning already, as Ring-mini's template does."""
    return prompt.rstrip().endswith(THINK)


def held_length(text: str, tag: str) -> int:
    """Length of the longest suffix of `text` that is a proper beginning of `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


class ReasoningParser:
    """Splits text at `</think>`.

    is_open      output begins inside the reasoning (prompt ended with `<think>`, or it is forced);
                 else a leading `<think>`, after whitespace, opens it
    end_offset   characters of the text up to and including `</think>`; None: not there (yet)

    Newlines that follow `</think>` are dropped. Text without `</think>` is all reasoning once
    it was opened.
    """

    def __init__(self, *, is_open: bool) -> None:
        self._is_open = is_open
        self._state = "start"
        self._buffer = ""
        self._num_taken = 0
        self.end_offset: int | None = None

    @property
    def is_reasoning(self) -> bool:
        """Whether all text so far belongs to the reasoning."""
        return self._state == "reasoning" or (self._state == "start" and self._is_open)

    def feed(self, text: str) -> list[Reasoning | Content]:
        self._buffer += text
        self._num_taken += len(text)
        events: list[Reasoning | Content] = []
        if self._state == "start":
            self._open()
        if self._state == "reasoning":
            events += self._reason()
        if self._state == "gap":
            self._buffer = self._buffer.lstrip("\r\n")
            if self._buffer:
                self._state = "content"
        if self._state == "content" and self._buffer:
            events.append(Content(self._buffer))
            self._buffer = ""
        return events

    def finish(self) -> list[Reasoning | Content]:
        """What was held back as the possible beginning of a tag."""
        text, self._buffer = self._buffer, ""
        if not text or self._state == "gap":
            return []
        return [Reasoning(text) if self.is_reasoning else Content(text)]

    def _open(self) -> None:
        begin = self._buffer.lstrip()
        if begin.startswith(THINK):
            self._state, self._buffer = "reasoning", begin[len(THINK) :]
        elif not THINK.startswith(begin):
            self._state = "reasoning" if self._is_open else "content"

    def _reason(self) -> list[Reasoning | Content]:
        before, tag, after = self._buffer.partition(END_THINK)
        if tag:
            self.end_offset = self._num_taken - len(after)
            self._state, self._buffer = "gap", after
        else:
            keep = held_length(before, END_THINK)
            before, self._buffer = before[: len(before) - keep], before[len(before) - keep :]
        return [Reasoning(before)] if before else []


class ToolParser:
    """Finds `<tool_call>{"name": …, "arguments": …}</tool_call>` blocks in the answer.

    A block is given whole, when it is complete, since a broken one is content instead. Whitespace
    around blocks is dropped (a template puts it back). A last block may be unclosed.
    """

    def __init__(self) -> None:
        self._buffer = ""
        self._in_block = False
        self._searched = 0
        self.num_calls = 0

    def feed(self, text: str) -> list[Content | ToolCallFound]:
        self._buffer += text
        events: list[Content | ToolCallFound] = []
        while True:
            count = len(events)
            was_in_block = self._in_block
            events += self._block() if was_in_block else self._plain()
            if self._in_block == was_in_block and len(events) == count:
                return events

    def finish(self) -> list[Content | ToolCallFound]:
        """The last block, closed or not, and what was held back."""
        events: list[Content | ToolCallFound] = []
        while self._in_block:
            call = self._parse(self._buffer)
            if call is not None:
                self._leave("")
                return [*events, call]
            events.append(self._give_up())
            events += self.feed("")
        if self._buffer and not (self.num_calls and self._buffer.isspace()):
            events.append(Content(self._buffer))
        self._buffer = ""
        return events

    def _plain(self) -> list[Content | ToolCallFound]:
        before, tag, after = self._buffer.partition(TOOL_CALL)
        if tag:
            self._in_block, self._buffer, self._searched = True, after, 0
            before = before.rstrip()
            return [Content(before)] if before else []
        kept = before[: len(before) - held_length(before, TOOL_CALL)].rstrip()
        self._buffer = before[len(kept) :]
        return [Content(kept)] if kept else []

    def _block(self) -> list[Content | ToolCallFound]:
        """Up to the first closing tag that does not stand inside a JSON string."""
        while (end := self._buffer.find(END_TOOL_CALL, self._searched)) >= 0:
            block = self._buffer[:end]
            rest = self._buffer[end + len(END_TOOL_CALL) :]
            call = self._parse(block)
            if call is not None:
                self._leave(rest)
                return [call]
            if not _ends_inside_string(block):
                return [self._give_up()]
            self._searched = end + 1
        self._searched = max(self._searched, len(self._buffer) - len(END_TOOL_CALL) + 1)
        return []

    def _give_up(self) -> Content:
        """A broken block is text up to where it first closes; what follows is looked at again."""
        broken, tag, rest = self._buffer.partition(END_TOOL_CALL)
        self._leave(rest)
        return Content(TOOL_CALL + broken + tag)

    def _leave(self, rest: str) -> None:
        self._in_block, self._buffer, self._searched = False, rest, 0

    def _parse(self, block: str) -> ToolCallFound | None:
        try:
            value: Any = json.loads(block, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or not _is_utf8(name):
            return None
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):
            try:
                json.loads(arguments, parse_constant=_refuse)
            except (ValueError, RecursionError):
                return None
        elif isinstance(arguments, dict):
            text = json.dumps(arguments, ensure_ascii=False)
            arguments = text if _is_utf8(text) else json.dumps(arguments)
        else:
            return None
        if not _is_utf8(arguments):
            return None
        self.num_calls += 1
        return ToolCallFound(self.num_calls - 1, name, arguments)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _is_utf8(text: str) -> bool:
    """False where escapes made half a surrogate pair, which no reply could carry."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _ends_inside_string(block: str) -> bool:
    try:
        json.loads(block)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return False
    return False


class OutputParser:
    """Reasoning, then tool calls in what follows. `None` leaves a part as it is.

    max_calls  further ones are left out; None: any number
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tools: ToolParser | None,
        *,
        max_calls: int | None = None,
    ) -> None:
        self.reasoning = reasoning
        self.tools = tools
        self._max_calls = max_calls

    @property
    def num_calls(self) -> int:
        return self.tools.num_calls if self.tools else 0

    def feed(self, text: str) -> list[Event]:
        pieces: list[Reasoning | Content] = [Content(text)] if text else []
        if self.reasoning is not None:
            pieces = self.reasoning.feed(text)
        return self._through_tools(pieces)

    def finish(self) -> list[Event]:
        pieces = self.reasoning.finish() if self.reasoning is not None else []
        events = self._through_tools(pieces)
        return events + self._kept(self.tools.finish() if self.tools is not None else [])

    def _through_tools(self, pieces: list[Reasoning | Content]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            if self.tools is not None and isinstance(piece, Content):
                events += self._kept(self.tools.feed(piece.text))
            else:
                events.append(piece)
        return events

    def _kept(self, events: Sequence[Event]) -> list[Event]:
        most = self._max_calls
        return [
            event
            for event in events
            if most is None or not isinstance(event, ToolCallFound) or event.index < most
        ]


class Parsed(Struct):
    """A whole output, parsed."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCallFound] = []


def parse_output(text: str, parser: OutputParser) -> Parsed:
    """All of it at once, through the same machine."""
    parsed = Parsed()
    for event in [*parser.feed(text), *parser.finish()]:
        match event:
            case Reasoning(text=piece):
                parsed.reasoning += piece
            case Content(text=piece):
                parsed.content += piece
            case ToolCallFound():
                parsed.calls.append(event)
    return parsed
