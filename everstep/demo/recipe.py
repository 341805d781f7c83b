"""What `everstep train --demo` does with which numbers, and the files that its commands read."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ..engine.errors import ConfigError
from ..trainer_bridge.demo import euclid
from ..trainer_bridge.demo.euclid import Pair
from ..trainer_bridge.demo.euclid_warm_up import Example, Habit, habit, skill
from ..trainer_bridge.losses.config import LossName

RUN = "demo"
EXAMPLES = 32
"""Of one update of the warm-up."""
_SHORTEST = len(euclid.encode(euclid.guess(1)))
"""Tokens of an answer without a thought: no group takes less of a budget."""


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the demo (`--set NAME=VALUE`)."""

    skill_updates: Annotated[int, Meta(ge=1, description="updates on full, right traces")] = 1100
    skill_lr: Annotated[float, Meta(gt=0, description="largest learning rate there")] = 3e-3
    habit_updates: Annotated[int, Meta(ge=1, description="updates on careless answers")] = 100
    habit_lr: Annotated[float, Meta(gt=0, description="largest learning rate there")] = 5e-4
    guess: Annotated[float, Meta(ge=0, le=1, description="share of answers without a thought")] = (
        0.75
    )
    stop: Annotated[float, Meta(ge=0, le=1, description="share of traces that stop early")] = 0.2
    iterations: Annotated[int, Meta(ge=1, description="of C3PO++, each with one update")] = 30
    lr: Annotated[float, Meta(ge=0, description="learning rate; 0: nothing is learned")] = 5e-4
    loss: Annotated[LossName, Meta(description="the correction of docs/explain/icepop.md")] = (
        "icepop"
    )
    kernels: Annotated[str, Meta(description="numerics.kernels of the trainer")] = "exact"
    budget: Annotated[int, Meta(ge=1, description="Φ: tokens of an iteration")] = 8192
    capacity: Annotated[int, Meta(ge=1, description="Ω: rollouts under way")] = 64
    retention: Annotated[int, Meta(ge=0, description="σ: how often one is cut")] = 3
    group: Annotated[int, Meta(ge=2, description="samples of a question")] = 8
    max_tokens: Annotated[int, Meta(ge=8, description="of one answer")] = 256
    held_out: Annotated[int, Meta(ge=1, description="questions of the evaluations")] = 256

    def check(self) -> None:
        """Raises ConfigError."""
        if self.guess + self.stop > 1:
            raise ConfigError(
                f"guess + stop are shares of one whole: at most 1, got {self.guess + self.stop:g}"
            )


class Kept(Struct, frozen=True):
    """What a folder was begun with."""

    seed: int
    recipe: Recipe


