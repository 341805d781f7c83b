"""The trainer's side of the canaries: what its model says of a few sequences, beside its weights.

An engine scores them again in the weights that it received (engine/model/canaries.py), before they serve.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from ...engine.checkpoint.manifest import Canary, signs
from ...engine.model.numerics import numerics_id
from ..trajectories.samples import Group
from ..weights.layout import WeightLayout
from .packing import PackedBatch, TrainSequence, pack
from .sharding import World, reshard
from .trainable import TrainableRing
from .trainable_operations import wide

# tokens of a sequence that becomes one; longer ones are cut
_MAX_TOKENS = 128
Text = tuple[list[int], int]
"""Token ids, and how many of them are the prompt."""


def texts_of(groups: Sequence[Group], count: int) -> list[Text]:
    """Of at most `count` groups the first sample, cut to its first tokens.

    Where the prompt alone is as long as that, its second half is scored as if it were the response:
    any text tells weights apart.
    """
    sequences = [group.samples[0].sequence for group in groups if group.samples][:count]
    found = []
    for sequence in sequences:
        ids = sequence.ids[:_MAX_TOKENS].tolist()
        is_all_prompt = sequence.num_prompt >= len(ids)
        found.append((ids, len(ids) // 2 if is_all_prompt else sequence.num_prompt))
    return found


@torch.no_grad()
def make_canaries(
    ring: TrainableRing, world: World, texts: Sequence[Text], layout: WeightLayout | None = None
) -> list[Canary]:
    """The first rank's texts, scored by the weights as they are: logprobs at T = 1, and a number
    for each layer and position. Collective.

    layout  how they are published: where that is FP8, what it does to the numbers is told too
    """
    said = world.same(msgspec.json.encode(texts).decode())
    shared = msgspec.json.decode(said, type=list[Text])
    if not shared:
        return []
    batch = pack([_whole(ids, num_prompt) for ids, num_prompt in shared]).to(world.device)
    lp, prints, dtype = _scored(ring, world, batch)
    drifts: list[list[float]] | None = None
    if layout is not None and layout.is_fp8:
        with layout.as_stored():
            _, stored, _ = _scored(ring, world, batch)
        drifts = [
            [_distance(*pair) for pair in zip(one, other, strict=True)]
            for one, other in zip(prints, stored, strict=True)
        ]
    counts = torch.bincount(batch.responses[0], minlength=len(shared)).tolist()
    # only in the engine's own kernels does it say what an engine must say, to the bit
    numerics = numerics_id(dtype, "plain") if ring.numerics == "exact" else ""
    return [
        Canary(
            ids=ids,
            num_prompt=num_prompt,
            lp=own.tolist(),
            fingerprints=[layer[n].numpy().astype("<f4").tobytes() for layer in prints],
            drift=None if drifts is None else [layer[n] for layer in drifts],
            numerics=numerics,
        )
        for n, ((ids, num_prompt), own) in enumerate(
            zip(shared, torch.split(lp, counts), strict=True)
        )
    ]


Prints = list[tuple[torch.Tensor, ...]]
"""By layer and sequence: a number for each position."""


def _scored(
    ring: TrainableRing, world: World, batch: PackedBatch
) -> tuple[torch.Tensor, Prints, torch.dtype]:
    """Logprobs, fingerprints, and the type of the residual stream."""
    direction = torch.tensor(list(signs(ring.config.hidden_size)), dtype=torch.float32)
    direction = (direction / math.sqrt(ring.config.hidden_size)).to(world.device)
    prints: Prints = []
    dtypes: set[torch.dtype] = set()

    def trace(_: int, x: torch.Tensor) -> None:
        dtypes.add(x.dtype)
        prints.append(torch.split((wide(x) @ direction).cpu(), list(batch.lengths)))

    scores = ring(batch, trace)
    reshard(ring)
    return scores.lp, prints, dtypes.pop()


def _distance(meant: torch.Tensor, found: torch.Tensor) -> float:
    """As an engine takes it (engine/model/canaries.py)."""
    rms = meant.double().square().mean().sqrt().clamp_min(1e-30)
    return float((found.double() - meant.double()).abs().mean() / rms)


def _whole(ids: Sequence[int], num_prompt: int) -> TrainSequence:
    """With one token more, which is not scored: so that the last of `ids` has a row too."""
    mask = np.ones(len(ids) + 1 - num_prompt, dtype=np.bool_)
    mask[-1] = False
    return TrainSequence(np.array([*ids, 0], dtype=np.int64), num_prompt, mask=mask)
