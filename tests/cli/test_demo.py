"""everstep train --demo: the parts, and the whole with real processes and few updates."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.cli import run
from everstep.demo.children import Child, ChildFailed
from everstep.demo.evaluation import Answers, Evaluation, evaluate
from everstep.demo.progress import Progress, TrainerLine, read_progress
from everstep.demo.recipe import Files, Recipe
from everstep.demo.view import DemoView, iteration_line, picture_rows, plot, sparkline
from everstep.engine.errors import ConfigError
from everstep.rollout.view import iteration_line as engine_line
from everstep.trainer_bridge.c3po.ledger import Books
from everstep.trainer_bridge.demo import euclid
from everstep.trainer_bridge.demo.euclid import Verdict
from everstep.trainer_bridge.demo.euclid_model import write_model
from everstep.trainer_bridge.run.report import Lengths
from everstep.trainer_bridge.trainer.config import read_config

TINY = {
    "skill_updates": 4,
    "habit_updates": 2,
    "iterations": 8,
    "budget": 160,
    "capacity": 16,
    "group": 2,
    "max_tokens": 24,
    "held_out": 8,
}


# --- recipe and files ----------------------------------------------------------------------


def test_the_files_of_a_demo_can_be_read_by_its_commands(tmp_path):
    files = Files(tmp_path, 3, msgspec.convert(TINY, Recipe))
    assert files.begin() is False
    for name, updates in (("skill", 4), ("habit", 2), ("rl", 8)):
        config = read_config(tmp_path / f"{name}.toml")
        config.check()
        if name != "rl":
            lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
            assert len(lines) == updates * config.batch.groups
        else:
            assert (config.max_steps, config.loss.name) == (8, "icepop")
    assert files.begin() is True


def test_no_held_out_question_is_learned(tmp_path):
    recipe = msgspec.convert(TINY | {"skill_updates": 60, "habit_updates": 20}, Recipe)
    files = Files(tmp_path, 0, recipe)
    files.begin()
    held_out = {pair.prompt for pair in files.held_out()}
    asked = set()
    for name in ("skill", "habit"):
        for line in (tmp_path / f"{name}.jsonl").read_text().splitlines():
            asked.add(euclid.decode(json.loads(line)["prompt_ids"]))
    for line in (tmp_path / "prompts.jsonl").read_text().splitlines():
        data = json.loads(line)
        pair = euclid.parse(data["prompt"])
        assert data["metadata"]["answer"] == f"{pair.answer:02d}"
        asked.add(data["prompt"])
    assert len(held_out) == 8
    assert len(asked) > 500
    assert not held_out & asked


def test_a_folder_is_of_one_seed_and_one_recipe(tmp_path):
    Files(tmp_path, 0, Recipe(iterations=3, skill_updates=1)).begin()
    with pytest.raises(ConfigError, match="begun with seed 0; give that, or another --out"):
        Files(tmp_path, 1, Recipe(iterations=3, skill_updates=1)).begin()
    with pytest.raises(ConfigError, match=r"begun with lr = 0\.0005, this command says 0\.1"):
        Files(tmp_path, 0, Recipe(iterations=3, skill_updates=1, lr=0.1)).begin()
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"recipe\.json is none of this version of the demo"):
        Files(tmp_path, 0, Recipe(iterations=3, skill_updates=1)).begin()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--demo", "--set", "iteratons=3"], "did you mean iterations"),
        (["--demo", "--set", "guess=0.9"], "guess + stop are shares of one whole: at most 1"),
        (["--demo", "--set", "loss=icepopp"], "loss"),
        (["--demo", "run.toml"], "leave run.toml out"),
        ([], "CONFIG is missing: name a TOML file, or give --demo"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["train", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- progress and view ---------------------------------------------------------------------

counts = st.integers(0, 10**7)


class SomeReport(msgspec.Struct):
    """As much of a Report as a line needs."""

    num_trajectories: int
    tokens_per_s: float


@given(st.lists(counts, min_size=7, max_size=7), counts, st.floats(0, 1e6))
def test_what_the_engine_says_of_an_iteration_is_read_back(numbers, trajectories, speed):
    sampled, delivered, carried, held, purged, regenerated, cancelled = numbers
    books = Books(
        iteration=5,
        opening_carried=0,
        opening_held=0,
        sampled=sampled,
        delivered=delivered,
        carried=carried,
        held=held,
        purged=purged,
        regenerated=regenerated,
        cancelled=cancelled,
    )
    line = engine_line(books, SomeReport(trajectories, speed))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "engine.log"
        log.write_text(f"something else\n{line}\n")
        [got] = read_progress(Path(folder), log).sampled.values()
    wasted = purged + regenerated + cancelled
    assert (got.iteration, got.sampled, got.wasted) == (5, sampled, wasted)
    assert got.tokens_per_s == round(speed)


def trained(version, **fields):
    metrics = {"mask_fraction": 0.01, "log_ratio_abs_mean": 2e-4, "kl_k3": 3e-5, "lag_mean": 0.5}
    defaults = {"loss": 0.1, "samples": 10, "tokens": 200, "rows": 150, "seconds": 2.0}
    return TrainerLine(version=version, metrics=metrics, **{"reward": 0.25, **defaults, **fields})


def test_half_a_line_is_not_read(tmp_path):
    whole = msgspec.json.encode(trained(1)) + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(whole + whole[:40])
    assert [line.version for line in read_progress(tmp_path).trained] == [1]
    assert read_progress(tmp_path / "nowhere").trained == []


def test_numbers_that_are_not_finite_are_read(tmp_path):
    line = msgspec.json.encode(trained(1, loss=math.nan))
    line = line.replace(b'"kl_k3":0.00003', b'"kl_k3":null')
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
    found = read_progress(tmp_path)
    assert found.trained[0].loss is None
    assert found.metric("kl_k3") == [0.0]


class Paper:
    """A stream that is no terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        """Nothing is kept back."""

    def isatty(self):
        return False


