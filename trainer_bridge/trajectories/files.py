"""Groups from files: JSON lines or Parquet rows as `everstep rollout` writes them, with a reward on
each, and sealed trajectories (`*.evst`), with `reward` in their metadata.

What has no reward is scored where the run has one of its own. Lines of a group need not stand
together. Other fields of a line are not looked at. Torch-free.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from random import Random
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ...engine import log
from ...engine.checkpoint.ring_config import RingConfig
from ...engine.errors import ConfigError, EverstepError, InvalidTrajectory
from ...engine.rollout import TRUNCATED_SUPPORT, Rollout, SamplingParams
from ...engine.trajectory import Trajectory, unpack, unseal
from ..losses.advantages import MAX_REWARD
from ..rewards.rewards import RewardSample, reward_sample
from ..trainer.config import SourceConfig, TrainConfig
from .parquet import json_rows
from .samples import Group, Sample, sample_of

_NOT_RECORDED = 1e-3
_ENDS = (".jsonl", ".parquet", ".evst")


class Line(Struct, kw_only=True):
    """One response."""

    prompt_ids: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
    output_ids: list[Annotated[int, Meta(ge=0)]]
    """For objective `rl` it may be empty: such a response counts in its group and in the batch."""
    group_id: str | None = None
    """Responses with the same one are compared; without it a line is a group of its own."""
    reward: float | None = None
    """For objective `rl`; without one and without a table [reward] the response is no part of its
    group's baseline, and teaches nothing."""
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


class Words(Struct, kw_only=True):
    """What a reward of [reward] sees of a line, beside its metadata's `answer`."""

    text: str
    """The response."""
    prompt: str = ""
    finish_reason: str | dict[str, Any] = "stop"
    """stop or length, or an object whose `type` it is."""
    metadata: Any = None


Score = Callable[[Sequence[RewardSample]], Sequence[float | None]]
"""Rewards in order; None: it could not be had. Every rank must call, and gets the same."""


@dataclass
class _Response:
    """One line. where: it stands; words: for the reward, None where it needs none."""

    where: str
    group: str
    sample: Sample | None
    """None: it has no tokens."""
    reward: float | None
    words: RewardSample | None


