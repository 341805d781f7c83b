"""`everstep rollout` as a process: killed at random, it ends as if it had not been."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from everstep.cli import run
from everstep.engine.checkpoint.ring_config import read_config
from everstep.engine.native import ThreadBackend
from everstep.rollout import embedded as rollout_embedded
from everstep.trainer_bridge.run.file import RunFile
from everstep.trainer_bridge.run.words import Tally
from everstep.trainer_bridge.trainer.config import SourceConfig, TrainConfig
from everstep.trainer_bridge.trajectories.files import TrajectoryFiles
from everstep.trainer_bridge.trajectories.record import Trajectory, decode_line

GROUP = 3
NUM_PROMPTS = 14
# what depends on the clock, and on where iterations happened to cut
_CHANGING = (
    *("iteration", "iterations", "retention", "segments", "rollout_id", "num_preemptions"),
    *("created_s", "first_token_s", "ended_s", "group_id"),
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines: list[Any] = [
        {
            "id": f"p{i}",
            "prompt_ids": [1 + i, 2, 3],
            "sampling": {"max_tokens": 10 + 7 * (i % 5), "ignore_eos": True},
            "metadata": {"answer": i},
        }
        for i in range(NUM_PROMPTS - 2)
    ]
    lines.append({"prompt": "Once upon a time", "sampling": {"max_tokens": 20, "top_p": 0.8}})
    lines.append({"messages": [{"role": "user", "content": "hi"}], "sampling": {"max_tokens": 9}})
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def core_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is loaded once, not by a process for each command."""
    monkeypatch.setattr(rollout_embedded, "ProcessBackend", ThreadBackend)


def arguments(prompts: Path, out: Path, model: Path, *more: str) -> list[str]:
    flags = ["--budget", "64", "--group", str(GROUP), "--capacity", "7", "--retention", "100"]
    engine = ["--model", str(model), "--num-threads", "1", "--max-model-len", "128"]
    return ["rollout", "--prompts", str(prompts), "--out", str(out), *flags, *engine, *more]


def lines_of(path: Path) -> list[Trajectory]:
    return [decode_line(line) for line in path.read_bytes().splitlines()]