def test_a_line_is_said_once_and_waits_for_the_engine(tmp_path):
    log = tmp_path / "engine.log"
    (tmp_path / "metrics.jsonl").write_bytes(
        b"".join(msgspec.json.encode(trained(n)) + b"\n" for n in (1, 2))
    )
    log.write_text(
        "waits for a trainer at ipc://bridge\n"
        "version 1 serves: staged in 0.03 s, canaries differ by 0 at most, stall 4.5 ms\n"
        "iteration 0: 100 sampled | delivered 60, carried 20, held 10, purged 5, regenerated 3, "
        "cancelled 2 | 9 trajectories, 77 tok/s\n"
    )
    progress = read_progress(tmp_path, log)
    assert progress.waste == 0.1
    paper = Paper()
    view = DemoView(2, paper)
    view(progress)
    view(progress)
    assert paper.text == iteration_line(progress, 0, 2) + "\n"
    assert "reward 0.250  length  20.0  masked 1.00%" in paper.text
    assert "77 tok/s  stall 4.5 ms" in paper.text
    view(progress, is_over=True)
    assert paper.text.count("\n") == 2
    names = [name for name, _ in picture_rows(progress, 2)]
    assert {"reward", "length", "masked", "lag", "speed", "stall", "waste"} <= set(names)
    assert picture_rows(Progress(), 2)[0][0] == "iteration"


def test_bars_go_from_nothing_to_the_top():
    assert sparkline([0.0, 0.5, 1.0], 1.0) == "▁▅█"
    assert sparkline([]) == ""


