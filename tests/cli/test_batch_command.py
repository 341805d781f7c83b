"""`everstep batch` as a process: killed at random, it ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from everstep.cli import run

COUNT = 60


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines: list[Any] = [
        {"custom_id": f"c{i}", "prompt": [1 + i, 2, 3], "max_tokens": 12 + i % 10, "n": 1 + i % 2}
        for i in range(COUNT - 2)
    ]
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "logprobs": True}
    lines.append({"method": "POST", "url": "/v1/chat/completions", "body": chat})
    lines.append({"custom_id": "bad", "prompt": [1], "max_tokns": 3})
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(source: Path, target: Path, model: Path) -> list[str]:
    flags = ["--model", str(model), "--max-num-seqs", "4", "--num-threads", "1"]
    return ["batch", str(source), "-o", str(target), *flags, "--max-model-len", "128"]


def test_a_batch_killed_twice_gives_the_bytes_of_one_that_was_not(
    source: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # one line is an error record, so 1
    assert run(arguments(source, whole, tiny_checkpoint)) == 1
    assert len(whole.read_bytes().splitlines()) == COUNT
    err = capsys.readouterr().err
    assert "batch: 100 %" in err
    assert "output tokens" in err
    command = [sys.executable, "-m", "everstep", *arguments(source, killed, tiny_checkpoint)]
    for num_lines in (5, 30):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while not killed.exists() or killed.read_bytes().count(b"\n") < num_lines:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.005)
        # held where it is, so that it cannot be done before it is killed
        process.send_signal(signal.SIGSTOP)
        if num_lines == 5:
            other = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert other.returncode == 2
            assert "another process is writing it" in other.stderr
        process.kill()
        process.communicate()
    assert killed.read_bytes().count(b"\n") < COUNT
    journal = tmp_path / "killed.journal"
    assert journal.exists()
    assert run(arguments(source, killed, tiny_checkpoint)) == 1
    assert sorted(killed.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    assert not list(tmp_path.glob("killed.journal*"))
    # nothing is left to do, and nothing changes
    before = killed.read_bytes()
    assert run(arguments(source, killed, tiny_checkpoint)) == 1
    assert killed.read_bytes() == before


def test_exit_codes_and_refusals(
    source: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": [1, 2]}\n')
    base = ["--model", str(tiny_checkpoint), "--max-tokens", "2", "--max-model-len", "64"]
    assert run(["batch", str(good), "-o", str(tmp_path / "out"), *base]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    for target, word in [
        (good, "is the input"),
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "is not a regular file"),
        (Path("/dev/full"), "is not a regular file"),
        (tmp_path / "none" / "out", "cannot be written"),
    ]:
        assert run(["batch", str(good), "-o", str(target), *base]) == 2
        err = capsys.readouterr().err
        assert word in err
        assert err.count("\n") == 1
    assert run(["batch", str(tmp_path / "nix"), "-o", str(tmp_path / "out"), *base]) == 2
    assert "no such file" in capsys.readouterr().err
    assert run(["batch", str(source)]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "in"
    good.write_text("{}\n")
    (tmp_path / "closed").mkdir(mode=0o500)
    assert run(["batch", str(good), "-o", str(tmp_path / "closed" / "out")]) == 2
    assert "Permission denied" in capsys.readouterr().err