class Files:
    """The folder of one demo.

    Raises ConfigError where it was begun with another seed or recipe, or holds something else.
    """

    def __init__(self, folder: Path, seed: int, recipe: Recipe) -> None:
        recipe.check()
        self.folder, self.seed, self.recipe = folder.absolute(), seed, recipe
        self.start = self.folder / "start"
        self.rl = self.folder / "rl"
        self.result = self.rl / "final"

    def begin(self) -> bool:
        """Write what is missing; returns whether an earlier command had begun here."""
        mark = self.folder / "recipe.json"
        kept = Kept(self.seed, self.recipe)
        if mark.exists():
            self._compare(mark, kept)
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        held_out = frozenset(self.held_out())
        examples = skill(self.seed, held_out)
        self._write_stage("skill", self.start, examples)
        shares = Habit(guess=self.recipe.guess, stop=self.recipe.stop)
        careless = habit(self.seed, held_out, shares)
        self._write_stage("habit", self.folder / "skill" / "final", careless)
        self._write_rl(held_out)
        # the last one: without it all of the above is written again
        write_whole(mark, kept)
        return False

    def held_out(self) -> list[Pair]:
        """Questions that are asked before and after, and never in between."""
        return euclid.held_out(self.seed, self.recipe.held_out)

    def updates(self, stage: str) -> int:
        """Of a stage of the warm-up."""
        return self.recipe.skill_updates if stage == "skill" else self.recipe.habit_updates

    def engine_command(self) -> list[str]:
        """Of `everstep`, in this folder."""
        recipe = self.recipe
        flags = {
            "--model": self.folder / "habit" / "final",
            "--prompts": "prompts.jsonl",
            "--out": "rollouts.jsonl",
            "--budget": recipe.budget,
            "--group": recipe.group,
            "--capacity": recipe.capacity,
            "--retention": recipe.retention,
            "--max-tokens": recipe.max_tokens,
            "--seed": self.seed,
            "--bridge": "ipc://bridge",
            "--run-name": RUN,
            "--reward": "reward.toml",
        }
        return ["rollout", *itertools.chain(*((name, str(flags[name])) for name in flags))]

    def _compare(self, mark: Path, kept: Kept) -> None:
        try:
            found = msgspec.json.decode(mark.read_bytes(), type=Kept)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{mark} is none of this version of the demo: {error}") from None
        if found == kept:
            return
        if found.seed != kept.seed:
            raise ConfigError(
                f"{self.folder} was begun with seed {found.seed}; give that, or another --out"
            )
        name = next(
            name
            for name in Recipe.__struct_fields__
            if getattr(found.recipe, name) != getattr(kept.recipe, name)
        )
        raise ConfigError(
            f"{self.folder} was begun with {name} = {getattr(found.recipe, name)}, this command "
            f"says {getattr(kept.recipe, name)}; give the same, or another --out"
        )

    def _write_stage(self, stage: str, model: Path, examples: Iterable[Example]) -> None:
        """A stage of the warm-up: the learning rate falls over the second half."""
        updates = self.updates(stage)
        lines = (e.line for e in itertools.islice(examples, updates * EXAMPLES))
        _write_lines(self.folder / f"{stage}.jsonl", lines)
        settings = {
            "model": str(model),
            "output": str(self.folder / stage),
            "objective": "sft",
            "source.path": str(self.folder / f"{stage}.jsonl"),
            "batch.groups": EXAMPLES,
            "optim.lr": self.recipe.skill_lr if stage == "skill" else self.recipe.habit_lr,
            "optim.beta2": 0.98,
            "optim.warmup_steps": min(30, 1 + updates // 4),
            "optim.decay_after": updates // 2,
            "optim.decay_steps": updates - updates // 2,
            "optim.final_share": 0.05,
            "checkpoint.every": 100,
        }
        _write_settings(self.folder / f"{stage}.toml", settings)

    def _write_rl(self, held_out: frozenset[Pair]) -> None:
        recipe = self.recipe
        # as many as could be needed, were every answer as short as can be
        count = 2 * recipe.capacity + recipe.iterations * recipe.budget // (
            _SHORTEST * recipe.group
        )
        questions = itertools.islice(euclid.questions(self.seed, held_out), count)
        prompts = (
            {"id": f"q{n}", "prompt": pair.prompt, "metadata": {"answer": f"{pair.answer:02d}"}}
            for n, pair in enumerate(questions)
        )
        _write_lines(self.folder / "prompts.jsonl", prompts)
        reward = {"name": "exact", "after": euclid.END_THINK, "require_stop": True}
        _write_settings(self.folder / "reward.toml", reward)
        settings = {
            "model": str(self.folder / "habit" / "final"),
            "output": str(self.rl),
            "objective": "rl",
            "max_steps": recipe.iterations,
            "source.endpoint": "ipc://bridge",
            "source.run": RUN,
            "numerics.kernels": recipe.kernels,
            "optim.lr": recipe.lr,
            "optim.warmup_steps": 3,
            "loss.name": recipe.loss,
            "publish.root": str(self.folder / "versions"),
            "checkpoint.every": 5,
        }
        _write_settings(self.folder / "rl.toml", settings)


def write_whole(file: Path, value: Struct) -> None:
    """As JSON: the file is there whole, or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(value) + b"\n")
    partial.replace(file)


def _write_lines(file: Path, lines: Iterable[Any]) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def _write_settings(file: Path, settings: dict[str, Any]) -> None:
    """As TOML, whose numbers, texts and truths are those of JSON; dotted names are legal in it."""
    file.write_text("".join(f"{name} = {json.dumps(settings[name])}\n" for name in settings))
