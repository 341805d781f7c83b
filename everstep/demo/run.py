"""`everstep train --demo`: a real RL run of a small model on one machine, from nothing.

    start ▸ skill ▸ habit ▸ evaluated ▸ engine ⇄ trainer ▸ evaluated ▸ plot, table

Each arrow leaves files in the folder, so the same command goes on behind the last one. The stages
are our own commands in processes of their own; this process starts them and watches their files.
"""

import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..engine.errors import MissingExtra
from ..progress import Stages, duration
from .children import Child
from .progress import Progress, read_progress
from .recipe import Files, Recipe, write_whole
from .view import DemoView, plot

if TYPE_CHECKING:
    from .evaluation import Answers, Evaluation

_LOOK_EVERY_S = 0.25


class Demo:
    """One demo in its folder. Raises ConfigError, and ChildFailed where a stage cannot go on."""

    def __init__(self, folder: Path, seed: int, recipe: Recipe) -> None:
        self._files = Files(folder, seed, recipe)
        self._began_s = time.monotonic()

    def run(self) -> None:
        files = self._files
        goes_on = files.begin()
        _say(f"{'goes on in' if goes_on else 'everything is written into'} {files.folder}")
        try:
            self._make_model()
            self._warm_up("skill", "to subtract: full, right traces")
            self._warm_up("habit", "a bad habit: guesses, traces that stop early")
            before = self._evaluated("before", files.folder / "habit" / "final")
            self._learn()
            after = self._evaluated("after", files.result)
        except KeyboardInterrupt:
            _say("interrupted; the same command goes on")
            raise
        self._show(before, after)

    # --- stages --------------------------------------------------------------------------

    def _make_model(self) -> None:
        """The model that has learned nothing; config.json is the last file of it."""
        start = self._files.start
        if not (start / "config.json").exists():
            from ..trainer_bridge.demo.euclid_model import write_model

            shutil.rmtree(start, ignore_errors=True)
            write_model(start, self._files.seed)

    def _warm_up(self, stage: str, what: str) -> None:
        """A stage of supervised learning, if it is not done."""
        files = self._files
        output, updates = files.folder / stage, files.updates(stage)
        if not _is_done(output):
            began_s = time.monotonic()
            child = Child(stage, ["train", f"{stage}.toml"], files.folder, say=_say)
            with Stages() as stages, child:
                while not child.is_done():
                    stages(f"learns {what}", len(read_progress(output).trained), updates)
                    time.sleep(_LOOK_EVERY_S)
                stages(f"learns {what}", updates, updates)
            last = [line.loss for line in read_progress(output).trained[-20:]]
            loss = math.nan if None in last else sum(filter(None, last)) / max(1, len(last))
            took = duration(time.monotonic() - began_s)
            _say(f"{stage}: {updates} updates in {took}, loss {loss:.4f}")

    def _learn(self) -> None:
        """Engine and trainer side by side, until the trainer has made its last version."""
        files = self._files
        if _is_done(files.rl):
            return
        view = DemoView(files.recipe.iterations)
        engine = Child("engine", files.engine_command(), files.folder, say=view.say)
        trainer = Child("trainer", ["train", "rl.toml"], files.folder, say=view.say)
        try:
            with engine, trainer:
                while not trainer.is_done():
                    engine.is_done()
                    view(read_progress(files.rl, engine.log))
                    time.sleep(_LOOK_EVERY_S)
            view(read_progress(files.rl, engine.log), is_over=True)
        finally:
            view.close()

    def _evaluated(self, when: str, model: Path) -> "Evaluation":
        """By the questions that are held out; once."""
        # torch is loaded here, when it is known to be needed
        from .evaluation import Evaluation, evaluate

        files = self._files
        kept = files.folder / f"{when}.json"
        if kept.exists():
            return msgspec.json.decode(kept.read_bytes(), type=Evaluation)
        found = evaluate(
            model, files.held_out(), seed=files.seed, max_tokens=files.recipe.max_tokens
        )
        write_whole(kept, found)
        _say(
            f"{when}: {found.sampled.right:.1%} of {files.recipe.held_out} held-out questions are "
            f"answered right at T = 1, {found.greedy.right:.1%} greedily"
        )
        return found

    # --- the end -------------------------------------------------------------------------

    def _show(self, before: "Evaluation", after: "Evaluation") -> None:
        from ..offline import show_table

        files = self._files
        progress = read_progress(files.rl, files.folder / "engine.log")
        picture = files.folder / "demo.png"
        try:
            plot(progress, before, after, picture)
            _say(f"the curves are in {picture}")
        except MissingExtra as error:
            _say(f"no plot: {error}")
        rows = [*evaluation_rows(before, after), *run_rows(progress)]
        rows.append(("time of this command", "", duration(time.monotonic() - self._began_s)))
        show_table(rows, header=("", "before", "after"), to_stdout=True)
        _say(
            "The warm-up taught the skill and then the bad habit; RL has removed the habit.\n"
            f"The model is in {files.result}; ask it, with the four digits of two numbers:\n"
            f"  everstep chat {files.result} --temperature 0 --prompt 9678"
        )


def evaluation_rows(before: "Evaluation", after: "Evaluation") -> list[tuple[str, str, str]]:
    """(what, before, after) of held-out questions."""
    pairs = ((before.sampled, after.sampled), (before.greedy, after.greedy))
    rows = []
    for name, (old, new) in zip(("T = 1", "greedy"), pairs, strict=True):
        rows += [
            (f"right, {name}", f"{old.right:.1%}", f"{new.right:.1%}"),
            (f"legal steps, {name}", _share(old.legal), _share(new.legal)),
            (f"length, {name}", _lengths(old), _lengths(new)),
        ]
    return rows


def run_rows(progress: Progress) -> list[tuple[str, str, str]]:
    """(what, nothing, value) of the iterations in between."""
    count = max(1, len(progress.trained))
    masked = progress.metric("mask_fraction")
    mismatch = progress.metric("log_ratio_abs_mean")
    lag = progress.metric("lag_mean")
    values = {
        "iterations": str(len(progress.trained)),
        "samples": str(sum(line.samples for line in progress.trained)),
        "tokens": str(sum(line.tokens for line in progress.trained)),
        "masked, mean": f"{sum(masked) / count:.3%}",
        "|Δ logprob|, mean": f"{sum(mismatch) / count:.1e}",
        "lag, mean": f"{sum(lag) / count:.2f} versions",
        "waste": f"{progress.waste:.1%} of sampled tokens",
        "stall, largest": f"{max(progress.stalls.values(), default=0.0):.1f} ms",
    }
    return [(name, "", value) for name, value in values.items()]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _lengths(answers: "Answers") -> str:
    found = answers.lengths
    return f"mean {answers.mean_length:.1f}, p90 {found.p90}, max {found.most}"


def _is_done(output: Path) -> bool:
    """Whether a training run has written its model."""
    return (output / "final" / "config.json").exists()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
