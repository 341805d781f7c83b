"""Rollouts as the trainer takes them: what was sampled, with what probability, and its advantage.

Which logprobs are compared follows PAPER.md §1.5: both sides of a ratio use the same transform of
the logits on the same support. Torch-free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engine.checkpoint.ring_config import RingConfig
from ...engine.errors import InvalidTrajectory
from ...engine.rollout import FORCED, TRUNCATED_SUPPORT, Rollout
from ..losses.advantages import Std, group_advantages
from ..trainer.config import Replay
from ..trainer.packing import Floats, Ints, TrainSequence


@dataclass(frozen=True)
class Sample:
    """One response.

    lp_infer   (n,) float32: the engine's logprob of each token of the response, of the distribution
               that the trainer computes; NaN where the rollout has none
    versions   (n,) int64: the weights that sampled each
    undone     (n,) bool: where those weights were another trainer's, which bore the same number in
               an earlier lineage; None: nowhere
    reward     None: it has none, and teaches nothing
    advantage  of the response within its group
    """

    sequence: TrainSequence
    lp_infer: Floats
    versions: Ints
    reward: float | None = None
    advantage: float = 0.0
    undone: npt.NDArray[np.bool_] | None = None

    @property
    def num_tokens(self) -> int:
        """Response tokens that count."""
        mask = self.sequence.mask
        return self.sequence.num_response if mask is None else int(mask.sum())

    def scored(self, column: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Of a column over the response, what stands at tokens that count."""
        return column if self.sequence.mask is None else column[self.sequence.mask]


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, with their advantages.

    samples  those that have tokens
    empty    the rewards of those that have none: nothing of them is trained, and they count in the
             baseline and in the batch
    """

    id: str
    samples: tuple[Sample, ...]
    empty: tuple[float | None, ...] = ()

    @classmethod
    def of(
        cls,
        id: str,
        samples: Sequence[Sample],
        std: Std = "population",
        *,
        empty: Sequence[float | None] = (),
    ) -> "Group":
        """With advantages from all rewards. Raises InvalidRequest for a reward that is none."""
        rewards = [*(sample.reward for sample in samples), *empty]
        pairs = zip(samples, group_advantages(rewards, std=std), strict=False)
        advantaged = tuple(replace(sample, advantage=value) for sample, value in pairs)
        return cls(id, advantaged, tuple(empty))

    @property
    def rewards(self) -> list[float | None]:
        """Of every response."""
        return [*(sample.reward for sample in self.samples), *self.empty]

    @property
    def num_responses(self) -> int:
        """Those without tokens too: the paper's mean over a group divides by all of them."""
        return len(self.samples) + len(self.empty)

    @property
    def num_tokens(self) -> int:
        """Response tokens that count."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def teaches(self) -> bool:
        """Whether any advantage is other than 0."""
        return any(sample.advantage for sample in self.samples)


def sample_of(
    rollout: Rollout,
    config: RingConfig,
    *,
    replay: Replay = "none",
    reward: float | None = None,
    mask: bytes = b"",
    digests: Mapping[int, str] = MappingProxyType({}),
) -> Sample:
    """A rollout as a sample.

    replay   what of its routes is used again
    digests  version → digest of its weights, as far as they are known
    mask     uint8 per output token, 1 where it is trained on; empty: every token that was sampled

    Where its support was cut, logprobs are renormalised over the kept ids if they were recorded;
    without them both sides are tempered and not cut. Raises InvalidTrajectory naming what makes it
    impossible to compute the distribution that was sampled from, or to replay routes.
    """
    sampling = rollout.sampling
    if not sampling.temperature > 0:
        raise _wrong("temperature", "0: a ratio of probabilities needs more")
    penalties = ("presence_penalty", "frequency_penalty", "logit_bias")
    on = [name for name in penalties if getattr(sampling, name)]
    if sampling.repetition_penalty != 1.0:
        on.append("repetition_penalty")
    if on:
        raise _wrong(on[0], "the trainer does not compute it, so the two sides would differ")
    num = len(rollout.output_ids)
    if not rollout.prompt_ids or not num:
        raise _wrong("output_ids", "a prompt and a response of one token at least are needed")
    flags = np.array(rollout.flags or [0] * num, dtype=np.int64)
    is_cut = bool((flags & TRUNCATED_SUPPORT).any())
    has_kept = len(rollout.kept_ids) == num
    lp = rollout.lp_temp if is_cut and not has_kept else rollout.lp_sampled
    counts = (flags & FORCED) == 0
    if mask:
        if len(mask) != num:
            raise _wrong("mask", f"{len(mask)} values for {num} tokens")
        counts &= np.frombuffer(mask, dtype=np.uint8) != 0
    ids, weights = _routes(rollout, config, replay)
    sequence = TrainSequence(
        ids=np.array([*rollout.prompt_ids, *rollout.output_ids], dtype=np.int64),
        num_prompt=len(rollout.prompt_ids),
        temperature=sampling.temperature,
        mask=None if counts.all() else counts,
        kept=rollout.kept_ids if is_cut and has_kept else None,
        routing_ids=ids,
        routing_weights=weights,
    )
    if int(sequence.ids.max()) >= config.vocab_size:
        raise _wrong("output_ids", f"an id is not below vocab_size {config.vocab_size}")
    if max((i for ids in sequence.kept or () for i in ids), default=0) >= config.vocab_size:
        raise _wrong("kept_ids", f"an id is not below vocab_size {config.vocab_size}")
    return Sample(
        sequence,
        lp_infer=np.array(lp or [np.nan] * num, dtype=np.float32),
        versions=np.array(rollout.versions or [0] * num, dtype=np.int64),
        reward=reward,
        undone=_undone(rollout, digests),
    )


def _undone(rollout: Rollout, digests: Mapping[int, str]) -> npt.NDArray[np.bool_] | None:
    """Of `Sample`."""
    found = np.zeros(len(rollout.output_ids), dtype=np.bool_)
    ends = [*(segment.start for segment in rollout.segments[1:]), len(found)]
    for segment, end in zip(rollout.segments, ends, strict=False):
        found[segment.start : end] = digests.get(segment.version, segment.digest) != segment.digest
    return found if found.any() else None


def _routes(
    rollout: Rollout, config: RingConfig, replay: Replay
) -> tuple[Ints | None, Floats | None]:
    """Ids and weights (n − 1, L, K) of all positions but the last, as far as they are replayed."""
    moe_layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    if replay == "none" or not moe_layers:
        return None, None
    rows = len(rollout.prompt_ids) + len(rollout.output_ids) - 1
    shape = (rows, moe_layers, config.num_experts_per_tok)
    width = np.uint8 if config.num_experts <= 256 else np.uint16
    found: list[npt.NDArray[np.generic]] = []
    for name, kind in (("routing_ids", width), ("routing_weights", np.float32)):
        values = np.frombuffer(bytes(getattr(rollout, name)), dtype=kind)
        if values.size != np.prod(shape):
            raise _wrong(name, f"{values.size} numbers, replay needs {shape}: record = ['routing']")
        found.append(values.reshape(shape))
    ids = found[0].astype(np.int64)
    if ids.max() >= config.num_experts:
        raise _wrong("routing_ids", f"expert {ids.max()}, the model has {config.num_experts}")
    return ids, found[1].astype(np.float32) if replay == "weights" else None


def _wrong(field: str, text: str) -> InvalidTrajectory:
    return InvalidTrajectory(f"{field}: {text}", field=field)
