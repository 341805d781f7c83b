"""Groups from files: JSON lines as `everstep rollout` writes them, with a reward on each, and sealed
trajectories (`*.evst`), with `reward` in their metadata.

Lines of a group need not stand together. Other fields of a line are not looked at. Torch-free.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from ...engine import log
from ...engine.checkpoint.ring_config import RingConfig
from ...engine.errors import ConfigError, EverstepError, InvalidTrajectory
from ...engine.rollout import TRUNCATED_SUPPORT, Rollout, SamplingParams
from ...engine.trajectory import Trajectory, unpack, unseal
from ..trainer.config import TrainConfig
from .samples import Group, Sample, sample_of

_NOT_RECORDED = 1e-3


class Line(Struct, kw_only=True):
    """One response."""

    prompt_ids: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
    output_ids: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
    group_id: str | None = None
    """Responses with the same one are compared; without it a line is a group of its own."""
    reward: float | None = None
    """For objective `rl`; a response without one is no part of its group's baseline, and teaches
    nothing."""
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    """That it was sampled at."""
    lp_sampled: list[float] = []
    """Per token of output_ids, as the five below where they are given; needed for objective `rl`."""
    lp_temp: list[float] = []
    lp_raw: list[float] = []
    flags: list[int] = []
    """1 sampled, 2 forced (not trained on), 4 truncated support, added up."""
    kept_ids: list[list[Annotated[int, Meta(ge=0)]]] = []
    """Ids that top-k, top-p or min-p left; empty where they cut nothing."""
    versions: list[tuple[int, int]] = []
    """Run-length: [version of the weights, number of tokens]."""


@dataclass(frozen=True)
class TrajectoryFiles:
    """All groups of a source, in the order of their first lines."""

    groups: tuple[Group, ...]

    @classmethod
    def read(cls, config: TrainConfig, ring: RingConfig) -> "TrajectoryFiles":
        """Raises ConfigError naming file, line and what is wrong."""
        by_group: dict[str, list[Sample]] = {}
        for where, line in _lines(Path(config.source.path)):
            try:
                rollout, reward = _rollout(line, config)
                sample = sample_of(rollout, ring, replay=config.routing_replay, reward=reward)
            except EverstepError as error:
                raise ConfigError(f"{where}: {error}") from None
            # without groups every example is one
            key = where if config.objective == "sft" else rollout.group_id or where
            by_group.setdefault(key, []).append(sample)
        if not by_group:
            raise ConfigError(f"source.path: {config.source.path} has no lines")
        if config.objective == "rl":
            _check_rewards(config.source.path, by_group.values())
        groups = [Group.of(name, found, config.advantage_std) for name, found in by_group.items()]
        return cls(tuple(groups))

    def batch(self, iteration: int, size: int, epochs: int) -> Sequence[Group] | None:
        """The groups of an iteration; None behind the last. The last of an epoch may be short."""
        epoch, part = divmod(iteration, -(-len(self.groups) // size))
        return self.groups[part * size : (part + 1) * size] if epoch < epochs else None


def _lines(path: Path) -> Iterator[tuple[str, Line | Trajectory]]:
    """(where it stands, what stands there), files in the order of their names."""
    files = sorted(file for end in ("jsonl", "evst") for file in path.glob(f"*.{end}"))
    files = files if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"source.path: {path} has no .jsonl or .evst file")
    decoder = msgspec.json.Decoder(Line)
    for file in files:
        where = str(file)
        try:
            if file.suffix == ".evst":
                yield where, unseal(file.read_bytes())
                continue
            with file.open("rb") as lines:
                for number, text in enumerate(lines, 1):
                    where = f"{file}:{number}"
                    if text.strip():
                        yield where, decoder.decode(text)
        except OSError as error:
            raise ConfigError(f"source.path: {file} cannot be read: {error.strerror}") from None
        except (msgspec.MsgspecError, InvalidTrajectory, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: {error}") from None


def _rollout(found: Line | Trajectory, config: TrainConfig) -> tuple[Rollout, float | None]:
    """What a file says of one response, checked as far as the objective needs it."""
    if isinstance(found, Trajectory):
        rollout = unpack(found)
        metadata = rollout.metadata if isinstance(rollout.metadata, dict) else {}
        reward = metadata.get("reward")
        if reward is not None and not isinstance(reward, int | float):
            raise ConfigError(f"metadata.reward must be a number, got {reward!r}")
    else:
        rollout, reward = _rollout_of(found), found.reward
    if config.objective == "rl":
        num = len(rollout.output_ids)
        if len(rollout.lp_sampled) != num:
            raise ConfigError(f"lp_sampled has {len(rollout.lp_sampled)} values for {num} tokens")
        is_cut = any(flag & TRUNCATED_SUPPORT for flag in rollout.flags)
        if is_cut and not rollout.kept_ids and len(rollout.lp_temp) != num:
            raise ConfigError("lp_temp is missing: flags say that sampling cut the support")
        _check_temperature(rollout)
    return rollout, reward


def _rollout_of(line: Line) -> Rollout:
    num = len(line.output_ids)
    versions = [version for version, count in line.versions for _ in repeat(None, count)]
    columns = {name: getattr(line, name) for name in ("lp_temp", "lp_raw", "flags", "kept_ids")}
    for name, values in (*columns.items(), ("versions", versions)):
        if values and len(values) != num:
            raise ConfigError(f"{name} has {len(values)} values for {num} tokens")
    return Rollout(
        id="",
        group_id=line.group_id or "",
        prompt_ids=line.prompt_ids,
        sampling=SamplingParams(temperature=line.temperature),
        seed=0,
        max_tokens=num,
        output_ids=line.output_ids,
        lp_sampled=line.lp_sampled,
        lp_temp=line.lp_temp,
        lp_raw=line.lp_raw,
        flags=line.flags,
        kept_ids=line.kept_ids,
        versions=versions,
    )


def _check_rewards(path: str, groups: Collection[Sequence[Sample]]) -> None:
    """As over the bridge, a response may have none; if nobody has one, they were forgotten."""
    missing = sum(sample.reward is None for group in groups for sample in group)
    if missing == sum(map(len, groups)):
        raise ConfigError(f"reward is missing on every line of {path}; objective = 'rl' needs them")
    if missing:
        log.event("trainer.no_reward", level="warning", path=path, lines=missing)


def _check_temperature(rollout: Rollout) -> None:
    """Lines may leave the temperature out; their own logprobs tell when it was not 1."""
    if rollout.sampling.temperature != 1.0 or len(rollout.lp_raw) != len(rollout.lp_temp):
        return
    pairs = zip(rollout.lp_raw, rollout.lp_temp, strict=True)
    if any(abs(raw - tempered) > _NOT_RECORDED for raw, tempered in pairs):
        raise ConfigError("lp_temp is not lp_raw, so temperature was not 1: it must be on the line")
