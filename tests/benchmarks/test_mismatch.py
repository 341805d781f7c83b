"""benchmarks/mismatch.py without its runs: what both sides are started with, what is not run again,
and the tables of runs that are made up."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import mismatch
import mismatch_report
from mismatch_report import Asked, Result

from everstep.demo.recipe import write_whole
from everstep.trainer_bridge.trainer.config import read_config


@pytest.fixture
def seed(tmp_path: Path) -> mismatch.Seed:
    (tmp_path / "seed-4" / "warm-up").mkdir(parents=True)
    return mismatch.Seed(tmp_path, 4)


@pytest.mark.parametrize("method", mismatch_report.METHODS)
def test_fp8_is_on_one_side_and_equal_has_it_on_none(seed: mismatch.Seed, method: str) -> None:
    run = mismatch.Run(seed, method, 1e-3)
    run.folder.mkdir(parents=True)
    run._write_settings()
    config = read_config(run.folder / "rl.toml")
    command = run._engine()
    flags = dict(zip(command[1::2], command[2::2], strict=True))
    if method == "equal":
        assert (config.publish.format, config.numerics.kernels) == ("model", "exact")
        assert (config.loss.name, flags["--numerics"]) == ("none", "exact")
        assert flags["--model"] == config.model
    else:
        assert (config.publish.format, config.numerics.dtype) == ("fp8-experts", "bfloat16")
        assert (config.loss.name, flags["--numerics"]) == (method, "w8a8")
        assert flags["--model"] == str(seed.fp8)
    assert config.publish.keep == config.max_steps == mismatch.ITERATIONS
    assert config.optim.lr == 1e-3


def test_what_is_finished_is_not_run_again(seed: mismatch.Seed, monkeypatch) -> None:
    run = mismatch.Run(seed, "tis", 5e-4)
    run.folder.mkdir(parents=True)
    finish(run.folder, "tis", 5e-4, [0.1, 0.9], [])
    before = run.result.read_bytes()
    monkeypatch.setattr(mismatch, "Child", None)
    run.run()
    assert run.result.read_bytes() == before


def finish(folder: Path, method: str, lr: float, right: list[float], gaps: list[float]) -> None:
    """A run whose iteration n trained n tokens."""
    asked = [Asked(10 * n, share, 30.0) for n, share in enumerate(right)]
    result = Result(
        seed=int(folder.parts[-3].removeprefix("seed-")),
        method=method,
        lr=lr,
        asked=asked,
        learned_s=60.0,
        load=(1.0, 2.0),
    )
    (folder / "rl").mkdir(parents=True, exist_ok=True)
    write_whole(folder / mismatch_report.RESULT, result)
    with (folder / "rl" / "metrics.jsonl").open("w") as file:
        for version, gap in enumerate(gaps, 1):
            metrics = {"tokens": version, "log_ratio_abs_mean": gap, "log_ratio_abs_max": 2 * gap}
            metrics |= {"tokens/lag1": 1, "log_ratio_abs_mean/lag1": gap}
            line = {"version": version, "loss": 0, "samples": 1, "tokens": version, "rows": 1}
            line |= {"seconds": 1, "reward": 0.5, "metrics": metrics}
            file.write(json.dumps(line) + "\n")


def test_tables_are_over_tokens_and_seeds(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    for number, right in ((0, [0.1, 0.5, 0.9]), (1, [0.1, 0.3, 0.2])):
        finish(tmp_path / f"seed-{number}/lr-0.001/none", "none", 1e-3, right, [0.1, 0.4])
    finish(tmp_path / "seed-0/lr-0.001/equal", "equal", 1e-3, [0.1, 0.9], [0.0, 0.0])
    finish(tmp_path / "seed-0/lr-0.002/kpop", "kpop", 2e-3, [0.1, 0.8], [0.2])
    mismatch_report.report(tmp_path, tmp_path)
    text = capsys.readouterr().out
    assert text.count("### Learning rate") == text.count("#### What is learned") == 2
    # sample deviation of 0.9 and 0.2
    assert "| none | 2 | 10.0 ± 0.0 % | 55.0 ± 49.5 % | 50.0 ± 0.0 % | 1 of 2 |" in text
    assert "| none | 10.0, 50.0, 90.0 % | 10.0, 30.0, 20.0 % |" in text
    # (1 · 0.1 + 2 · 0.4) / 3, and of one token of lag 1 each (0.1 + 0.4) / 2
    assert "| none | 0.3 | – |" in text
    assert "| none | 0.25 | – |" in text
    assert "| equal | 0 | – |" in text
    assert (tmp_path / "mismatch.svg").stat().st_size > 10_000
