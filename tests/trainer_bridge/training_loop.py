"""A run of engine and trainer as a user starts them: two commands in a folder."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.trainer_bridge.curve import make_keys

from .training_runs import free_port

ITERATIONS = 5
WAIT_S = 240.0


class Loop:
    """A run in a folder: prompts, settings, and the two commands.

    elsewhere  the trainer is on another host, as far as it knows
    versions   where they are; keep: how many of them stay
    """

    def __init__(
        self,
        folder: Path,
        versions: Path | None = None,
        *,
        kv: str,
        old_policy: str,
        dtype: str = "float32",
        elsewhere: bool = False,
        num_prompts: int = 400,
        iterations: int | None = ITERATIONS,
        keep: int = 4,
    ) -> None:
        self.folder, self.iterations = folder, iterations
        bridge, publish = f"ipc://{folder}/bridge", f'root = "{versions or folder / "versions"}"'
        remote: list[str] = []
        if elsewhere:
            make_keys(folder / "keys")
            bridge, weights = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
            publish = f'endpoints = ["{weights}"]'
            remote = ["--keys", f"{folder}/keys", "--weights-bind", weights]
            remote += ["--weights-root", f"{folder}/versions"]
        make_checkpoint(folder / "model", format="bf16" if dtype == "bfloat16" else "f32", seed=1)
        with (folder / "prompts.jsonl").open("w") as file:
            for number in range(num_prompts):
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
keep = {keep}
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
            *("rollout", "--prompts", f"{folder}/prompts.jsonl"),
            *("--out", f"{folder}/out.jsonl", "--budget", "600", "--group", "4"),
            *("--capacity", "16", "--max-tokens", "60"),
            *("--bridge", bridge, "--run-name", "loop", "--kv", kv),
            *("--reward", f"{folder}/reward.toml"),
            *remote,
            *(() if iterations is None else ("--iterations", str(iterations))),
        ]
        self.embedded = [*self.rollout, "--model", f"{folder}/model", "--dtype", dtype]
        self.train = ["train", f"{folder}/train.toml"]

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "everstep", *command], stdout=log, stderr=log
            )

    def end(self, *processes: subprocess.Popen[bytes]) -> None:
        """All of them well."""
        for process in processes:
            assert process.wait(WAIT_S) == 0, self.log()

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
        versions = [report["version"] for report in self.metrics]
        assert versions == list(range(1, len(versions) + 1))
        assert self.iterations in (None, len(versions))
        lines = self.lines
        counts = Counter(line["group_id"] for line in lines)
        assert set(counts.values()) == {4}
        assert sum(report["samples"] for report in self.metrics) == len(lines)
        assert {line["reward"] for line in lines} <= {0.0, 1.0}
        sampled = {version for line in lines for version, _ in line["versions"]}
        assert max(sampled) >= len(versions) - 2
        assert any(len(line["versions"]) > 1 for line in lines)

    def check_bits(self) -> None:
        """What the trainer computes is what was sampled with, at every token."""
        trained = [report for report in self.metrics if report["trained_groups"]]
        assert sum(report["trained_groups"] for report in trained) >= 4
        assert all(report["grad_norm"][0] > 0 for report in trained)
        assert all(report["metrics"]["log_ratio_abs_max"] == 0 for report in trained)
        assert all(report["metrics"]["mask_fraction"] == 0 for report in trained)
