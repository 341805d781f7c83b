"""A trajectory as a line of the output: what every reader of it gets, in one struct.

Lists from output_ids to flags have one length. Numbers are the engine's: float32 is exact in JSON.
"""

from itertools import groupby
from typing import Any

import msgspec
from msgspec import Struct

from ...engine.rollout import FinishReason, Segment
from ..run.parts import Delivered

Runs = list[tuple[int, int]]


class Earlier(Struct, frozen=True):
    """An attempt of this sample that came to nothing. reason: age, lag, lost, error or abort."""

    attempt: int
    reason: str
    tokens: int


class Trajectory(Struct, frozen=True, kw_only=True):
    """One line. `iterations` says how many tokens were sampled in which iteration."""

    prompt_id: str
    """The line's `id`, else `line-N`."""
    line: int
    epoch: int
    group_id: str
    index: int
    """Which sample of its group."""
    attempt: int
    iteration: int
    """In which its group was complete."""
    iterations: list[tuple[int, int, int]]
    """Run-length: [iteration, version of the weights, number of tokens]."""
    retention: int
    """Iterations that ended while it was under way."""
    finish_reason: FinishReason
    seed: int
    earlier: list[Earlier]
    """Attempts before this one, and what they cost."""
    prompt_ids: list[int]
    output_ids: list[int]
    text: str
    lp_sampled: list[float]
    """ln p under the distribution that was drawn from."""
    lp_temp: list[float]
    """Tempered, untruncated."""
    lp_raw: list[float]
    """T = 1, no processors."""
    kept_mass: list[float]
    flags: list[int]
    """1 sampled, 2 forced, 4 truncated support, added up."""
    kept_ids: list[list[int]]
    """With --record kept_ids: what top-k, top-p or min-p left; empty where they cut nothing."""
    versions: Runs
    """Run-length: [version, number of tokens]."""
    segments: list[Segment]
    """Runs of tokens made under the same weights, KV policy, numerics and core."""
    temperature: float
    """That it was sampled at."""
    reward: float | None
    """What it earned; none without --reward, or where it could not be scored."""
    metadata: Any
    rollout_id: str
    engine: str
    num_preemptions: int
    created_s: float
    """Unix time, as the two below."""
    first_token_s: float | None
    ended_s: float | None


def trajectory_of(delivered: Delivered) -> Trajectory:
    """The line of a delivered sample."""
    rollout, spells = delivered.rollout, delivered.spells
    assert rollout.finish_reason is not None
    return Trajectory(
        prompt_id=delivered.prompt_id,
        line=delivered.prompt.line,
        epoch=delivered.prompt.epoch,
        group_id=rollout.group_id,
        index=delivered.sample.index,
        attempt=delivered.sample.attempt,
        iteration=delivered.iteration,
        iterations=[(spell.iteration, spell.version, spell.count) for spell in spells],
        # it had tokens at each end of an iteration between its first and its last
        retention=spells[-1].iteration - spells[0].iteration if spells else 0,
        finish_reason=rollout.finish_reason,
        seed=rollout.seed,
        earlier=[Earlier(f.sample.attempt, f.reason, f.tokens) for f in delivered.earlier],
        prompt_ids=rollout.prompt_ids,
        output_ids=rollout.output_ids,
        text=rollout.text,
        lp_sampled=rollout.lp_sampled,
        lp_temp=rollout.lp_temp,
        lp_raw=rollout.lp_raw,
        kept_mass=rollout.kept_mass,
        flags=rollout.flags,
        kept_ids=rollout.kept_ids,
        versions=[(version, len(list(run))) for version, run in groupby(rollout.versions)],
        segments=rollout.segments,
        temperature=rollout.sampling.temperature,
        reward=delivered.reward,
        metadata=rollout.metadata,
        rollout_id=rollout.id,
        engine=delivered.engine,
        num_preemptions=rollout.num_preemptions,
        created_s=rollout.created_s,
        first_token_s=rollout.first_token_s,
        ended_s=rollout.ended_s,
    )


encode_line = msgspec.json.Encoder().encode
decode_line = msgspec.json.Decoder(Trajectory).decode
