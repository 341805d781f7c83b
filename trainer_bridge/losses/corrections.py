"""What each method does about the gap between trainer and engine: which tokens, at what weight.

A method reads log_ratio = lp_old - lp_infer (float32 or float64, no gradient) of response tokens
and gives a mask and a weight. It never reads the policy that is being trained, so both are fixed
for all updates of a batch. Formulas and sources: docs/explain/icepop.md.

Decisions are taken on logarithms, before any `exp`: an infinite ratio is never computed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import GatesConfig, LossConfig, LossName, Weight

MAX_LOG = 30.0
"""Where exponents end: e^30 = 1e13. A product of two such weights still fits float32."""

_LAST_LP = -(2.0**-24)
"""A float32 log-softmax does not tell probabilities apart that are nearer to 1."""


@dataclass(frozen=True)
class Sequences:
    """Which sequence each token belongs to.

    index   (R, T) int64, 0..count-1; what belongs to none has 0 and is no response token
    count   sequences here
    """

    index: Tensor
    count: int

    def sums(self, values: Tensor) -> Tensor:
        """(count,) float64: sums over each sequence of (R, T) `values`.

        On CUDA the order of additions is fixed under `torch.use_deterministic_algorithms` alone;
        counts are exact in any order.
        """
        # one place at least, for padding alone has an index too
        total = torch.zeros(max(1, self.count), dtype=torch.float64, device=values.device)
        total.index_add_(0, self.index.flatten(), values.flatten().to(torch.float64))
        return total[: self.count]

    def spread(self, values: Tensor) -> Tensor:
        """(R, T): the value of each token's sequence, from (count,) `values`."""
        if not self.count:
            return torch.zeros_like(self.index, dtype=values.dtype)
        return values[self.index]


@dataclass(frozen=True)
class Gap:
    """What a method reads. All (R, T), detached; values mean something where `valid`.

    valid      response tokens whose logprobs are all finite
    mask       response tokens
    log_ratio  lp_old - lp_infer, 0 where not valid
    """

    mask: Tensor
    valid: Tensor
    lp_old: Tensor
    lp_infer: Tensor
    log_ratio: Tensor
    advantages: Tensor
    sequences: Sequences


@dataclass(frozen=True)
class Correction:
    """keep (R, T) bool, inside `valid`; weight (R, T), finite, 0 where not kept."""

    keep: Tensor
    weight: Tensor


def bounded_exp(x: Tensor) -> Tensor:
    """exp of a finite x, never infinite; beyond MAX_LOG constant, and without gradient."""
    return torch.exp(x.clamp(max=MAX_LOG))


def correction(config: LossConfig) -> Callable[[Gap], Correction]:
    """The method that `config.name` picks, behind the gates that are on."""
    method = METHODS[config.name]

    def correct(gap: Gap) -> Correction:
        keep, log_weight = method(config, gap)
        return _weighted(keep & gap.valid, log_weight)

    return correct


def gate(config: GatesConfig, gap: Gap) -> Tensor:
    """(R, T) bool: tokens of sequences that pass every gate.

    A sequence with a token that is not valid has no ratio, and passes none of the gates.
    """
    is_on = (config.geometric_low, config.geometric_high, config.product_low)
    if not any((*is_on, config.product_high, config.veto)):
        return gap.mask
    total = gap.sequences.sums(gap.log_ratio)
    mean = total / gap.sequences.sums(gap.mask).clamp(min=1)
    passes = _all_valid(gap) & _inside(mean, config.geometric_low, config.geometric_high)
    passes &= _inside(total, config.product_low, config.product_high)
    if config.veto:
        passes &= gap.sequences.sums(gap.valid & (gap.log_ratio < math.log(config.veto))) == 0
    return gap.mask & gap.sequences.spread(passes)


def _all_valid(gap: Gap) -> Tensor:
    """(sequences,) bool."""
    return gap.sequences.sums(gap.mask & ~gap.valid) == 0


