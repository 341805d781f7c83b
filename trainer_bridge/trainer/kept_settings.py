"""The settings that a checkpoint was made with, beside those of the run that goes on from it."""

from collections.abc import Mapping
from pathlib import Path

from ...engine.errors import ConfigError
from ...engine.settings import Resolved
from .config import TrainConfig

_FIXED = {
    "objective": "another objective is another run: name another output, and the model of this one",
    "batch.groups": "iterations over files are counted by it",
    "source.shuffle": "iterations over files are counted in its order",
}


def written(config: TrainConfig) -> dict[str, str]:
    """Path → value in JSON, of every setting."""
    return {path: value for path, value, _ in Resolved(config, {}).lines()}


def compared(before: Mapping[str, str], config: TrainConfig, checkpoint: Path) -> str:
    """What has changed since, in a line; nothing where nothing has.

    before  of `written`; empty: not known
    Raises ConfigError for a setting that may not change in the middle of a run.
    """
    changed = {
        path: (before[path], value)
        for path, value in written(config).items()
        if before.get(path, value) != value
    }
    for path, why in _FIXED.items():
        # an engine deals as it likes
        if path in changed and (config.source.path or path == "objective"):
            old, new = changed[path]
            raise ConfigError(f"{path} was {old} in {checkpoint}, and is {new}: {why}")
    if not changed:
        return ""
    words = (f"{path} was {old} and is {new}" for path, (old, new) in changed.items())
    return f"settings changed: {', '.join(words)}"
