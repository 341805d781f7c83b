"""Chat: one shot, in a pipe, and the conversation behind both."""

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.chat import Conversation, in_a_pipe
from everstep.cli import run
from everstep.clients.llm import LLM
from everstep.engine.errors import InvalidRequest
from everstep.engine.rollout import SamplingParams

FLAGS = ["--max-model-len", "256", "--num-threads", "1", "--seed", "7", "--max-tokens", "5"]


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(tiny_checkpoint), max_model_len=256, num_threads=1, seed=7) as made:
        yield made


def conversation(llm: LLM, count: int = 5, system: str | None = None) -> Conversation:
    sampling = SamplingParams(max_tokens=count, seed=1, ignore_eos=True)
    return Conversation(llm, system=system, sampling=sampling)


def test_one_shot_answers_and_ends(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", str(tiny_checkpoint), "--prompt", "hi", *FLAGS, "--ignore-eos"]
    answers = []
    for _ in range(2):
        assert run(arguments) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0].endswith("\n")


def test_a_pipe_gives_plain_answers(
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\n/reset\nsecond\n/exit\nthird\n"))
    assert run(["chat", str(tiny_checkpoint), *FLAGS]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") >= 2
    assert "\x1b" not in captured.out
    assert "warm-up: done" in captured.err


def test_bytes_that_are_no_text_are_one_line(
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", pipe)
    assert run(["chat", str(tiny_checkpoint), *FLAGS]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the text is not Unicode: a lone surrogate ('\\udce9') at char")


def test_turns_stay_until_reset_and_the_system_message_for_good(llm: LLM) -> None:
    talk = conversation(llm, system="Be brief.")
    for text in ("one", "two"):
        list(talk.ask(text))
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_a_stopped_answer_stays_and_ends_its_rollout(llm: LLM) -> None:
    talk = conversation(llm, 200)
    answer = talk.ask("one")
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert len(talk.messages) == 2
    list(conversation(llm).ask("it goes on"))


def test_a_question_that_does_not_fit_does_not_stay(llm: LLM) -> None:
    talk = conversation(llm)
    with pytest.raises(InvalidRequest, match="the context holds 256"):
        list(talk.ask("long " * 300))
    assert talk.messages == []


def test_reset_gives_the_first_answer_again(llm: LLM) -> None:
    out = io.StringIO()
    in_a_pipe(conversation(llm), iter(["a\n", "/reset\n", "a\n"]), out)
    text = out.getvalue()
    assert text[: len(text) // 2] == text[len(text) // 2 :]


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_program(
    tiny_checkpoint: Path,
) -> None:
    parent, child = pty.openpty()
    flags = ["--num-threads", "1", "--max-model-len", "2048", "--ignore-eos", "--seed", "1"]
    arguments = ["chat", str(tiny_checkpoint), *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "everstep", *arguments],
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        preexec_fn=_take_terminal,
    )
    os.close(child)
    try:
        _read_until(parent, "› ")
        os.write(parent, b"hello\r")
        # the prompt is echoed; some of the answer must have come before Ctrl-C
        _read_until(parent, "hello", more=60)
        os.write(parent, b"\x03")
        shown = _read_until(parent, "› ")
        assert "tok/s" in shown
        assert "stopped" in shown
        os.write(parent, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # tests that a shell runs in the background ignore it, and so would their children
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read_until(fd: int, word: str, more: int = 0) -> str:
    seen = b""
    while word.encode() not in seen or len(seen) < seen.index(word.encode()) + len(word) + more:
        seen += os.read(fd, 1024)
    return seen.decode(errors="replace")
