"""The other commands, and the server as a process."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from everstep import cli, entry
from everstep.cli import run
from everstep.engine.messages import Stats
from everstep.progress import BatchProgress, Stages, duration
from everstep.server.batches.run import Counts
from everstep.server.launch import StatusLine
from tests.fakes import FakeClock
from tests.serving import Served


def test_version_and_help_need_nothing_heavy() -> None:
    code = """
import sys
from everstep import cli
from everstep.cli import run
assert run(["--version"]) == 0 and run(["serve", "--help"]) == 0
heavy = {"torch", "starlette", "uvicorn", "numpy", "zmq", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("everstep 0.")


def test_every_command_has_patient_threads_before_torch_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(sys, "argv", ["everstep", "chat"])
    monkeypatch.setattr(cli, "run", lambda arguments: 0)
    with pytest.raises(SystemExit):
        entry.main()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_an_interruption_while_the_parser_is_imported_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "-m", "everstep", "chat"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_a_checkpoint_is_made_verified_and_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    assert run(["make-checkpoint", str(folder), "--seed", "3", "--format", "fp8-block"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert run(["make-checkpoint", str(folder)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert run(["verify", str(folder), "--num-tokens", "8"]) == 0
    assert "agrees with the definition" in capsys.readouterr().out
    assert run(["make-checkpoint", str(tmp_path / "x"), "--shape", "huge"]) == 2
    assert "accepted: tiny, mini, flash, 1T" in capsys.readouterr().err


def test_doctor_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--max-num-seqs", "3", "--max-model-len", "64"]) == 0
    out = capsys.readouterr().out
    for word in ("Versions", "torch", "cores", "cache", "numerics", "Kernels", "Settings"):
        assert word in out
    assert re.search(r"engine\.batch\.max_num_seqs +3 +--max-num-seqs", out)
    assert "cannot" not in out


def test_status_line_speaks_only_when_something_ran() -> None:
    def stats(tokens: int, running: int = 0) -> Stats:
        return Stats(
            num_running=running,
            num_waiting=0,
            num_paused=0,
            num_blocks_used=31,
            num_blocks=50,
            steps_total=0,
            prompt_tokens_total=0,
            generation_tokens_total=tokens,
            prefix_queries_total=0,
            prefix_hits_total=0,
            preemptions_total=0,
        )

    line = StatusLine()
    assert line.due(None, 0.0) == {}
    assert line.due(stats(0), 10.0) == {}
    busy = line.due(stats(500, running=4), 20.0)
    assert busy == {"running": 4, "waiting": 0, "kv": 0.62, "tok/s": 50.0, "paused": 0}
    assert line.due(stats(500), 30.0) == {}


def ask(url: str, body: object = None) -> tuple[int, dict[str, object]]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_server_answers_drains_at_sigterm_and_exits_with_0(tiny_checkpoint: Path) -> None:
    flags = ["--port", "0", "--max-model-len", "2048", "--num-threads", "1", "--seed", "11"]
    flags += ["--grace-s", "120"]
    server = subprocess.Popen(
        [sys.executable, "-m", "everstep", "serve", str(tiny_checkpoint), *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        banner = ""
        while "URL" not in banner:
            line = server.stderr.readline()
            assert line, banner
            banner += line
        assert "run seed  11" in banner
        url = re.findall(r"URL +(\S+)/v1", banner)[0]
        assert ask(f"{url}/health") == (200, {"status": "ok"})
        port = url.rsplit(":", 1)[1]
        assert run(["serve", str(tiny_checkpoint), "--port", port]) == 2
        # the stop arrives in the middle of this one, which ends well all the same
        body = {"prompt": [1, 2], "max_tokens": 500, "ignore_eos": True}
        command = f"import json,sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
        with subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"{command}; import test_commands as t; "
                f"print(t.ask({url + '/v1/completions'!r}, {body!r}))",
            ],
            stdout=subprocess.PIPE,
            text=True,
        ) as client:
            while client.poll() is None and "num_requests_running 1" not in metrics(url):
                time.sleep(0.02)
            server.send_signal(signal.SIGTERM)
            assert client.stdout is not None
            answer = client.stdout.read()
        assert answer.startswith("(200,")
        assert "'completion_tokens': 500" in answer
        log = server.stderr.read()
        assert server.wait(60) == 0
        assert "server.draining" in log
        assert "server.stopped" in log
        assert "Traceback" not in log
    finally:
        server.kill()
        server.communicate()


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        return re.sub(r"\{[^}]*\}", "", reply.read().decode()).replace(".0\n", "\n")


def test_progress_without_a_terminal_is_a_line_per_stage_or_ten_seconds() -> None:
    out, clock = io.StringIO(), FakeClock()
    with Stages(out, clock=clock) as stages:
        stages("read", 0, 4)
        clock.advance(11)
        stages("read", 1, 4)
        stages("read", 2, 4)
        clock.advance(1)
        stages("read", 4, 4)
        stages("warm-up", 1, 1)
    assert out.getvalue() == "read: 25 %\nread: done in 12.0 s\nwarm-up: done in 0.0 s\n"


def test_batch_progress_without_a_terminal_is_a_line_per_5_percent_or_10_s() -> None:
    out, clock = io.StringIO(), FakeClock()
    progress = BatchProgress(out, clock=clock)
    for done in range(0, 1001, 10):
        progress(Counts(bytes_done=done, bytes_total=1000, num_answered=done, elapsed_s=done / 10))
    lines = out.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[9] == "batch: 50 %  500 answered, 0 tok/s, 50.0 s left"
    assert lines[-1].startswith("batch: 100 %")
    clock.advance(11)
    progress(Counts(bytes_done=1, bytes_total=1000))
    assert len(out.getvalue().splitlines()) == 21


def test_a_batch_leaves_the_terminal_to_loading_until_it_begins() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with contextlib.closing(BatchProgress(out)) as progress:
        assert out.getvalue() == ""
        progress(Counts(bytes_done=1, bytes_total=1, num_answered=3))
    assert "3 answered" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (8.21, "8.2 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_are_for_people(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_while_it_drains_it_says_so_and_takes_nothing_new(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    server = Served(tiny_checkpoint, tmp_path, "--grace-s", "300")
    try:
        server.start()
        body = json.dumps({"prompt": [1, 2], "max_tokens": 2}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as late:
            # a request that is not whole holds the server until it has its answer
            late.sendall(head.encode() + body[:5])
            while ask(f"{server.url}/health")[0] != 200:
                time.sleep(0.02)
            server.signal(signal.SIGTERM)
            while (found := ask(f"{server.url}/health"))[0] == 200:
                time.sleep(0.02)
            assert found == (
                503,
                {"status": "unavailable", "reason": "the server is shutting down"},
            )
            status, answer = ask(f"{server.url}/v1/completions", {"prompt": [1], "max_tokens": 1})
            assert (status, answer["error"]["code"]) == (503, "service_unavailable")
            assert "everstep:rollouts" in metrics(server.url)
            late.sendall(body[5:])
            assert late.recv(12) == b"HTTP/1.1 503"
        assert server.wait() == 0
    finally:
        server.end()
