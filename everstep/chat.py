"""A conversation: on a terminal with thinking dimmed and Ctrl-C to stop an answer, or in a pipe."""

import sys
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from .engine.errors import EverstepError, InvalidRequest
from .engine.rollout import Rollout, SamplingParams
from .server.parsers import Content, Reasoning, ReasoningParser, starts_in_reasoning

if TYPE_CHECKING:
    from rich.console import Console

    from .clients.llm import LLM

HELP = """/reset  forget the conversation (a --system message stays)
/help   this
/exit   end (so does Ctrl-D)
Ctrl-C  stop the answer, not the program"""


class Conversation:
    """The messages so far, and how the next answer is made."""

    def __init__(self, llm: "LLM", *, system: str | None, sampling: SamplingParams) -> None:
        self._llm = llm
        self._system = system
        self._sampling = sampling
        self.last: Rollout | None = None
        """The rollout of the latest answer."""
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, text: str) -> Iterator[Reasoning | Content]:
        """The answer in pieces. Whatever was said stays in the conversation, also if it is stopped.

        Raises InvalidRequest (ContextTooLong …), and then the question does not stay.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._llm.tokenizer.render_chat(asked)
        parser = ReasoningParser(is_open=starts_in_reasoning(prompt))
        said, self.last = "", None
        try:
            for delta in self._llm.stream(self._llm.tokenizer.encode(prompt), self._sampling):
                self.last = delta.rollout
                events = parser.feed(delta.text)
                for event in [*events, *(parser.finish() if delta.is_last else [])]:
                    said += event.text if isinstance(event, Content) else ""
                    yield event
        finally:
            if self.last is not None:
                self.messages = [*asked, {"role": "assistant", "content": said}]
        reason = self.last.finish_reason if self.last else None
        if reason is not None and reason.type == "error":
            raise EverstepError(f"the answer failed: {reason.detail}")


def one_answer(conversation: Conversation, text: str, out: IO[str]) -> None:
    """Answer plainly, as it comes."""
    for event in conversation.ask(text):
        if event.text:
            out.write(event.text)
            out.flush()
    out.write("\n")
    out.flush()


def in_a_pipe(conversation: Conversation, lines: Iterator[str], out: IO[str]) -> None:
    """One prompt per line, one conversation, plain answers."""
    for line in lines:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text:
            one_answer(conversation, text, out)


def on_a_terminal(conversation: Conversation, console: "Console") -> None:
    """Ask and answer until /exit or Ctrl-D."""
    import readline  # noqa: F401 - gives input() its line editing

    console.print("Ctrl-C stops an answer, Ctrl-D or /exit ends, /help says more.", style="dim")
    while True:
        try:
            text = input("\n› ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n(Ctrl-D or /exit ends)", style="dim")
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            conversation.reset()
            console.print("(a new conversation)", style="dim")
        elif text == "/help" or (text.startswith("/") and " " not in text):
            console.print(HELP, style="dim")
        elif text:
            _show(conversation, text, console)


def _show(conversation: Conversation, text: str, console: "Console") -> None:
    """Stream one answer; an error or Ctrl-C ends it and nothing else."""
    started = time.monotonic()
    first: float | None = None
    note = ""
    answer = conversation.ask(text)
    try:
        for event in answer:
            first = first or time.monotonic()
            style = "dim" if isinstance(event, Reasoning) else None
            console.print(event.text, style=style, end="", markup=False, soft_wrap=True)
            sys.stdout.flush()
    except KeyboardInterrupt:
        note = ", stopped"
    except InvalidRequest as error:
        console.print(f"error: {error} (/reset begins anew)", style="red")
        return
    except EverstepError as error:
        console.print(f"\nerror: {error}", style="red")
        return
    finally:
        answer.close()  # type: ignore[attr-defined]
    console.print()
    if conversation.last is not None and first is not None:
        if conversation.last.finish_reason and conversation.last.finish_reason.type == "length":
            note = ", cut at the limit"
        console.print(
            statistics(conversation.last, time.monotonic() - started, first - started) + note,
            style="dim",
            highlight=False,
        )


def statistics(rollout: Rollout, seconds: float, first_s: float) -> str:
    """`42 tokens, 31.5 tok/s, first after 0.12 s`."""
    count = len(rollout.output_ids)
    rate = (count - 1) / max(seconds - first_s, 1e-9) if count > 1 else 0.0
    return f"{count} tokens, {rate:.1f} tok/s, first after {first_s:.2f} s"
