"""`everstep train`: a run in this process; torchrun has its own way in
(trainer_bridge/fsdp_trainer.py)."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .engine.errors import ConfigError
from .engine.settings import Assignment, load
from .trainer_bridge.trainer.config import read_config


def run_train(file: Path, changes: Sequence[str], *, explains: bool = False) -> None:
    """Train as `file` says, with `changes` (NAME=VALUE) over it.

    explains  say who would send which bytes of the weights instead
    """
    config = read_config(file, [_assignment(change) for change in changes])
    # torch is needed only by a run whose settings are right
    from .trainer_bridge.fsdp_trainer import explain, train

    (explain if explains else train)(config, _say)


def run_demo(folder: Path | None, seed: int, changes: Sequence[str]) -> None:
    """Make a model and train it, with `changes` (NAME=VALUE) over the recipe."""
    from .demo.recipe import Recipe
    from .demo.run import Demo

    recipe = load(Recipe, assignments=[_assignment(change) for change in changes]).config
    Demo(Path(f"demo-{seed}") if folder is None else folder, seed, recipe).run()


def _assignment(change: str) -> Assignment:
    name, equals, value = change.partition("=")
    if not equals:
        raise ConfigError(f"--set {change}: accepted: NAME=VALUE, as in --set loss.name=none")
    return Assignment(name.strip().replace("-", "_"), value.strip(), f"--set {change}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
