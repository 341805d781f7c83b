"""Engine and trainer as a user runs them: two commands, and what becomes of kills."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from .memory import memory_folder
from .training_loop import WAIT_S, Loop


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mismatch_is_zero_at_every_token(tmp_path: Path, memory: Path, dtype: str) -> None:
    """KV is computed again at a flip, and old tokens are compared with their own weights. Versions are
    written over each other, and none is seen but whole."""
    loop = Loop(tmp_path, memory, kv="recompute", old_policy="exact", dtype=dtype, keep=2)
    engine, trainer = loop.start(loop.embedded), loop.start(loop.train)
    numbers = numbers_of(memory, trainer)
    loop.end(engine, trainer)
    assert [path.name for path in memory.iterdir() if path.name != "lock"] == ["v5"]
    assert len(set(numbers.values())) < len(numbers)
    loop.check()
    loop.check_bits()
    # a larger --iterations may go on: what an older checkpoint lacks is kept, and what serves
    kept = {path.name for path in (tmp_path / "out.jsonl.spool").iterdir()}
    assert kept == {"iteration-00000004.groups", "serving.json"}
    assert "v5 of the weights stay in" in loop.log()


def numbers_of(versions: Path, trainer: subprocess.Popen[bytes]) -> dict[str, int]:
    """The file of each version, as far as one was seen."""
    found: dict[str, int] = {}
    while trainer.poll() is None:
        for path in versions.glob("v*"):
            with suppress(FileNotFoundError):
                found[path.name] = (path / "model.safetensors").stat().st_ino
        time.sleep(0.02)
    return found


def test_a_run_that_is_over_leaves_its_results_alone(tmp_path: Path) -> None:
    loop = Loop(tmp_path, kv="keep", old_policy="proximal", num_prompts=12, iterations=None)
    loop.end(loop.start(loop.embedded), loop.start(loop.train))
    loop.check()
    assert len(loop.lines) == 48
    for name in ("versions", "out.jsonl.spool", "out.jsonl.journal"):
        assert not (tmp_path / name).exists(), name
    assert (tmp_path / "trained" / "final" / "config.json").exists()


def test_a_trainer_elsewhere_and_its_receiver_killed(tmp_path: Path) -> None:
    """Groups and weights over TCP with keys; the process that takes the weights is killed once."""
    loop = Loop(tmp_path, kv="recompute", old_policy="exact", elsewhere=True)
    processes = [loop.start(loop.embedded), loop.start(loop.train)]
    end_s = time.monotonic() + WAIT_S
    while not (tmp_path / "versions" / "v1").exists():
        assert time.monotonic() < end_s, loop.log()
        time.sleep(0.05)
    os.kill(receiver_of(processes[0].pid), signal.SIGKILL)
    loop.end(*processes)
    loop.check()
    loop.check_bits()
    assert "weights.receiver_died" in loop.log()
    # the engine may go on with what serves, and with nothing else
    assert [path.name for path in (tmp_path / "versions").glob("v*")] == ["v5"]


def receiver_of(parent: int) -> int:
    """The process that takes weights, a child of this one."""
    for line in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in line.read_text().split():
            if b"weights_receiving" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("there is none")


def test_kills_of_both_sides_lose_nothing(tmp_path: Path, memory: Path) -> None:
    loop = Loop(tmp_path, memory, kv="keep", old_policy="proximal", keep=2)
    draw = random.Random(4)
    commands = [loop.embedded, loop.train]
    running = [loop.start(command) for command in commands]
    end_s, num_kills = time.monotonic() + WAIT_S, 0
    while any(process.poll() != 0 for process in running):
        assert time.monotonic() < end_s, loop.log()
        time.sleep(draw.uniform(1.5, 3.0) if num_kills < 4 else 0.1)
        victim = num_kills % 2
        if num_kills < 4 and running[victim].poll() is None:
            running[victim].send_signal(signal.SIGKILL)
            running[victim].wait()
            num_kills += 1
        for number, process in enumerate(running):
            if process.poll() not in (None, 0):
                running[number] = loop.start(commands[number])
    assert num_kills >= 2, loop.log()
    loop.check()


def test_a_trainer_that_lost_its_newest_checkpoint_goes_on_from_the_one_before(
    tmp_path: Path,
) -> None:
    """Its undone iterations are dealt anew, and the engine goes back with it."""
    loop = Loop(tmp_path, kv="recompute", old_policy="exact", iterations=8)
    engine, trainer = loop.start(loop.embedded), loop.start(loop.train)
    checkpoints = tmp_path / "trained" / "checkpoints"
    end_s = time.monotonic() + WAIT_S
    while not (checkpoints / "00000004" / "STABLE").exists():
        assert time.monotonic() < end_s, loop.log()
        assert engine.poll() is trainer.poll() is None, loop.log()
        time.sleep(0.02)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    undone = loop.metrics
    for folder in checkpoints.iterdir():
        if int(folder.name.rpartition("-")[2]) > 2:
            shutil.rmtree(folder)
    loop.end(loop.start(loop.train), engine)
    loop.check()
    loop.check_bits()
    log = loop.log()
    assert "2 iterations were trained" in log
    assert "of a new lineage serves" in log
    # the same groups under the same weights make the same versions
    for before, after in zip(undone, loop.metrics, strict=False):
        assert (before["loss"], before["samples"]) == (after["loss"], after["samples"])