@dataclass(frozen=True)
class TrajectoryFiles:
    """All groups of a source, in the order of their first lines.

    num_scored  responses to which `score` gave a reward
    """

    groups: tuple[Group, ...]
    num_scored: int = 0

    @classmethod
    def read(
        cls, config: TrainConfig, ring: RingConfig, score: Score | None = None
    ) -> "TrajectoryFiles":
        """score: the run's own reward, for what has none, or for all with `source.rescore`.

        Raises ConfigError naming file, line and what is wrong.
        """
        found: list[_Response] = []
        for where, line, raw in _lines(Path(config.source.path)):
            try:
                found.append(_response(where, line, raw, config, ring, is_scored=score is not None))
            except EverstepError as error:
                raise ConfigError(f"{where}: {error}") from None
        if not found:
            raise ConfigError(f"source.path: {config.source.path} has no lines")
        wanting = [response for response in found if response.words is not None]
        if score is not None and wanting:
            rewards = score([one.words for one in wanting if one.words is not None])
            for response, reward in zip(wanting, rewards, strict=True):
                response.reward = reward
        if config.objective == "rl":
            _check_rewards(config.source.path, found)
        by_group: dict[str, list[_Response]] = {}
        for response in found:
            by_group.setdefault(response.group, []).append(response)
        groups = [_group(name, members, config) for name, members in by_group.items()]
        return cls(tuple(groups), len(wanting))

    def batch(self, iteration: int, size: int, source: SourceConfig) -> Sequence[Group] | None:
        """The groups of an iteration, `size` of them; None behind the last. The last of an epoch
        may be short."""
        epoch, part = divmod(iteration, -(-len(self.groups) // size))
        if epoch >= source.epochs:
            return None
        order = _order(len(self.groups), source.shuffle, epoch)
        return [self.groups[n] for n in order[part * size : (part + 1) * size]]


@lru_cache(maxsize=1)
def _order(count: int, seed: int | None, epoch: int) -> Sequence[int]:
    """Of an epoch's groups: the same in every process, and after a kill."""
    order = list(range(count))
    if seed is not None:
        Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _lines(path: Path) -> Iterator[tuple[str, Line | Trajectory, bytes]]:
    """(where it stands, what stands there, a line's bytes), files in the order of their names."""
    files = sorted(file for end in _ENDS for file in path.glob(f"*{end}"))
    files = files if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"source.path: {path} has no .jsonl, .parquet or .evst file")
    decoder = msgspec.json.Decoder(Line)
    for file in files:
        where = str(file)
        try:
            if file.suffix == ".evst":
                yield where, unseal(file.read_bytes()), b""
                continue
            for number, text in enumerate(_texts(file), 1):
                where = f"{file}:{number}"
                if text.strip():
                    yield where, decoder.decode(text), text
        except OSError as error:
            raise ConfigError(f"source.path: {file} cannot be read: {error.strerror}") from None
        except (msgspec.MsgspecError, InvalidTrajectory, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: {error}") from None


def _texts(file: Path) -> Iterator[bytes]:
    """Its lines, or its rows as lines."""
    if file.suffix == ".parquet":
        yield from json_rows(file, {*Line.__struct_fields__, *Words.__struct_fields__})
        return
    with file.open("rb") as lines:
        yield from lines


def _response(
    where: str,
    found: Line | Trajectory,
    raw: bytes,
    config: TrainConfig,
    ring: RingConfig,
    *,
    is_scored: bool,
) -> _Response:
    """What a file says of one response. Raises EverstepError for what cannot be trained on."""
    rollout, reward = _rollout(found, config)
    if reward is not None and not abs(reward) <= MAX_REWARD:
        raise ConfigError(f"reward must be finite and at most {MAX_REWARD:g}, got {reward:g}")
    has_tokens = bool(rollout.output_ids) or config.objective == "sft"
    sample = sample_of(rollout, ring, replay=config.routing_replay) if has_tokens else None
    words = None
    if is_scored and (reward is None or config.source.rescore):
        words = _words(where, found, rollout, raw)
    # without groups every example is one
    group = where if config.objective == "sft" else rollout.group_id or where
    return _Response(where, group, sample, reward, words)


def _words(where: str, found: Line | Trajectory, rollout: Rollout, raw: bytes) -> RewardSample:
    """For the reward; what it does not look at may be anything. Raises ConfigError without text."""
    if isinstance(found, Trajectory):
        return msgspec.structs.replace(reward_sample(rollout), id=where)
    try:
        words = msgspec.json.decode(raw, type=Words)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{error}: [reward] scores this line") from None
    reason, metadata = words.finish_reason, words.metadata
    return RewardSample(
        id=where,
        prompt=words.prompt,
        text=words.text,
        answer=metadata.get("answer") if isinstance(metadata, dict) else None,
        metadata=metadata,
        finish_reason=str(reason.get("type", "stop")) if isinstance(reason, dict) else reason,
        num_tokens=len(rollout.output_ids),
    )


def _group(name: str, members: Sequence[_Response], config: TrainConfig) -> Group:
    samples = [replace(m.sample, reward=m.reward) for m in members if m.sample is not None]
    empty = [member.reward for member in members if member.sample is None]
    return Group.of(name, samples, config.advantage_std, empty=empty)


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


def _check_rewards(path: str, found: Sequence[_Response]) -> None:
    """As over the bridge, a response may have none; if nobody has one, they were forgotten."""
    missing = [response for response in found if response.reward is None]
    if len(missing) == len(found) and missing[0].words is None:
        raise ConfigError(
            f"reward is missing on every line of {path}, and the settings have no table [reward] with "
            "a name: objective = 'rl' needs one of them"
        )
    if missing:
        log.event("trainer.no_reward", level="warning", path=path, lines=len(missing))


def _check_temperature(rollout: Rollout) -> None:
    """Lines may leave the temperature out; their own logprobs tell when it was not 1."""
    if rollout.sampling.temperature != 1.0 or len(rollout.lp_raw) != len(rollout.lp_temp):
        return
    pairs = zip(rollout.lp_raw, rollout.lp_temp, strict=True)
    if any(abs(raw - tempered) > _NOT_RECORDED for raw, tempered in pairs):
        raise ConfigError("lp_temp is not lp_raw, so temperature was not 1: it must be on the line")
