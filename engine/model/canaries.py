"""Canaries: sequences that a trainer has scored, scored again by the engine in weights that do not
serve yet. Bytes may be right and mean something else (gate for up, a scale that was forgotten);
what the trainer's model says of a sequence, the engine's must say too.

Shapes: T tokens, H hidden, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ...kernels import Pieces, QuerySpan, drain, log_softmax_in_pieces, project_in_pieces, rms_norm
from ..checkpoint.manifest import Canary, signs
from ..errors import WeightsRefused
from . import model
from .model import KernelOperations, KVStore
from .numerics import numerics_id
from .pacing import layer_in_pieces, rows_at_once
from .rotary import rotary_tables
from .weights import Weights

Floats = npt.NDArray[np.float32]
BLOCK = 16
# tokens that go through the layers together
CHUNK = 64


@dataclass(frozen=True)
class Bounds:
    """What correct weights stay below.

    max_delta, mean_delta  of |lp − the trainer's lp|, over all canary tokens
    fingerprint            mean of |f − the trainer's f| over a layer's positions, over its rms
    """

    max_delta: float
    mean_delta: float
    fingerprint: float


# By T and by how linear layers are stored and run; against a trainer in float32 or bf16 that holds
# the weights before FP8. Measured over random checkpoints (4 layers, gain 1.5, 8 experts, whose
# near ties are often decided otherwise), the largest of (max, mean, fingerprint) were
#     bfloat16 plain    1.1   0.07   0.05       a trainer in float32
#     fp8               3.1   0.34   0.35       one in bf16, unquantised; all linear layers in FP8
#     w8a8              3.2   0.39   0.55       the same
# and for bf16 weights in which gate and up were exchanged in one expert of the 24: 1.4, 0.12, 0.11;
# in all experts of one layer: 2.2, 0.39, 0.41; with a transposed matrix: 2.8, 0.74, 0.74. So a single
# expert is seen for sure by float32, by equal numerics, and by the digests.
BOUNDS: dict[tuple[torch.dtype, str], Bounds] = {
    (torch.float32, "plain"): Bounds(max_delta=0.05, mean_delta=2e-3, fingerprint=2e-3),
    (torch.bfloat16, "plain"): Bounds(max_delta=3.0, mean_delta=0.15, fingerprint=0.15),
    (torch.float32, "fp8"): Bounds(max_delta=6.0, mean_delta=0.4, fingerprint=0.4),
    (torch.bfloat16, "fp8"): Bounds(max_delta=6.0, mean_delta=0.4, fingerprint=0.4),
    (torch.float32, "w8a8"): Bounds(max_delta=8.0, mean_delta=0.7, fingerprint=0.9),
    (torch.bfloat16, "w8a8"): Bounds(max_delta=8.0, mean_delta=0.7, fingerprint=0.9),
}
# Those are for the worst of models: of a trained one (the RL demo's) FP8 moves a fingerprint by 0.05 at
# most, and gate and up exchanged in a whole layer by 0.27. So a trainer says what FP8 does to its own
# fingerprints (`Canary.drift`), and the engine's may be so many times as far away, at least so far,
# and never beyond the table. W8A8 was 3.2 times as far at most, over 12 random models and the demo's.
DRIFTS = 6.0
LEAST_DRIFT = 0.1
# of a trainer with the engine's numerics: logprobs are equal to the bit, fingerprints up to the
# order in which their products are summed
EQUAL = Bounds(max_delta=0.0, mean_delta=0.0, fingerprint=1e-4)


def bounds_of(weights: Weights) -> Bounds:
    """Those of weights in the form in which they are run."""
    kind = "plain" if weights.formats == "plain" else "fp8"
    return BOUNDS[weights.dtype, "w8a8" if "-w8a8-" in weights.formats else kind]


@dataclass
class Score:
    """What weights say of a sequence.

    lp            ln p of each output token
    fingerprints  (T,) float32 after each layer
    reached       (MoE layer, expert) pairs that a token was sent to
    """

    lp: list[float] = field(default_factory=list)
    fingerprints: list[Floats] = field(default_factory=list)
    reached: set[tuple[int, int]] = field(default_factory=set)


def scoring(
    weights: Weights,
    ids: Sequence[int],
    num_prompt: int,
    tables: tuple[torch.Tensor, torch.Tensor],
) -> Pieces[Score]:
    """Teacher forcing, at most `CHUNK` tokens at a time, in pieces of a bounded amount of work
    (engine/model/pacing.py). The bits are those of any other pass (kernels are row-invariant)."""
    config = weights.config
    num_blocks = 1 + -(-len(ids) // BLOCK)
    store = KVStore.empty(config, num_blocks * BLOCK, weights.dtype)
    direction = torch.tensor(signs(config.hidden_size), dtype=torch.float32)
    direction /= math.sqrt(config.hidden_size)
    parts: list[list[Floats]] = [[] for _ in weights.layers]
    score = Score()
    start = 0
    while start < len(ids):
        end = min(start + CHUNK, len(ids))
        end = start + rows_at_once(config, end - start, end)
        span = QuerySpan(0, start, end - start, list(range(1, num_blocks)))
        plan = model.plan_step(config, [span], BLOCK)
        ops = KernelOperations(config, store, plan, tables)
        x = weights.embedding[torch.tensor(ids[start:end])]
        num_moe = 0
        for index, layer in enumerate(weights.layers):
            x, routes = yield from layer_in_pieces(ops, layer, x, index)
            with torch.inference_mode():
                parts[index].append((x.float() @ direction).numpy().astype(np.float32))
            if routes is not None:
                chosen = set(routes.ids.reshape(-1).tolist())
                score.reached |= {(num_moe, expert) for expert in chosen}
                num_moe += 1
        first = max(start, num_prompt - 1)
        score.lp += yield from _logprobs(weights, x[first - start :], ids[first : end + 1])
        start = end
    score.fingerprints = [np.concatenate(chunks) for chunks in parts]
    return score


def _logprobs(weights: Weights, x: torch.Tensor, ids: Sequence[int]) -> Pieces[list[float]]:
    """Of ids[1:], which the positions of x predict: as many of them, or one less at the end."""
    targets = torch.tensor(ids[1:], dtype=torch.int64)
    if not len(targets):
        return []
    with torch.inference_mode():
        hidden = rms_norm(x[: len(targets)], weights.norm, weights.config.rms_norm_eps)
    logits = yield from project_in_pieces(hidden, weights.head)
    lp = yield from log_softmax_in_pieces(logits, targets)
    found: list[float] = lp.tolist()
    return found


def make_canary(
    weights: Weights, ids: Sequence[int], num_prompt: int, *, fingerprints: bool = True
) -> Canary:
    """What a trainer that runs this engine's kernels says of a sequence."""
    tables = rotary_tables(weights.config, len(ids), torch.float32)
    score = drain(scoring(weights, ids, num_prompt, tables))
    found = [one.astype("<f4").tobytes() for one in score.fingerprints]
    return Canary(
        ids=list(ids),
        num_prompt=num_prompt,
        lp=score.lp,
        fingerprints=found if fingerprints else None,
        numerics=numerics_id(weights.dtype, weights.formats),
    )