def bernoulli_kl(lp: Tensor, lq: Tensor) -> Tensor:
    """KL(Bernoulli(e^lp) || Bernoulli(e^lq)) in nats, elementwise; lp, lq <= 0, finite.

    1 - p cancels as p nears 1, so its logarithm is taken by expm1 or log1p of lp. Logprobs are
    held 2^-24 below 0, the resolution of a float32 log-softmax: two that round to 0 are equal.
    """
    lp, lq = lp.clamp(max=_LAST_LP), lq.clamp(max=_LAST_LP)
    other_p, other_q = _log1mexp(lp), _log1mexp(lq)
    kl = torch.exp(lp) * (lp - lq) + torch.exp(other_p) * (other_p - other_q)
    return kl.clamp(min=0.0)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x < 0."""
    return torch.where(x > -math.log(2.0), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _inside(x: Tensor, low: float, high: float | None) -> Tensor:
    """log low <= x <= log high; low = 0 and high = None do not bind."""
    log_low = math.log(low) if low else -math.inf
    return (x >= log_low) & (x <= (math.inf if high is None else math.log(high)))


def _weighted(keep: Tensor, log_weight: Tensor) -> Correction:
    # where before exp: a ratio that is masked is never computed
    weight = bounded_exp(torch.where(keep, log_weight, 0.0))
    return Correction(keep=keep, weight=torch.where(keep, weight, 0.0))


def _kept_at(weight: Weight, log_ratio: Tensor) -> Tensor:
    return log_ratio if weight == "ratio" else torch.zeros_like(log_ratio)


def _none(_: LossConfig, gap: Gap) -> tuple[Tensor, Tensor]:
    return gap.valid, torch.zeros_like(gap.log_ratio)


def _tis(config: LossConfig, gap: Gap) -> tuple[Tensor, Tensor]:
    low = math.log(config.tis.low) if config.tis.low else -math.inf
    return gap.valid, gap.log_ratio.clamp(low, math.log(config.tis.high))


def _mis(config: LossConfig, gap: Gap) -> tuple[Tensor, Tensor]:
    own, ratio = config.mis, gap.log_ratio
    if own.level == "token":
        return _inside(ratio, own.low, own.high), _kept_at(own.weight, ratio)
    total = gap.sequences.sums(ratio)
    keep = _inside(total, own.low, own.high) & _all_valid(gap)
    product = gap.sequences.spread(total).to(ratio.dtype)
    return gap.sequences.spread(keep), _kept_at(own.weight, product)


def _icepop(config: LossConfig, gap: Gap) -> tuple[Tensor, Tensor]:
    own = config.icepop
    return _inside(gap.log_ratio, own.alpha, own.beta), _kept_at(own.weight, gap.log_ratio)


def _kpop(config: LossConfig, gap: Gap) -> tuple[Tensor, Tensor]:
    own = config.kpop
    # what is not valid may be infinite here, and is masked by `valid`
    lp = torch.where(gap.valid, gap.lp_old, -1.0)
    lq = torch.where(gap.valid, gap.lp_infer, -1.0)
    keep = gap.valid
    if own.sides in ("both", "train"):
        keep = keep & (bernoulli_kl(lp, lq) <= own.phi)
    if own.sides in ("both", "infer"):
        keep = keep & (bernoulli_kl(lq, lp) <= own.phi)
    return keep, _kept_at(own.weight, gap.log_ratio)


def _ipo(config: LossConfig, gap: Gap) -> tuple[Tensor, Tensor]:
    own = config.ipo
    apart = torch.exp(gap.lp_old) - torch.exp(gap.lp_infer)
    if own.by_advantage:
        # a positive advantage raises p further, a negative one lowers it
        widens = torch.where(gap.advantages > 0, apart, -apart)
        keep = (widens <= own.threshold) | (gap.advantages == 0)
    else:
        keep = apart.abs() <= own.threshold
    return keep, _kept_at(own.weight, gap.log_ratio)


METHODS: Mapping[LossName, Callable[[LossConfig, Gap], tuple[Tensor, Tensor]]] = {
    "none": _none,
    "tis": _tis,
    "mis": _mis,
    "icepop": _icepop,
    "kpop": _kpop,
    "ipo": _ipo,
}
