"""Rollout ⇄ its JSON, and the events of its stream.

A value of the engine goes to JSON and back without a change: float32 is exact in double. The
exceptions are alternatives of probability 0, whose −inf JSON cannot say: they stand at the floor.
"""

import base64
import binascii
from itertools import groupby

from msgspec import UNSET, UnsetType

from ...engine.errors import InvalidTrajectory
from ...engine.journal.ops import Summary
from ...engine.manager.manager import RolloutManager
from ...engine.rollout import Rollout
from ..openai.logprobs import finite, routing_of
from .wire import PairList, RolloutAnswer, RolloutSummary, RolloutUsage, StreamEvent

# fields that a rollout and its JSON share as they are
_SAME = (
    *("id", "group_id", "index", "pool", "state", "finish_reason", "prompt_ids", "output_ids"),
    *("text", "text_offset", "flags", "segments", "seed", "attempt", "forked_from", "metadata"),
    *("sampling", "max_tokens", "priority", "client", "num_preemptions"),
    *("created_s", "first_token_s", "ended_s"),
)
_LOGPROBS = ("lp_sampled", "lp_temp", "kept_mass")
_RECORDED = ("lp_raw", "entropy", "kept_ids", "prompt_lp")
_ALTERNATIVES = ("top", "prompt_top")


def answer_of(rollout: Rollout, manager: RolloutManager) -> RolloutAnswer:
    """The rollout as JSON. Raises EngineUnavailable where routing has no shape yet."""
    answer = RolloutAnswer(**{name: getattr(rollout, name) for name in (*_SAME, *_LOGPROBS)})
    answer.waits_for = manager.waits_for(rollout)
    answer.versions = run_lengths(rollout.versions)
    for name in _RECORDED:
        if values := getattr(rollout, name):
            setattr(answer, name, values)
    for name in _ALTERNATIVES:
        if lists := getattr(rollout, name):
            setattr(answer, name, [[(i, finite(lp)) for i, lp in pairs] for pairs in lists])
    if rollout.routing_ids:
        answer.routing = routing_of(rollout, manager.known_info)
    answer.usage = RolloutUsage(
        prompt_tokens=len(rollout.prompt_ids),
        completion_tokens=len(rollout.output_ids),
        total_tokens=len(rollout.prompt_ids) + len(rollout.output_ids),
        cached_tokens=rollout.num_cached_tokens,
    )
    return answer


def rollout_of(answer: RolloutAnswer) -> Rollout:
    """The rollout in its JSON; `engine.trajectory.unpack` checks what it holds.

    Raises InvalidTrajectory where that JSON has no rollout's shape.
    """
    rollout = Rollout(**{name: getattr(answer, name) for name in (*_SAME, *_LOGPROBS)})
    rollout.versions = _per_token(answer.versions, len(answer.output_ids))
    for name in (*_RECORDED, *_ALTERNATIVES):
        setattr(rollout, name, _or_empty(getattr(answer, name)))
    if answer.routing is not UNSET:
        rollout.routing_ids = _base64("routing.ids", answer.routing.ids)
        rollout.routing_weights = _base64("routing.weights", answer.routing.weights)
    if answer.usage is not UNSET:
        rollout.num_cached_tokens = answer.usage.cached_tokens
    return rollout


def event_of(rollout: Rollout, start: int, end: int, text: str, *, is_last: bool) -> StreamEvent:
    """Output tokens [start, end) and the text that came with them."""
    return StreamEvent(
        start=start,
        end=end,
        output_ids=rollout.output_ids[start:end],
        lp_sampled=rollout.lp_sampled[start:end],
        lp_temp=rollout.lp_temp[start:end],
        kept_mass=rollout.kept_mass[start:end],
        versions=run_lengths(rollout.versions[start:end]),
        text=text,
        state=rollout.state,
        finish_reason=rollout.finish_reason if is_last else None,
    )


def summary_of(summary: Summary) -> RolloutSummary:
    return RolloutSummary(
        **{name: getattr(summary, name) for name in RolloutSummary.__struct_fields__}
    )


def run_lengths(versions: list[int]) -> list[tuple[int, int]]:
    """[(version, number of tokens)]."""
    return [(version, len(list(run))) for version, run in groupby(versions)]


def _per_token(runs: list[tuple[int, int]], num: int) -> list[int]:
    """Nothing of a length is made before the lengths are known to be true."""
    if any(count < 0 for _, count in runs) or sum(count for _, count in runs) != num:
        raise InvalidTrajectory(
            f"trajectory: versions: the counts do not add up to {num} tokens", field="versions"
        )
    return [version for version, count in runs for _ in range(count)]


def _or_empty(values: list[float] | list[list[int]] | PairList | UnsetType) -> object:
    return [] if values is UNSET else values


def _base64(name: str, text: str) -> bytearray:
    try:
        return bytearray(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise InvalidTrajectory(f"trajectory: {name}: {error}", field=name) from None
