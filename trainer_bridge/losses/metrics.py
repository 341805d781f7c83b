"""How far trainer and engine are apart, and what the loss did about it, by version lag.

Everything is over response tokens. `LossMetrics` adds up the parts of an update (microbatches,
ranks) and gives one dict: `kl_k3`, `kl_k3/lag0`, ... `kl_k3/lag3+`; then the names under which
people plot the same elsewhere (`ALIASES`). A value of no tokens is left out, never NaN.

With D = lp_old - lp_infer of a token, p = e^lp_old, q = e^lp_infer, and means over tokens whose
logprobs are all finite:

    kl_k1, kl_k2, kl_k3   mean of -D, D²/2, e^D - 1 - D: estimates of KL(infer || train)
    log_ratio_abs_*       mean, deviation and maximum of |D|; p99: 99 tokens of 100 are below (of bins
                          that are 9 % wide the upper end; what is within 6e-8 counts as 0)
    prob_diff_*           mean and maximum of |p - q|
    exp_log_ratio_abs     mean of e^|D|
    ratio_beyond_2, _5    share of tokens with |D| > log 2, log 5
    ess                   (Σw)² / (n Σw²) over all n response tokens; 0 if all are masked
    mask_fraction_*       share of response tokens: in all, too low, too high, dropped by a gate,
                          and of those with positive or negative advantage
    ratio_geometric_*     e^(mean D) of each sequence: minimum, percentiles, maximum

Of a lag's values, the tokens of that lag alone: `ratio_geometric_p50/lag2` is over the parts of
sequences that lag by 2.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .corrections import MAX_LOG
from .losses import LossInputs, LossOutput

ALIASES: Mapping[str, tuple[str, ...]] = {
    "mask_fraction": ("icepop_mask_fraction", "is_masked"),
    "mask_fraction_low": ("is_masked_low",),
    "mask_fraction_high": ("is_masked_high",),
    "invalid": ("icepop/invalid",),
    "kl_k3": ("mismatch_kl", "rollout_corr/k3_kl", "rollout_train_k3_kl"),
    "log_ratio_abs_mean": (
        "logprob_abs_diff",
        "train/train_rollout_logprob_abs_diff",
        "policy/rollout_train_logprobs_abs_diff_mean",
    ),
    "log_ratio_abs_std": ("policy/rollout_train_logprobs_abs_diff_std",),
    "log_ratio_abs_max": ("policy/rollout_train_logprobs_abs_diff_max",),
    "prob_diff_mean": ("training/rollout_probs_diff_mean",),
    "prob_diff_max": ("training/rollout_probs_diff_max",),
    "ratio_beyond_2": ("rollout_train_extreme_frac_tau2",),
    "ratio_beyond_5": ("rollout_train_extreme_frac_tau5",),
    "lag_mean": ("rollout/fully_async/avg_staleness",),
    "lag_max": ("rollout/fully_async/max_staleness",),
    "mixed_version_sequences": ("weight_version/mixed_version_ratio",),
}
"""ours → vLLM-style, prime-rl, verl, AReaL, slime, SkyRL, miles."""

GROUPS = ("", "/lag0", "/lag1", "/lag2", "/lag3+")
_PERCENTILES = {"min": 0.0, "p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}

# mean = sum of the first over sum of the second; all are columns of `_columns`
_MEANS = {
    "mask_fraction": ("masked", "tokens"),
    "mask_fraction_low": ("low", "tokens"),
    "mask_fraction_high": ("high", "tokens"),
    "mask_fraction_gate": ("gated", "tokens"),
    "mask_fraction_positive": ("masked_positive", "positive"),
    "mask_fraction_negative": ("masked_negative", "negative"),
    "log_ratio_abs_mean": ("abs", "valid"),
    "kl_k1": ("k1", "valid"),
    "kl_k2": ("k2", "valid"),
    "kl_k3": ("k3", "valid"),
    "exp_log_ratio_abs": ("exp_abs", "valid"),
    "prob_diff_mean": ("prob_diff", "valid"),
    "ratio_beyond_2": ("beyond_2", "valid"),
    "ratio_beyond_5": ("beyond_5", "valid"),
    "clip_fraction": ("clipped", "tokens"),
    "proximal_fraction": ("proximal", "policies"),
    "entropy": ("entropy", "entropies"),
    "entropy_masked": ("entropy_masked", "entropies_masked"),
    "kl_reference": ("kl", "referenced"),
    "lag_mean": ("lag", "lags"),
    "sequences_masked_any": ("any_masked", "sequences"),
    "sequences_masked_all": ("all_masked", "sequences"),
    "mixed_version_sequences": ("mixed", "mixable"),
}
# of |D|: eight bins to a power of two
_EDGES = torch.exp2(torch.arange(-24 * 8, 5 * 8 + 1, dtype=torch.float64) / 8)
_MAXIMA = {"log_ratio_abs_max": "abs", "prob_diff_max": "prob_diff", "lag_max": "lag"}


NAMES = (
    *("tokens", "sequences", "invalid", "ess", "log_ratio_abs_std", "log_ratio_abs_p99"),
    *_MEANS,
    *_MAXIMA,
    *(f"ratio_geometric_{name}" for name in _PERCENTILES),
)
"""All that `LossMetrics.values` gives, of tokens of any lag."""


class LossMetrics:
    """Sums, maxima and per-sequence means of one update, by group of lag."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        """Column → (5,) float64, one for each of `GROUPS`."""
        self._maxima: dict[str, Tensor] = {}
        self._bins = torch.zeros(len(GROUPS), len(_EDGES) + 1, dtype=torch.float64)
        """Tokens by |D|: the first column up to the first edge, the last beyond the last."""
        self._means: list[Tensor] = []
        """(sequences, 5) float64: mean D of each sequence, NaN where it has no such token."""

    def add(self, inputs: LossInputs, output: LossOutput) -> None:
        """Count the tokens of one call of a loss."""
        groups = _groups(inputs)
        columns = _columns(inputs, output)
        for name, column in columns.items():
            self._add(name, groups.flatten(1) @ column.to(torch.float64).flatten())
        for name in _MAXIMA.values():
            if name in columns and inputs.mask.numel():
                largest = (groups * columns[name].to(torch.float64)).amax((1, 2))
                before = self._maxima.get(name, torch.zeros_like(largest))
                self._maxima[name] = torch.maximum(before, largest)
        bins = torch.bucketize(columns["abs"], _EDGES.to(groups.device))
        for place, group in enumerate(groups.bool() & output.valid):
            counts = torch.bincount(bins[group], minlength=len(_EDGES) + 1)
            self._bins[place] += counts.to(self._bins.device)
        self._add_sequences(inputs, output, groups)

    def merge(self, other: "LossMetrics") -> None:
        """Count what another counted too, whose tokens are of the same update."""
        for name, value in other._sums.items():
            self._add(name, value)
        for name, value in other._maxima.items():
            before = self._maxima.get(name, torch.zeros_like(value))
            self._maxima[name] = torch.maximum(before, value)
        self._bins = self._bins + other._bins
        self._means += other._means

    def gather(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        """Merge all ranks, so that each has the metrics of the whole update. Collective.

        Ranks may have counted nothing. `device` is one that the group's backend can send from.
        """
        names, largest = sorted(_COLUMN_NAMES), list(_MAXIMA.values())
        zeros = torch.zeros(len(GROUPS), dtype=torch.float64, device=device)
        sums = torch.stack([self._sums.get(name, zeros).to(device) for name in names])
        maxima = torch.stack([self._maxima.get(name, zeros).to(device) for name in largest])
        dist.all_reduce(sums, group=group)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        bins = self._bins.to(device)
        dist.all_reduce(bins, group=group)
        self._bins = bins.cpu()
        self._means = [_gather_rows(self._sequence_means().to(device), group)]
        self._sums = dict(zip(names, sums, strict=True))
        self._maxima = dict(zip(largest, maxima, strict=True))

    def values(self, *, aliases: bool = True) -> dict[str, float]:
        """Every metric that has tokens, by name; aliases of the values over all lags."""
        found: dict[str, float] = {}
        means = self._sequence_means().cpu()
        sums = {name: value.tolist() for name, value in self._sums.items()}
        maxima = {name: value.tolist() for name, value in self._maxima.items()}
        for place, suffix in enumerate(GROUPS):
            column = {name: value[place] for name, value in sums.items()}
            if not column.get("tokens"):
                continue
            largest = {name: value[place] for name, value in maxima.items()}
            values = _values(column, largest, means[:, place])
            if column.get("valid"):
                values["log_ratio_abs_p99"] = _quantile(self._bins[place], 0.99)
            found |= {name + suffix: value for name, value in values.items()}
        if aliases:
            for name, others in ALIASES.items():
                found.update({other: found[name] for other in others if name in found})
        return found

    def _add(self, name: str, value: Tensor) -> None:
        before = self._sums.get(name)
        self._sums[name] = value if before is None else before + value

    def _sequence_means(self) -> Tensor:
        return torch.cat(self._means or [torch.empty(0, len(GROUPS), dtype=torch.float64)])

    def _add_sequences(self, inputs: LossInputs, output: LossOutput, groups: Tensor) -> None:
        per = output.sequences.sums

        def counts(column: Tensor) -> Tensor:
            return torch.stack([per(group * column) for group in groups], dim=1)

        num_tokens = counts(inputs.mask)
        num_masked = counts(inputs.mask & ~output.keep)
        num_valid = counts(output.valid)
        self._add("sequences", (num_tokens > 0).sum(0).double())
        self._add("any_masked", (num_masked > 0).sum(0).double())
        self._add("all_masked", ((num_masked == num_tokens) & (num_tokens > 0)).sum(0).double())
        mean = counts(output.log_ratio) / num_valid
        self._means.append(mean)
        if inputs.lag is not None:
            lag = inputs.lag.to(torch.float64)
            first, square = counts(lag), counts(lag * lag)
            # n Σx² = (Σx)² only where all x are one: exact, for lags are whole numbers
            mixed = num_tokens * square > first * first
            self._add("mixed", mixed.sum(0).double())
            self._add("mixable", (num_tokens > 0).sum(0).double())


def _groups(inputs: LossInputs) -> Tensor:
    """(5, R, T) float64 of 0 and 1: response tokens, in all and by lag."""
    mask = inputs.mask
    if inputs.lag is None:
        by_lag = [torch.zeros_like(mask)] * 4
    else:
        by_lag = [mask & (inputs.lag == lag) for lag in range(3)] + [mask & (inputs.lag >= 3)]
    return torch.stack([mask, *by_lag]).to(torch.float64)


def _columns(inputs: LossInputs, output: LossOutput) -> dict[str, Tensor]:
    """What is summed, (R, T), finite; groups pick the tokens."""
    old = inputs.lp_new if inputs.lp_old is None else inputs.lp_old
    old, infer = old.detach(), inputs.lp_infer.detach()
    masked = inputs.mask & ~output.keep
    ratio, valid = output.log_ratio.double(), output.valid
    positive, negative = inputs.advantages > 0, inputs.advantages < 0
    # by its own ratio, infinite ones included; what a gate drops is counted as that alone
    own = masked & ~output.gated
    apart = torch.where(valid, torch.exp(old.double()) - torch.exp(infer.double()), 0.0)
    bounded = ratio.clamp(max=MAX_LOG)
    columns = {
        "tokens": inputs.mask,
        "valid": valid,
        "invalid": inputs.mask & ~valid,
        "masked": masked,
        "low": own & (old < infer),
        "high": own & (old > infer),
        "gated": output.gated,
        "positive": positive.expand(masked.shape),
        "negative": negative.expand(masked.shape),
        "masked_positive": masked & positive,
        "masked_negative": masked & negative,
        "abs": ratio.abs(),
        "square": ratio.square(),
        "k1": -ratio,
        "k2": ratio.square() / 2,
        "k3": torch.expm1(bounded) - bounded,
        "exp_abs": torch.where(valid, torch.exp(ratio.abs().clamp(max=MAX_LOG)), 0.0),
        "prob_diff": apart.abs(),
        "beyond_2": ratio.abs() > math.log(2.0),
        "beyond_5": ratio.abs() > math.log(5.0),
        "weight": output.weight,
        "weight_square": output.weight.double().square(),
        "clipped": output.clipped,
    }
    if inputs.entropy is not None:
        entropy = inputs.entropy.detach()
        finite = torch.isfinite(entropy)
        entropy = torch.where(finite, entropy, 0.0)
        columns |= {"entropy": entropy, "entropies": finite}
        columns |= {"entropy_masked": entropy * masked, "entropies_masked": finite & masked}
    if inputs.lp_ref is not None:
        columns |= {"kl": output.kl, "referenced": inputs.mask}
    if inputs.proximal is not None:
        columns |= {"proximal": inputs.proximal, "policies": inputs.mask}
    if inputs.lag is not None:
        lag = torch.where(inputs.mask, inputs.lag, 0)
        columns |= {"lag": lag, "lags": inputs.mask}
    return columns


_SEQUENCE_COLUMNS = ("sequences", "any_masked", "all_masked", "mixed", "mixable")
_COLUMN_NAMES = {
    *("invalid", "square", "weight", "weight_square", *_SEQUENCE_COLUMNS),
    *(name for pair in _MEANS.values() for name in pair),
}


def _values(
    sums: Mapping[str, float], maxima: Mapping[str, float], means: Tensor
) -> dict[str, float]:
    """The metrics of one group that has tokens; a mean of nothing is left out."""
    found = {name: sums[name] for name in ("tokens", "sequences", "invalid") if name in sums}
    for name, (above, below) in _MEANS.items():
        if sums.get(below):
            found[name] = sums[above] / sums[below]
    if "log_ratio_abs_mean" in found:
        variance = sums["square"] / sums["valid"] - found["log_ratio_abs_mean"] ** 2
        found["log_ratio_abs_std"] = math.sqrt(max(0.0, variance))
        found |= {name: maxima[c] for name, c in _MAXIMA.items() if c in maxima and c != "lag"}
    if sums.get("lags"):
        found["lag_max"] = maxima["lag"]
    squares = sums["weight_square"] * sums["tokens"]
    found["ess"] = sums["weight"] ** 2 / squares if squares else 0.0
    known = means[~torch.isnan(means)]
    if known.numel():
        points = torch.tensor(list(_PERCENTILES.values()), dtype=torch.float64)
        ratios = torch.quantile(known, points).clamp(max=MAX_LOG).exp().tolist()
        for name, value in zip(_PERCENTILES, ratios, strict=True):
            found[f"ratio_geometric_{name}"] = value
    return found


def _quantile(bins: Tensor, share: float) -> float:
    """The |D| that this share of the tokens is at or below, to the bin."""
    place = int(torch.searchsorted(bins.cumsum(0), share * bins.sum()))
    return 0.0 if place == 0 else float(_EDGES[min(place, len(_EDGES) - 1)])


def _gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks, in order of rank; their numbers differ."""
    world = dist.get_world_size(group)
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    dist.all_gather(counts, count, group=group)
    most = max(int(number) for number in counts)
    filled = torch.full((most, rows.shape[1]), torch.nan, dtype=rows.dtype, device=rows.device)
    filled[: len(rows)] = rows
    parts = [torch.empty_like(filled) for _ in range(world)]
    dist.all_gather(parts, filled, group=group)
    return torch.cat([part[: int(number)] for part, number in zip(parts, counts, strict=True)])


def metrics_of(inputs: LossInputs, output: LossOutput) -> dict[str, float]:
    """The metrics of an update that is one call of the loss."""
    metrics = LossMetrics()
    metrics.add(inputs, output)
    return metrics.values()
