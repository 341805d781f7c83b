"""Rollouts that come with tokens: forks, imports, what a journal brings back.

Each is checked against the model that is here before it may go on.
"""

import time

from msgspec.structs import replace

from ..errors import Conflict, ContextTooLong, InvalidRequest, InvalidTrajectory
from ..messages import Ready
from ..rollout import MAX_SAMPLES, Rollout, RolloutState, check_prompt
from ..tokenizer import Tokenizer
from ..trajectory import Trajectory, pack, unpack
from .intake import new_group_id, new_rollout_id, seed_of

PER_TOKEN = (
    *("output_ids", "lp_sampled", "lp_temp", "kept_mass", "flags", "versions"),
    *("lp_raw", "entropy", "kept_ids", "top"),
)


def check_here(rollout: Rollout, info: Ready) -> None:
    """Raise InvalidRequest (ContextTooLong) unless this model can go on with it."""
    check_prompt(rollout.prompt_ids, vocab_size=info.vocab_size, max_model_len=info.max_model_len)
    rollout.sampling.check(vocab_size=info.vocab_size)
    for position, token in enumerate(rollout.output_ids):
        if not 0 <= token < info.vocab_size:
            raise InvalidRequest(
                f"output_ids: token id {token} at position {position} is outside the vocabulary "
                f"(0..{info.vocab_size - 1})",
                field="output_ids",
            )
    total = len(rollout.prompt_ids) + rollout.max_tokens
    if total > info.max_model_len:
        raise ContextTooLong(
            f"max_tokens: prompt ({len(rollout.prompt_ids)}) and max_tokens "
            f"({rollout.max_tokens}) come to {total} tokens; the context holds "
            f"{info.max_model_len}",
            field="max_tokens",
        )


def forks_of(
    parent: Rollout,
    at: int,
    *,
    samples: int,
    seed: int | None,
    pool: str,
    number: int,
    info: Ready,
) -> list[Rollout]:
    """New rollouts that go on after the first `at` output tokens of `parent`.

    One sample without a seed keeps the parent's: the same noise, so the same continuation.
    number  of the submission, from which the seeds of several samples are derived
    """
    num = len(parent.output_ids)
    if not 0 <= at <= num:
        raise InvalidRequest(
            f"at: {parent.id} has {num} output tokens, got {at}; accepted: 0 to {num}", field="at"
        )
    if not 1 <= samples <= MAX_SAMPLES:
        raise InvalidRequest(
            f"samples must be from 1 to {MAX_SAMPLES}, got {samples}", field="samples"
        )
    group_id = new_group_id()
    seeds = [seed_of(seed, samples, i, "fork", parent.seed, number) for i in range(samples)]
    if seed is None and samples == 1:
        seeds = [parent.seed]
    return [
        replace(
            parent,
            id=new_rollout_id(),
            group_id=group_id,
            index=index,
            seed=own,
            pool=pool,
            forked_from=(parent.id, at),
            state=RolloutState.QUEUED,
            finish_reason=None,
            text="",
            text_offset=0,
            num_preemptions=0,
            created_s=time.time(),
            first_token_s=None,
            ended_s=None,
            **_cut(parent, at, info),
        )
        for index, own in enumerate(seeds)
    ]


def _cut(parent: Rollout, at: int, info: Ready) -> dict[str, object]:
    """Copies of all lists as they were after `at` output tokens."""
    fields: dict[str, object] = {name: getattr(parent, name)[:at] for name in PER_TOKEN}
    fields["segments"] = [segment for segment in parent.segments if segment.start < at]
    # before the first token it is not known how much of the prompt had been computed: all is again
    is_begun = at > 0
    fields["prompt_lp"] = list(parent.prompt_lp) if is_begun else []
    fields["prompt_top"] = list(parent.prompt_top) if is_begun else []
    num_rows = len(parent.prompt_ids) + at - 1 if is_begun else 0
    width, weights = info.routing_widths
    fields["routing_ids"] = parent.routing_ids[: num_rows * width]
    fields["routing_weights"] = parent.routing_weights[: num_rows * weights]
    return fields


def export_of(rollout: Rollout, info: Ready, tokenizer: Tokenizer | None) -> Trajectory:
    """A copy, with what an importer compares."""
    trajectory = pack(rollout)
    trajectory.vocab_size = info.vocab_size
    trajectory.tokenizer = None if tokenizer is None else tokenizer.digest
    return trajectory


def imported(
    trajectory: Trajectory, info: Ready, tokenizer: Tokenizer | None, *, allow_other_weights: bool
) -> Rollout:
    """The rollout, to go on here.

    Raises Conflict where it is of another model, InvalidTrajectory and InvalidRequest, naming the
    field, where it is wrong in itself or too large.
    """
    _check_origin(trajectory, info, tokenizer)
    rollout = unpack(trajectory)
    digests = [segment.digest for segment in rollout.segments]
    if digests and digests[-1] != info.digest and not allow_other_weights:
        raise Conflict(
            f"trajectory: segments: made by the weights {digests[-1][:12]}, here are "
            f"{info.digest[:12]}; set allow_other_weights to go on with these"
        )
    check_here(rollout, info)
    width, weights = info.routing_widths
    num_rows, rest = divmod(len(rollout.routing_ids), max(width, 1))
    most = len(rollout.prompt_ids) + len(rollout.output_ids)
    if rest or num_rows > most or len(rollout.routing_weights) != num_rows * weights:
        raise Conflict(
            f"trajectory: routing_ids: {len(rollout.routing_ids)} bytes with "
            f"{len(rollout.routing_weights)} bytes of weights are no records of this model "
            f"({width} and {weights} bytes per position)"
        )
    if tokenizer is not None:
        skip = rollout.sampling.skip_special_tokens
        whole = tokenizer.decode(rollout.output_ids, skip_special_tokens=skip)
        if not whole.startswith(rollout.text):
            raise InvalidTrajectory("trajectory: text: not what output_ids decode to", field="text")
    if not rollout.state.is_ended and rollout.state is not RolloutState.PAUSED:
        rollout.state = RolloutState.QUEUED
    rollout.is_durable = True
    return rollout


def _check_origin(trajectory: Trajectory, info: Ready, tokenizer: Tokenizer | None) -> None:
    if trajectory.vocab_size is not None and trajectory.vocab_size != info.vocab_size:
        raise Conflict(
            f"trajectory: vocab_size: {trajectory.vocab_size}, this model has {info.vocab_size}"
        )
    here = None if tokenizer is None else tokenizer.digest
    if trajectory.tokenizer is not None and here is not None and trajectory.tokenizer != here:
        raise Conflict(
            f"trajectory: tokenizer: {trajectory.tokenizer[:12]}, this model's is {here[:12]}"
        )
