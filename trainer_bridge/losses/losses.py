"""The objective of a policy update: PPO's clip behind a correction for the engine's numerics.

    J_t  = w_t · min(r_t A_t, clip(r_t, 1-eps_low, 1+eps_high) A_t) - kl.coef · k3_t
    w_t  = M(k_t),   k_t = π_old / π_infer          a constant; by method, corrections.py
    r_t  = π_new / π_old                            carries the gradient
    loss = -aggregate(J)

Source: Ring-1T (arXiv 2510.18855 v2) eq. 1-3 for `icepop`; the others in docs/explain/icepop.md.
A masked token adds 0 to the sum and stays in the denominator. Every gradient is exactly 0 at a
token that is masked, or is no response token.

R rows, T tokens of a row: padded (a row is a sequence) or packed (`sequence_ids`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LossConfig, OldPolicy
from .corrections import MAX_LOG, Gap, Sequences, bounded_exp, correction, gate

_LARGEST_LP = 1e-3
"""Rounding lifts the logprob of a certain token above 0; anything higher is no logprob."""


@dataclass(frozen=True)
class BatchSize:
    """Of a whole update, where `LossInputs` are a part of it: a microbatch, a rank's share.

    sequences  all, those without response tokens or without advantage too
    tokens     response tokens of all of them
    """

    sequences: int
    tokens: int


@dataclass(frozen=True)
class LossInputs:
    """One (micro)batch. Logprobs are float32 or float64, all alike; they need mean nothing
    outside `mask`, and may be infinite or NaN anywhere.

    lp_new        (R, T) logprob of the token under the weights in training; carries the gradient
    lp_infer      (R, T) the engine's, of the same distribution (docs/explain/icepop.md)
    advantages    (R, T), or (R, 1) for padded rows; finite inside `mask`
    mask          (R, T) bool: response tokens that the model chose
    lp_old        (R, T) the trainer's before the update; None: lp_new, detached (one update a batch)
    lp_ref        (R, T) of the reference policy; needed where kl.coef > 0
    sequence_ids  (R, T) int: tokens of one sequence share one; negative: padding. A sequence lies
                  within one LossInputs. None: each row is a sequence
    lag           (R, T) int: trainer's version minus the token's; for metrics alone
    entropy       (R, T) of the trainer's distribution, in nats; for metrics alone
    proximal      (R, T) bool, under old policy `exact`: tokens whose lp_old is that of the weights
                  before this update, since those that sampled them are gone; for metrics alone
    batch         denominators of the whole update; None: these inputs are the whole of it
    """

    lp_new: Tensor
    lp_infer: Tensor
    advantages: Tensor
    mask: Tensor
    lp_old: Tensor | None = None
    lp_ref: Tensor | None = None
    sequence_ids: Tensor | None = None
    lag: Tensor | None = None
    entropy: Tensor | None = None
    proximal: Tensor | None = None
    batch: BatchSize | None = None


@dataclass(frozen=True)
class LossOutput:
    """The loss, and what it is made of: (R, T) columns, detached, 0 or False outside `mask`.

    loss       scalar, to be minimised. Parts of one update add up to its loss
    objective  J of each token before aggregation
    weight     w, 0 where masked
    ratio      r, 1 where masked
    log_ratio  lp_old - lp_infer, 0 where not valid
    keep       not masked
    valid      lp_old, lp_infer finite and lp_new a number; the rest is masked and counted
    gated      in a sequence that a gate drops
    clipped    kept, and PPO's clip binds: no gradient
    kl         k3 against the reference, of the tokens that pay
    sequences  whose token is whose
    """

    loss: Tensor
    objective: Tensor
    weight: Tensor
    ratio: Tensor
    log_ratio: Tensor
    keep: Tensor
    valid: Tensor
    gated: Tensor
    clipped: Tensor
    kl: Tensor
    sequences: Sequences


Loss = Callable[[LossInputs], LossOutput]


def make_loss(config: LossConfig) -> Loss:
    """The loss that `config` describes. Raises ConfigError where two of its settings contradict.

    The loss raises ValueError for inputs that do not fit each other, and, with `strict`, for a
    response token whose `lp_infer` is not finite: an engine cannot sample what it gave no mass.
    """
    config.check()
    correct = correction(config)

    def loss(inputs: LossInputs) -> LossOutput:
        _check(inputs, config)
        gap = _gap(inputs)
        corrected = correct(gap)
        passes = gate(config.gates, gap)
        keep = corrected.keep & passes
        weight = torch.where(keep, corrected.weight, 0.0)
        objective, ratio, clipped = _clipped(config, inputs, gap, keep, weight)
        kl = _reference_kl(config, inputs, keep)
        if config.kl.coef:
            objective = objective - config.kl.coef * kl
        scale = token_scale(config, inputs, gap.sequences)
        # float64: the sum is the same however rows are padded or packed
        total = (objective * scale).sum(dtype=torch.float64).to(objective.dtype)
        return LossOutput(
            loss=-total,
            objective=objective.detach(),
            weight=weight,
            ratio=ratio.detach(),
            log_ratio=gap.log_ratio,
            keep=keep,
            valid=gap.valid,
            gated=gap.mask & ~passes,
            clipped=clipped,
            kl=kl.detach(),
            sequences=gap.sequences,
        )

    return loss


def old_logprobs(
    policy: OldPolicy, current: Tensor, versions: Tensor, by_version: Mapping[int, Tensor]
) -> Tensor:
    """lp_old under an old policy, (R, T), detached.

    proximal  `current`: the trainer's logprobs under the weights before this update
    exact     of each token, those of `by_version` under the weights that sampled it

    versions  (R, T) int, of each token; negative where there is none, which stays NaN in `exact`.
    Raises ValueError naming a version that `exact` needs and `by_version` does not have.
    """
    if policy == "proximal":
        return current.detach()
    old = torch.full_like(current, torch.nan)
    for version in torch.unique(versions[versions >= 0]).tolist():
        if version not in by_version:
            known = ", ".join(map(str, sorted(by_version))) or "none"
            raise ValueError(f"by_version: no logprobs of version {version}; there are {known}")
        old = torch.where(versions == version, by_version[version].detach(), old)
    return old


def token_scale(config: LossConfig, inputs: LossInputs, sequences: Sequences) -> Tensor:
    """(R, T): what one token of each place counts in the loss, in the dtype of the logprobs."""
    dtype, mask = inputs.lp_new.dtype, inputs.mask
    if config.aggregation == "seq_mean":
        lengths = sequences.sums(mask).clamp(min=1)
        num = inputs.batch.sequences if inputs.batch else sequences.count
        scale = sequences.spread(1.0 / (lengths * max(1, num)))
    elif config.aggregation == "token_mean":
        num_tokens = inputs.batch.tokens if inputs.batch else int(mask.sum())
        scale = torch.full_like(inputs.lp_new, 1.0 / max(1, num_tokens), dtype=torch.float64)
    else:
        assert config.fixed_tokens is not None
        scale = torch.full_like(inputs.lp_new, 1.0 / config.fixed_tokens, dtype=torch.float64)
    return torch.where(mask, scale, 0.0).detach().to(dtype)


def sequences_of(sequence_ids: Tensor | None, mask: Tensor) -> Sequences:
    """The sequences of a batch: rows, or the ids that are not negative."""
    if sequence_ids is None:
        rows = torch.arange(mask.shape[0], device=mask.device)
        return Sequences(rows[:, None].expand(mask.shape), mask.shape[0])
    known: Tensor = torch.unique(sequence_ids[sequence_ids >= 0])
    index = torch.searchsorted(known, sequence_ids.clamp(min=0).contiguous())
    # padding may lie past the last id; it is no response token, so any place will do
    return Sequences(torch.where(sequence_ids >= 0, index, 0), known.numel())


def _gap(inputs: LossInputs) -> Gap:
    old = inputs.lp_new if inputs.lp_old is None else inputs.lp_old
    old, infer, new = old.detach(), inputs.lp_infer.detach(), inputs.lp_new.detach()
    valid = inputs.mask & _is_logprob(old) & _is_logprob(infer)
    # -inf is a ratio of 0, which the clip can deal with
    valid = valid & ~torch.isnan(new) & (new <= _LARGEST_LP)
    return Gap(
        mask=inputs.mask,
        valid=valid,
        lp_old=old,
        lp_infer=infer,
        log_ratio=torch.where(valid, old - infer, 0.0),
        advantages=torch.where(inputs.mask, inputs.advantages, 0.0).to(new.dtype),
        sequences=sequences_of(inputs.sequence_ids, inputs.mask),
    )


def _is_logprob(lp: Tensor) -> Tensor:
    return torch.isfinite(lp) & (lp <= _LARGEST_LP)


def _clipped(
    config: LossConfig, inputs: LossInputs, gap: Gap, keep: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted surrogate, ratio, where the clip binds) of each token."""
    old = inputs.lp_new.detach() if inputs.lp_old is None else gap.lp_old
    # where before exp: what is masked has ratio 1 and no gradient, whatever its logprobs are
    ratio = bounded_exp(torch.where(keep, inputs.lp_new - old, 0.0))
    low, high = 1.0 - config.clip.eps_low, config.clip.eps_high
    bounded = ratio.clamp(low, None if high is None else 1.0 + high)
    plain, clipped = ratio * gap.advantages, bounded * gap.advantages
    surrogate = torch.where(keep, weight * torch.minimum(plain, clipped), 0.0)
    return surrogate, ratio, (keep & (clipped < plain)).detach()