class Comparison:
    """Scores against a manifest's canaries, one after another."""

    def __init__(self, weights: Weights, numerics: str) -> None:
        self._config = weights.config
        self._num_moe = weights.num_moe_layers
        self._bounds = bounds_of(weights)
        self._numerics = numerics
        self._is_equal = True
        self._deltas: list[float] = []
        self._reached: set[tuple[int, int]] = set()
        self._has_fingerprints = False
        self._worst: list[float] = [0.0] * len(weights.layers)
        # None: a canary does not say it
        self._drift: list[float] | None = [0.0] * len(weights.layers)

    def check(self, canary: Canary) -> str | None:
        """Why it cannot be scored here, or None."""
        if max(canary.ids) >= self._config.vocab_size:
            return f"token id {max(canary.ids)} is outside the vocabulary"
        prints = canary.fingerprints
        if prints is not None and len(prints) != len(self._worst):
            return f"{len(prints)} fingerprints for {len(self._worst)} layers"
        return None

    def add(self, canary: Canary, score: Score) -> None:
        self._deltas += [abs(a - b) for a, b in zip(score.lp, canary.lp, strict=True)]
        self._reached |= score.reached
        self._is_equal &= canary.numerics == self._numerics
        self._has_fingerprints |= canary.fingerprints is not None
        if canary.drift is None:
            self._drift = None
        elif self._drift is not None:
            self._drift = [max(pair) for pair in zip(self._drift, canary.drift, strict=True)]
        for layer, data in enumerate(canary.fingerprints or ()):
            expected = np.frombuffer(data, dtype="<f4").astype(np.float64)
            scale = max(float(np.sqrt(np.mean(expected**2))), 1e-30)
            delta = np.abs(score.fingerprints[layer].astype(np.float64) - expected) / scale
            mean = float(np.mean(delta))
            # a comparison with NaN is false: what is no number is the worst there is
            self._worst[layer] = max(self._worst[layer], mean if mean == mean else math.inf)

    @property
    def bounds(self) -> Bounds:
        return EQUAL if self._is_equal and self._deltas else self._bounds

    def fingerprint_bound(self, layer: int) -> float:
        most = self.bounds.fingerprint
        if self._drift is None or self.bounds is EQUAL:
            return most
        return min(most, max(LEAST_DRIFT, DRIFTS * self._drift[layer]))

    @property
    def num_tokens(self) -> int:
        return len(self._deltas)

    @property
    def max_delta(self) -> float:
        values = [d if d == d else math.inf for d in self._deltas]
        return max(values, default=0.0)

    @property
    def mean_delta(self) -> float:
        values = [d if d == d else math.inf for d in self._deltas]
        return sum(values) / len(values) if values else 0.0

    @property
    def experts_reached(self) -> float | None:
        """Share of all routed experts; None if there are none."""
        count = self._num_moe * self._config.num_experts
        return len(self._reached) / count if count else None

    def judge(self, version: int) -> None:
        """Raise WeightsRefused naming the first layer that differs, where fingerprints tell."""
        bounds = self.bounds
        first = next(
            (i for i, w in enumerate(self._worst) if not w <= self.fingerprint_bound(i)), None
        )
        is_far = not (self.max_delta <= bounds.max_delta and self.mean_delta <= bounds.mean_delta)
        if first is None and not is_far:
            return
        said = (
            f"version {version}: canaries: logprobs differ from the trainer's by {self.max_delta:.3g} "
            f"at most, {self.mean_delta:.3g} on average (bounds {bounds.max_delta:g} and "
            f"{bounds.mean_delta:g})"
        )
        if first is not None:
            raise WeightsRefused(
                f"{said}; the first layer that differs is layer {first}: its fingerprint is off by "
                f"{self._worst[first]:.3g} (bound {self.fingerprint_bound(first):.3g})",
                layer=first,
            )
        if self._has_fingerprints:
            layer = len(self._worst)
            raise WeightsRefused(
                f"{said}; no layer's fingerprint is beyond its bound: the final norm or the head",
                layer=layer,
            )
        raise WeightsRefused(said)
