"""An optional package that is not installed: one sentence that names the extra, wherever it is wanted."""

import sys

import pytest

from everstep import doctor
from everstep.cli import run
from everstep.demo.evaluation import Answers, Evaluation
from everstep.demo.recipe import Recipe
from everstep.demo.run import Demo
from everstep.trainer_bridge.run.report import Lengths
from everstep.trainer_bridge.trainer import fp8_operations

from .trainer_bridge.training_runs import make_run, write_config


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """As if no extra were installed."""
    for module, _, _ in doctor.EXTRAS.values():
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    fp8_operations._package.cache_clear()


@pytest.fixture
def rollout(tmp_path, tiny_checkpoint):
    """The words of a run of `everstep rollout`, up to --out."""
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt_ids": [1, 2]}\n')
    return ["rollout", "--model", str(tiny_checkpoint), "--prompts", str(prompts), "--out"]


def refused(words: list[str], capsys) -> str:
    assert run(words) == 2
    return capsys.readouterr().err


def test_parquet(rollout, tmp_path, capsys):
    assert refused([*rollout, str(tmp_path / "out.parquet")], capsys) == (
        "error: a Parquet output needs the package 'pyarrow': pip install 'everstep[parquet]'\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_the_numeric_reward(rollout, tmp_path, capsys):
    reward = tmp_path / "reward.toml"
    reward.write_text('name = "numeric"\n')
    words = [*rollout, str(tmp_path / "out.jsonl"), "--bridge", "tcp://127.0.0.1:7001"]
    assert refused([*words, "--reward", str(reward)], capsys) == (
        "error: the numeric reward needs the package 'math-verify': pip install 'everstep[train]'\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "reward.toml"]


def test_fp8_products(tmp_path, capsys):
    file = write_config(make_run(tmp_path), "out")
    assert refused(["train", str(file), "--set", "numerics.fp8=true"], capsys) == (
        "error: numerics.fp8 needs the package 'transformer-engine': pip install 'everstep[gpu]'\n"
    )


def test_the_picture_of_the_demo(tmp_path, capsys):
    """It is the end of a long run, so it costs the picture and nothing else."""
    answers = Answers(0.5, None, 5.0, Lengths(8, 4, 9, 20))
    found = Evaluation(answers, answers)
    Demo(tmp_path / "demo", 0, Recipe())._show(found, found)
    out = capsys.readouterr().out
    assert (
        "no plot: the picture needs the package 'matplotlib': pip install 'everstep[bench]'\n"
    ) in out
    assert "everstep chat" in out


def test_doctor_names_what_is_missing(capsys):
    rows = dict(doctor._extras())
    assert set(rows) == set(doctor.EXTRAS)
    for extra, state in rows.items():
        assert state.endswith(f": pip install 'everstep[{extra}]'")