def _reference_kl(config: LossConfig, inputs: LossInputs, keep: Tensor) -> Tensor:
    """k3 = e^x - 1 - x, x = lp_ref - lp_new: an estimate of KL(new || ref), 0 where none is paid."""
    if inputs.lp_ref is None or not config.kl.coef:
        return torch.zeros_like(inputs.lp_new)
    new, ref = inputs.lp_new, inputs.lp_ref.detach()
    pays = keep if config.kl.on_kept_only else inputs.mask
    pays = pays & _is_logprob(new.detach()) & _is_logprob(ref)
    x = torch.where(pays, ref - new, 0.0).clamp(max=MAX_LOG)
    return torch.expm1(x) - x


def _check(inputs: LossInputs, config: LossConfig) -> None:
    shape, dtype = inputs.lp_new.shape, inputs.lp_new.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"lp_new is {dtype}: logprobs and their differences are float32 (log_softmax of "
            "float32 logits); half precision cannot tell a ratio of 1.01 from 1"
        )
    if inputs.lp_new.ndim != 2:
        raise ValueError(f"lp_new has shape {tuple(shape)}: (rows, tokens) is needed")
    for name in (
        "lp_infer",
        "lp_old",
        "lp_ref",
        "mask",
        "sequence_ids",
        "lag",
        "entropy",
        "proximal",
    ):
        column = getattr(inputs, name)
        if column is None:
            continue
        if column.shape != shape:
            raise ValueError(f"{name} has shape {tuple(column.shape)}, lp_new {tuple(shape)}")
        if name.startswith("lp_") and column.dtype != dtype:
            raise ValueError(f"{name} is {column.dtype}, lp_new {dtype}: all logprobs are alike")
    if inputs.mask.dtype != torch.bool:
        raise ValueError(f"mask is {inputs.mask.dtype}: bool is needed")
    _check_advantages(inputs)
    if config.kl.coef and inputs.lp_ref is None:
        raise ValueError("lp_ref is missing: kl.coef > 0 needs the reference's logprobs")
    if inputs.sequence_ids is not None and bool((inputs.mask & (inputs.sequence_ids < 0)).any()):
        raise ValueError("mask: a response token has a negative sequence id, which means padding")
    if config.strict:
        bad = (inputs.mask & ~torch.isfinite(inputs.lp_infer)).nonzero()
        if len(bad):
            row, token = bad[0].tolist()
            raise ValueError(
                f"lp_infer is {float(inputs.lp_infer[row, token])} at row {row}, token {token}: "
                "the engine sampled a token to which it gave no probability"
            )


def _check_advantages(inputs: LossInputs) -> None:
    shape, given = inputs.lp_new.shape, inputs.advantages.shape
    if given != shape and (given != (shape[0], 1) or inputs.sequence_ids is not None):
        raise ValueError(
            f"advantages has shape {tuple(given)}: {tuple(shape)} is needed, or ({shape[0]}, 1) "
            "where each row is a sequence"
        )
    bad = (inputs.mask & ~torch.isfinite(inputs.advantages)).nonzero()
    if len(bad):
        row, token = bad[0].tolist()
        raise ValueError(f"advantages is not finite at row {row}, token {token}")
