"""clients/recipes as their reader runs them: a server of its own, rollouts over HTTP, new weights
into the running engine, and a reward that rises."""

import importlib.util
import signal
import socket
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from statistics import fmean

import pytest
import torch

from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.trainer_bridge.rewards.rewards import FunctionConfig, RewardConfig

RECIPES = Path(__file__).parents[2] / "clients" / "recipes"
REWARD = """
def vowels(sample):
    return sum(letter in "aeiou" for letter in sample.text) / max(1, len(sample.text))
"""


@pytest.fixture
def grpo():
    """The recipe as a module, at a size for a test."""
    spec = importlib.util.spec_from_file_location("recipe_grpo", RECIPES / "grpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PROMPTS, module.GROUP, module.LR = 4, 8, 1e-2
    module.SAMPLING = {"temperature": 1.0, "max_tokens": 12}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def server(tmp_path):
    """URL of an `everstep serve` of a tiny float32 model, in a process."""
    make_checkpoint(tmp_path / "model", shape="tiny", format="f32", seed=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    command = [sys.executable, "-m", "everstep", "serve", "model", "--port", port]
    command += ["--journal", "run.db", "--seed", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def test_the_loop_of_ones_own_learns(grpo, server, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    reward = RewardConfig(name="function", function=FunctionConfig(path="my_rewards:vowels"))
    questions = cycle([{"prompt": prompt} for prompt in ("one", "two", "three", "four")])
    steps = list(grpo.train(server, tmp_path / "model", questions, reward, 10))
    # the engine samples with the newest weights, or the two would be far apart
    assert max(step["log_ratio_abs_max"] for step in steps) < 1e-4
    assert {step["lag_max"] for step in steps} == {0.0}
    rewards = [step["reward"] for step in steps]
    assert fmean(rewards[-3:]) > 1.5 * fmean(rewards[:3]), rewards


def test_the_recipe_can_be_read_at_one_sitting():
    for file in RECIPES.glob("*.py"):
        assert len(file.read_text("utf-8").splitlines()) < 100, file
