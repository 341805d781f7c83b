"""Small training runs for the tests: a tiny MoE, lines of trajectories, and processes that train."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from ..engine.ring_draws import Draw, base_config, write_checkpoint

VOCAB = 64


def make_run(folder: Path, *, groups: int = 10, samples: int = 3, seed: int = 0) -> Path:
    """A float32 checkpoint and lines of trajectories; returns the folder."""
    write_checkpoint(folder / "model", Draw(config=base_config(), seed=seed))
    random = np.random.default_rng(seed)
    lines = []
    for group in range(groups):
        prompt = random.integers(0, VOCAB, random.integers(1, 6)).tolist()
        for _ in range(samples):
            count = int(random.integers(1, 14))
            line = {
                "prompt_ids": prompt,
                "output_ids": random.integers(0, VOCAB, count).tolist(),
                "lp_sampled": random.uniform(-5, -3.5, count).tolist(),
                "group_id": f"g{group}",
                # the last group teaches nothing
                "reward": 1.0 if group == groups - 1 else float(random.integers(0, 2)),
                "versions": [[0, count]],
                "rollout_id": "not looked at",
            }
            lines.append(json.dumps(line))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_config(folder: Path, output: str, **sections: dict) -> Path:
    """A TOML file for a run of `make_run`'s folder into folder/output."""
    values = {
        "batch": {"groups": 4, "max_rows": 60},
        "optim": {"lr": 1e-2},
        "source": {"path": str(folder / "data.jsonl"), "epochs": 2},
        "checkpoint": {"every": 2},
    }
    top = {"model": str(folder / "model"), "output": str(folder / output)}
    for name, section in sections.items():
        if isinstance(section, dict):
            values.setdefault(name, {}).update(section)
        else:
            top[name] = section
    text = [f"{name} = {json.dumps(value)}" for name, value in top.items()]
    for name, section in values.items():
        text.append(f"[{name}]")
        text += [f"{key} = {_toml(value)}" for key, value in section.items()]
    file = folder / f"{output}.toml"
    file.write_text("\n".join(text) + "\n")
    return file


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def start(
    config: Path, *arguments: str, rank: int = 0, size: int = 1, port: int = 0
) -> subprocess.Popen:
    """One rank as a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    if size > 1:
        env |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-m", "everstep.trainer_bridge.fsdp_trainer", str(config), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def reports(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
