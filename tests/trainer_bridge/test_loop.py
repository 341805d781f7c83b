"""Engine and trainer as a user runs them: two commands, and what becomes of kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from everstep.engine.make_checkpoint import make_checkpoint
from everstep.trainer_bridge.curve import make_keys

from .training_runs import free_port

ITERATIONS = 5
WAIT_S = 120.0


class Loop:
    """A run in a folder: prompts, settings, and the two commands."""

    def __init__(
        self,
        folder: Path,
        *,
        kv: str,
        old_policy: str,
        dtype: str = "float32",
        elsewhere: bool = False,
    ) -> None:
        """elsewhere: the trainer is on another host, as far as it knows."""
        self.folder = folder
        bridge, publish = f"ipc://{folder}/bridge", f'root = "{folder}/versions"'
        remote: list[str] = []
        if elsewhere:
            make_keys(folder / "keys")
            bridge, weights = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
            publish = f'endpoints = ["{weights}"]'
            remote = ["--keys", f"{folder}/keys", "--weights-bind", weights]
            remote += ["--weights-root", f"{folder}/versions"]
        make_checkpoint(folder / "model", format="bf16" if dtype == "bfloat16" else "f32", seed=1)
        with (folder / "prompts.jsonl").open("w") as file:
            for number in range(400):
                file.write(json.dumps({"id": f"q{number}", "prompt": f"{number} and"}) + "\n")
        (folder / "reward.toml").write_text('name = "regex"\n[regex]\npattern = "z"\n')
        (folder / "train.toml").write_text(
            f"""
model = "{folder}/model"
output = "{folder}/trained"
hold_versions = 16
[source]
endpoint = "{bridge}"
keys = "{folder / "keys" if elsewhere else ""}"
run = "loop"
deadline_s = 60
[publish]
{publish}
keep = 4
[numerics]
kernels = "exact"
dtype = "{dtype}"
[optim]
lr = 1e-3
[loss]
old_policy = "{old_policy}"
[checkpoint]
every = 2
"""
        )
        self.rollout = [
            *("rollout", "--model", f"{folder}/model", "--prompts", f"{folder}/prompts.jsonl"),
            *("--out", f"{folder}/out.jsonl", "--budget", "600", "--group", "4"),
            *("--capacity", "16", "--max-tokens", "60", "--iterations", str(ITERATIONS)),
            *("--bridge", bridge, "--run-name", "loop", "--kv", kv),
            *("--reward", f"{folder}/reward.toml", "--dtype", dtype),
            *remote,
        ]
        self.train = ["train", f"{folder}/train.toml"]

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "everstep", *command], stdout=log, stderr=log
            )

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    @property
    def metrics(self) -> list[dict]:
        return [
            json.loads(line)
            for line in (self.folder / "trained" / "metrics.jsonl").read_text().splitlines()
        ]

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "out.jsonl").read_text().splitlines()]

    def check(self) -> None:
        """Every iteration was trained once, every group is there once and whole."""
        assert [report["version"] for report in self.metrics] == list(range(1, ITERATIONS + 1))
        lines = self.lines
        counts = Counter(line["group_id"] for line in lines)
        assert set(counts.values()) == {4}
        assert sum(report["samples"] for report in self.metrics) == len(lines)
        assert not list((self.folder / "out.jsonl.spool").iterdir())
        versions = {version for line in lines for version, _ in line["versions"]}
        assert max(versions) >= ITERATIONS - 2
        assert any(len(line["versions"]) > 1 for line in lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mismatch_is_zero_at_every_token(tmp_path: Path, dtype: str) -> None:
    """KV is computed again at a flip, and old tokens are compared with their own weights."""
    loop = Loop(tmp_path, kv="recompute", old_policy="exact", dtype=dtype)
    processes = [loop.start(loop.rollout), loop.start(loop.train)]
    for process in processes:
        assert process.wait(WAIT_S) == 0, loop.log()
    loop.check()
    trained = [report for report in loop.metrics if report["trained_groups"]]
    assert sum(report["trained_groups"] for report in trained) >= 4
    assert all(report["grad_norm"][0] > 0 for report in trained)
    assert all(report["metrics"]["log_ratio_abs_max"] == 0 for report in trained)
    assert all(report["metrics"]["mask_fraction"] == 0 for report in trained)


def test_a_trainer_elsewhere_and_its_receiver_killed(tmp_path: Path) -> None:
    """Groups and weights over TCP with keys; the process that takes the weights is killed once."""
    loop = Loop(tmp_path, kv="recompute", old_policy="exact", elsewhere=True)
    processes = [loop.start(loop.rollout), loop.start(loop.train)]
    end_s = time.monotonic() + WAIT_S
    while not (tmp_path / "versions" / "v1").exists():
        assert time.monotonic() < end_s, loop.log()
        time.sleep(0.05)
    os.kill(receiver_of(processes[0].pid), signal.SIGKILL)
    for process in processes:
        assert process.wait(WAIT_S) == 0, loop.log()
    loop.check()
    assert "weights.receiver_died" in loop.log()
    trained = [report for report in loop.metrics if report["trained_groups"]]
    assert all(report["metrics"]["log_ratio_abs_max"] == 0 for report in trained)


def receiver_of(parent: int) -> int:
    """The process that takes weights, a child of this one."""
    for line in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in line.read_text().split():
            if b"weights_receiving" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("there is none")


def test_kills_of_both_sides_lose_nothing(tmp_path: Path) -> None:
    loop = Loop(tmp_path, kv="keep", old_policy="proximal")
    draw = random.Random(4)
    commands = [loop.rollout, loop.train]
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