def lasting(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What a trajectory is, whatever was killed on its way."""
    found = {}
    for line in path.read_bytes().splitlines():
        fields = json.loads(line)
        assert fields["attempt"] == 0
        for name in _CHANGING:
            del fields[name]
        found[fields["prompt_id"], fields["index"]] = fields
    return found


def check_whole(path: Path) -> None:
    """One line per sample, groups whole and in one piece, columns of one length."""
    lines = lines_of(path)
    assert len(lines) == GROUP * NUM_PROMPTS
    for start in range(0, len(lines), GROUP):
        group = lines[start : start + GROUP]
        assert [one.index for one in group] == list(range(GROUP))
        assert len({(one.prompt_id, one.group_id, one.iteration) for one in group}) == 1
    for one in lines:
        count = len(one.output_ids)
        columns = (one.lp_sampled, one.lp_temp, one.lp_raw, one.kept_mass, one.flags)
        assert {len(column) for column in columns} == {count}
        assert sum(number for _, number in one.versions) == count
        assert sum(number for _, _, number in one.iterations) == count
        assert one.segments[0].start == 0
        assert one.retention == one.iterations[-1][0] - one.iterations[0][0]
    assert len({one.seed for one in lines}) == len(lines)


def start(command: list[str]) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "everstep", *command]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def test_lines_with_a_reward_can_be_trained_on_as_they_are(
    tmp_path: Path,
    tiny_checkpoint: Path,
    core_on_a_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts, out, reward = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "reward.toml"))
    line = {"prompt_ids": [1, 2], "sampling": {"max_tokens": 9, "ignore_eos": True}}
    prompts.write_text("".join(json.dumps(line | {"id": f"p{i}"}) + "\n" for i in range(4)))
    (tmp_path / "my_reward.py").write_text("def length(sample):\n    return len(sample.text) / 8\n")
    monkeypatch.chdir(tmp_path)
    reward.write_text('name = "function"\n[function]\npath = "my_reward:length"\n')
    more = ["--reward", str(reward), "--temperature", "0.7", "--top-k", "5"]
    command = arguments(prompts, out, tiny_checkpoint, *more, "--record", "kept_ids")
    assert run(command) == 0
    lines = lines_of(out)
    assert {one.temperature for one in lines} == {0.7}
    assert [one.reward for one in lines] == [len(one.text) / 8 for one in lines]
    assert all(0 < len(ids) <= 5 for one in lines for ids in one.kept_ids)
    config = TrainConfig(model=str(tiny_checkpoint), output="-", source=SourceConfig(path=str(out)))
    files = TrajectoryFiles.read(config, read_config(tiny_checkpoint))
    assert len(files.groups) == 4
    samples = [sample for group in files.groups for sample in group.samples]
    assert {sample.sequence.temperature for sample in samples} == {0.7}
    assert all(sample.sequence.kept is not None for sample in samples)


def test_what_cannot_be_recorded_is_named(
    prompts: Path, tmp_path: Path, tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run(arguments(prompts, out, tiny_checkpoint, "--record", "kept_ids,routes")) == 2
    assert capfd.readouterr().err == "error: --record is 'routes'; accepted: kept_ids, routing\n"


def test_a_run_killed_at_random_has_the_trajectories_of_one_that_was_not(
    prompts: Path, tmp_path: Path, tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert run(arguments(prompts, whole, tiny_checkpoint)) == 0
    said = capfd.readouterr()
    assert said.out == f"{whole}\n"
    assert "iteration 0: 64 sampled | delivered" in said.err
    check_whole(whole)
    assert not list(tmp_path.glob("whole.jsonl.journal*"))
    by_id = {(one.prompt_id, one.index): one for one in lines_of(whole)}
    assert by_id["p3", 1].metadata == {"answer": 3}
    assert by_id["p3", 1].finish_reason.type == "length"
    assert len(by_id["p3", 1].output_ids) == 31
    assert ("line-13", 0) in by_id

    command = arguments(prompts, killed, tiny_checkpoint)
    for number, wait_s in enumerate((0.2, 0.0, 0.5)):
        process = start(command)
        before = killed.stat().st_size if killed.exists() else 0
        # begun, for the first; for the others also some way on
        while not (tmp_path / "killed.jsonl.journal").exists() or (
            number and killed.stat().st_size == before
        ):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.005)
        time.sleep(wait_s)
        # held where it is, so that it cannot be done before it is killed
        process.send_signal(signal.SIGSTOP)
        if number == 1:
            other = start(command)
            _, error = other.communicate(timeout=60)
            assert other.returncode == 2
            assert b"another process runs with it" in error
            assert error.count(b"\n") == 1
        process.kill()
        process.communicate()
    assert run(command) == 0
    capfd.readouterr()
    check_whole(killed)
    assert lasting(killed) == lasting(whole)
    with_file(tmp_path / "killed.jsonl.run")
    # nothing is left to do, and nothing changes
    before = killed.stat().st_mtime_ns
    assert run(command) == 0
    assert killed.stat().st_mtime_ns == before


def with_file(path: Path) -> None:
    file = RunFile.open(path)
    tally = file.read("tally", 0, Tally)
    file.close()
    assert tally is not None
    assert tally.num_trajectories == GROUP * NUM_PROMPTS
    assert sum(tokens for _, tokens in tally.endings.values()) > 0


@pytest.mark.usefixtures("core_on_a_thread")
def test_parquet_has_what_the_lines_have(
    prompts: Path, tmp_path: Path, tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines, table = tmp_path / "out.jsonl", tmp_path / "out.parquet"
    assert run(arguments(prompts, lines, tiny_checkpoint)) == 0
    first = arguments(prompts, table, tiny_checkpoint, "--iterations", "2")
    assert run(first) == 0
    assert capfd.readouterr().out == f"{lines}\n{table}.lines\n"
    assert not table.exists()
    assert run(arguments(prompts, table, tiny_checkpoint)) == 0
    assert not Path(f"{table}.lines").exists()
    rows = pyarrow.parquet.read_table(table).to_pylist()
    by_id = {(one.prompt_id, one.index): one for one in lines_of(lines)}
    assert len(rows) == len(by_id)
    for row in rows:
        one = by_id[row["prompt_id"], row["index"]]
        for name in ("output_ids", "prompt_ids", "lp_sampled", "lp_temp", "lp_raw", "kept_mass"):
            assert row[name] == getattr(one, name), name
        assert json.loads(row["metadata"]) == one.metadata
        assert [(run["version"], run["count"]) for run in row["versions"]] == one.versions
        assert row["finish_reason"]["type"] == one.finish_reason.type
        assert row["seed"] == one.seed
        assert row["text"] == one.text
    # nothing is left to do, and nothing changes
    whole = table.read_bytes()
    assert run(arguments(prompts, table, tiny_checkpoint)) == 0
    assert table.read_bytes() == whole
    assert not Path(f"{table}.lines").exists()


@pytest.mark.usefixtures("core_on_a_thread")
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_a_run_has_written_is_not_made_anew_empty(
    suffix: str, tmp_path: Path, tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / f"out.{suffix}"
    path.write_text('{"prompt_ids": [1, 2], "sampling": {"max_tokens": 2}}\n')
    command = arguments(path, out, tiny_checkpoint)
    assert run(command) == 0
    out.unlink()
    capfd.readouterr()
    assert run(command) == 2
    assert "has 0 bytes, and the run has written" in capfd.readouterr().err
    assert not out.exists() or not out.stat().st_size


@pytest.mark.usefixtures("core_on_a_thread")
def test_a_bad_line_is_named_and_good_ones_are_delivered(
    tmp_path: Path, tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(
        '{"prompt_ids": [1, 2]}\n'
        '{"prompt_ids": [1], "tmperature": 2}\n'
        "\n"
        "no json\n"
        '{"id": "x", "prompt_ids": [5], "sampling": {"temperature": -1}}\n'
        '{"id": "x", "prompt_ids": [100000]}\n'
        '{"prompt_ids": [3], "sampling": {"max_tokens": 4000}}\n'
        '{"prompt_ids": [4]}\n'
        '{"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"tools": []}}\n'
    )
    command = arguments(path, out, tiny_checkpoint, "--max-tokens", "5")
    assert run(command) == 1
    err = capfd.readouterr().err
    for text in (
        f"{path}:2: tmperature is no field here",
        f"{path}:4: the line is not JSON",
        f"{path}:5: sampling.temperature must be",
        f"{path}:6: id 'x' is that of an earlier line",
        f"{path}:7: max_tokens",
        f"{path}:9: chat_template_kwargs may not set tools",
    ):
        assert text in err
    assert "bad lines" in err
    assert "warning" not in err
    assert {one.prompt_id for one in lines_of(out)} == {"line-1", "line-8"}
    assert len(lines_of(out)) == 2 * GROUP


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--budget", "0"], "budget is 0; accepted"),
        (["--retention", "-1"], "retention is -1; accepted"),
        (["--capacity", "0"], "capacity is 0; accepted"),
        (["--group", "0"], "group is 0; accepted"),
        (["--mode", "both"], "both"),
        (["--iterations", "0"], "--iterations"),
        (["--epochs", "0"], "--epochs"),
        (["--budgt", "3"], "no such flag: --budgt; did you mean --budget?"),
        (["--temperature", "0"], "temperature is 0"),
        (["--server", "localhost:1"], "--server must begin with http"),
        (["--server", "http://a,http://a/"], "--server names http://a twice"),
        (["--keys", "keys"], "--keys is for a run with a trainer: name --bridge too"),
        (["--journal", "off"], "journal.path is off"),
        (["--engine.batch.max-num-seqs", "0"], "engine.batch.max_num_seqs must be"),
        (["--max-reissues", "-2"], "max_reissues is -2; accepted"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    prompts: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    flags: list[str],
    text: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run(arguments(prompts, tmp_path / "out.jsonl", tiny_checkpoint, *flags)) == 2
    err = capfd.readouterr().err
    assert text in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_bad_files_are_one_line_and_change_nothing(
    prompts: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "foreign.jsonl").write_text("{}\n")
    (tmp_path / "rows.parquet.lines").write_text("{}\n")
    (tmp_path / "lost.jsonl.journal").write_text("")
    (tmp_path / "other.jsonl.run").write_text("no run file, surely")
    before = sorted(tmp_path.iterdir())
    for out, text in (
        (tmp_path / "out.txt", "--out must end in .jsonl or .parquet"),
        (tmp_path / "none" / "out.jsonl", "cannot be written"),
        (prompts, "is the input"),
        (tmp_path / "foreign.jsonl", "there is no foreign.jsonl.run beside it"),
        (tmp_path / "rows.parquet", "there is no rows.parquet.run beside it"),
        (tmp_path / "lost.jsonl", "is of a run whose lost.jsonl.run is gone"),
        (tmp_path / "other.jsonl", "no file of a rollout run"),
    ):
        assert run(arguments(prompts, out, tiny_checkpoint)) == 2
        err = capfd.readouterr().err
        assert text in err
        assert err.count("\n") == 1
    out = tmp_path / "out.jsonl"
    for source in (tmp_path / "nix.jsonl", tmp_path):
        assert run(arguments(source, out, tiny_checkpoint)) == 2
        assert capfd.readouterr().err.count("\n") == 1
    assert run(arguments(prompts, out, tmp_path / "no-model")) == 2
    assert "no-model" in capfd.readouterr().err
    assert run(["rollout", "--out", str(out)]) == 2
    assert "--prompts is missing" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(arguments(prompts, tmp_path / "o.parquet", tiny_checkpoint)) == 2
    assert "pip install 'everstep[parquet]'" in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("core_on_a_thread")
def test_another_command_on_a_run_is_refused_and_a_longer_one_goes_on(
    prompts: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out.jsonl"
    base = arguments(prompts, out, tiny_checkpoint)
    assert run([*base, "--iterations", "1"]) == 0
    err = capfd.readouterr().err
    assert "a larger --iterations goes on" in err
    # 64 tokens over 7 rollouts, 100 times
    assert err.count("warning: rollouts of more than 900 tokens (--retention 100") == 1
    size = out.stat().st_size
    for flags, text in (
        (["--seed", "5"], "seed 0, now it is 5"),
        (["--epochs", "2"], "epochs 1, now it is 2"),
        (["--temperature", "0.5"], "sampling"),
        (["--group", "2"], "group is 2"),
    ):
        assert run([*base, *flags]) == 2
        err = capfd.readouterr().err
        assert text in err
        assert err.count("\n") == 1
    changed = prompts.read_text().replace('"p0"', '"q0"')
    prompts.write_text(changed)
    assert run(base) == 2
    assert "lines are not those that the run has read" in capfd.readouterr().err
    assert out.stat().st_size == size
    prompts.write_text(changed.replace('"q0"', '"p0"'))
    # all of it moves, and the command is given from there
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (prompts, *tmp_path.glob("out.jsonl*")):
        path.rename(moved / path.name)
    monkeypatch.chdir(moved)
    again = arguments(Path(prompts.name), Path("out.jsonl"), tiny_checkpoint, "--budget", "500")
    assert run(again) == 0
    check_whole(moved / "out.jsonl")