def some_evaluation(right):
    answers = Answers(right, None, 5.0, Lengths(8, 4, 9, 20))
    return Evaluation(answers, answers)


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    progress = Progress(trained=[trained(1), trained(2)])
    picture = tmp_path / "demo.png"
    plot(progress, some_evaluation(0.1), some_evaluation(0.9), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


# --- evaluation ----------------------------------------------------------------------------


def test_answers_are_counted_over_questions_and_steps():
    verdicts = [Verdict(True, 2, 2), Verdict(False, 0, 2), Verdict(False, 0, 0)]
    found = Answers.of(verdicts, [30, 10, 5])
    assert found.right == 1 / 3
    assert found.legal == 0.5
    assert found.mean_length == 15
    assert Answers.of([Verdict(False, 0, 0)], [1]).legal is None


def test_an_evaluation_is_the_same_again(tmp_path):
    model = write_model(tmp_path / "model", 0)
    pairs = euclid.held_out(0, 6)
    found = [evaluate(model, pairs, seed=1, max_tokens=12) for _ in range(2)]
    assert found[0] == found[1]
    # what has learned nothing is not right
    assert found[0].sampled.right == found[0].greedy.right == 0.0


# --- children ------------------------------------------------------------------------------


def test_a_child_that_fails_says_why(tmp_path):
    child = Child("stage", ["train", "nowhere.toml"], tmp_path).start()
    with pytest.raises(ChildFailed, match=r"stage: nowhere\.toml: no such file"):
        until(child.is_done)


def test_children_end_with_a_parent_that_is_killed(tmp_path):
    """Whatever it does: here it waits for an engine that never comes."""
    files = Files(tmp_path, 0, msgspec.convert(TINY, Recipe))
    files.begin()
    write_model(tmp_path / "habit" / "final", 0)
    code = (
        "import sys, time; from pathlib import Path; from everstep.demo.children import Child; "
        "child = Child('trainer', ['train', 'rl.toml'], Path(sys.argv[1])).start(); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with parent:
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    until(lambda: not Path(f"/proc/{pid}").exists())


# --- the whole -----------------------------------------------------------------------------


def until(is_so, limit_s=120.0):
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def child_of(parent, word):
    """The process that a demo started with this word in its command."""
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if folder.name.isdigit() and int(fields[1]) == parent and word.encode() in words:
            return int(folder.name)
    raise AssertionError(f"no {word}")


def command(out, recipe, seed=0):
    settings = itertools.chain(*(("--set", f"{name}={value}") for name, value in recipe.items()))
    return [
        *(sys.executable, "-m", "everstep", "train", "--demo", "--seed", str(seed)),
        *("--out", str(out), *settings),
    ]


def start(out, recipe):
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.Popen(
        command(out, recipe),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # tests that a shell runs in the background ignore it, and so would their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_a_whole_demo_of_few_updates_interrupted_and_with_both_sides_killed(tmp_path):
    out = tmp_path / "demo"
    with start(out, TINY) as process:
        until(lambda: len(read_progress(out / "rl").trained) >= 1)
        children = [child_of(process.pid, word) for word in ("rollout", "rl.toml")]
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted; the same command goes on" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    num_trained = len(read_progress(out / "rl").trained)
    assert num_trained < TINY["iterations"]

    with start(out, TINY) as process:
        until(lambda: len(read_progress(out / "rl").trained) > num_trained)
        os.kill(child_of(process.pid, "rollout"), signal.SIGKILL)
        os.kill(child_of(process.pid, "rl.toml"), signal.SIGKILL)
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "goes on in" in said
    assert "engine was killed by SIGKILL; it goes on as a new process" in said
    assert "trainer was killed by SIGKILL; it goes on as a new process" in said
    progress = read_progress(out / "rl", out / "engine.log")
    assert [line.version for line in progress.trained] == list(range(1, 9))
    assert set(progress.sampled) >= set(range(7))
    assert progress.stalls
    assert "right, greedy" in said
    assert f"everstep chat {out}/rl/final" in said
    after = evaluate(out / "rl" / "final", euclid.held_out(0, 8), seed=0, max_tokens=24)
    assert msgspec.json.decode((out / "after.json").read_bytes(), type=Evaluation) == after

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix != ".png"}
    with start(out, TINY) as again:
        said, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "right, greedy" in said
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_recipe_raises_held_out_accuracy_from_under_20_to_over_80_percent(tmp_path):
    out = tmp_path / "demo"
    subprocess.run(command(out, {}, seed=2), check=True)
    before, after = (
        msgspec.json.decode((out / f"{when}.json").read_bytes(), type=Evaluation)
        for when in ("before", "after")
    )
    assert before.sampled.right < 0.2
    assert before.greedy.right < 0.2
    assert after.sampled.right > 0.8
    assert after.greedy.right > 0.8
