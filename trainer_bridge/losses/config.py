"""Which loss the trainer minimises: one frozen tree, torch-free. Formulas: docs/explain/icepop.md.

`name` picks the correction; every method has its own section, so that a file can hold them all
and a run is compared with another by `--loss.name` alone.
"""

import math
from typing import Annotated, Literal

from msgspec import Meta, Struct

from ...engine.errors import ConfigError

LossName = Literal["none", "tis", "mis", "icepop", "kpop", "ipo"]
Aggregation = Literal["seq_mean", "token_mean", "fixed"]
OldPolicy = Literal["proximal", "exact"]
Weight = Literal["ratio", "one"]

_WEIGHT = "of what is kept: the ratio itself, or 1"


class TisConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Truncated importance sampling: the ratio, clamped. Masks nothing."""

    low: Annotated[float, Meta(ge=0, description="smallest weight; 0: no floor")] = 0.0
    high: Annotated[float, Meta(gt=0, description="largest weight")] = 2.0


class MisConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Masked importance sampling: the ratio inside a band, 0 outside."""

    level: Annotated[
        Literal["token", "sequence"],
        Meta(description="the ratio of a token, or the product over its sequence"),
    ] = "token"
    low: Annotated[float, Meta(ge=0, description="smallest ratio that is kept")] = 0.0
    high: Annotated[float, Meta(gt=0, description="largest ratio that is kept")] = 2.0
    weight: Annotated[Weight, Meta(description=_WEIGHT)] = "ratio"


class IcePopConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """IcePop: tokens whose ratio leaves [alpha, beta] are masked (arXiv 2510.18855, eq. 2)."""

    alpha: Annotated[float, Meta(gt=0, description="smallest ratio that is kept")] = 0.5
    beta: Annotated[float, Meta(gt=0, description="largest ratio that is kept")] = 5.0
    weight: Annotated[Weight, Meta(description=_WEIGHT)] = "ratio"


class KPopConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """KPop: tokens are masked by the KL of two Bernoullis (arXiv 2606.15079, §3.2.3)."""

    phi: Annotated[float, Meta(gt=0, description="largest KL that is kept, in nats")] = 0.02
    sides: Annotated[
        Literal["both", "train", "infer"],
        Meta(description="both directions, or KL(train to infer) or KL(infer to train) alone"),
    ] = "both"
    weight: Annotated[Weight, Meta(description=_WEIGHT)] = "ratio"


class IpoConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """IPO and DPPO-TV: tokens are masked by the difference of the two probabilities."""

    threshold: Annotated[float, Meta(gt=0, le=1, description="largest difference that is kept")] = (
        0.3
    )
    by_advantage: Annotated[
        bool,
        Meta(description="DPPO: mask only where the advantage would widen the difference"),
    ] = False
    weight: Annotated[Weight, Meta(description=_WEIGHT)] = "ratio"


class GatesConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sequences that are dropped whole, on top of any method. All off by default."""

    geometric_low: Annotated[
        float, Meta(ge=0, description="smallest geometric mean of the ratios; 0: off")
    ] = 0.0
    geometric_high: (
        Annotated[float, Meta(gt=0, description="largest geometric mean of the ratios")] | None
    ) = None
    product_low: Annotated[
        float, Meta(ge=0, description="smallest product of the ratios; 0: off")
    ] = 0.0
    product_high: (
        Annotated[float, Meta(gt=0, description="largest product of the ratios")] | None
    ) = None
    veto: Annotated[
        float, Meta(ge=0, lt=1, description="drop a sequence with a ratio below; 0: off")
    ] = 0.0


class ClipConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PPO's clip of the ratio of two weights."""

    eps_low: Annotated[float, Meta(ge=0, le=1, description="clip below 1 - eps_low")] = 0.2
    eps_high: (
        Annotated[float, Meta(ge=0, description="clip above 1 + eps_high; none: never")] | None
    ) = 0.2


class KlConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A penalty for leaving a reference policy: the estimator k3."""

    coef: Annotated[float, Meta(ge=0, description="weight of the penalty; 0: no reference")] = 0.0
    on_kept_only: Annotated[
        bool, Meta(description="masked tokens do not pay; the paper lets them pay")
    ] = False


class LossConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The objective, its correction for the engine's numerics, and how tokens are added up."""

    name: Annotated[LossName, Meta(description="the correction")] = "icepop"
    old_policy: Annotated[
        OldPolicy,
        Meta(
            description="whose logprobs are the trainer's old ones: the weights before this "
            "update (proximal), or those that sampled the token (exact)"
        ),
    ] = "proximal"
    aggregation: Annotated[
        Aggregation,
        Meta(description="mean over sequences of their token means, over tokens, or a fixed sum"),
    ] = "seq_mean"
    fixed_tokens: (
        Annotated[float, Meta(gt=0, description="the divisor of aggregation fixed, in tokens")]
        | None
    ) = None
    strict: Annotated[
        bool, Meta(description="stop at a sampled token whose engine logprob is not finite")
    ] = False
    clip: ClipConfig = ClipConfig()
    kl: KlConfig = KlConfig()
    gates: GatesConfig = GatesConfig()
    tis: TisConfig = TisConfig()
    mis: MisConfig = MisConfig()
    icepop: IcePopConfig = IcePopConfig()
    kpop: KPopConfig = KPopConfig()
    ipo: IpoConfig = IpoConfig()

    def check(self, path: str = "loss") -> None:
        """Raise ConfigError, one line that names the setting below `path`, where two contradict."""
        for name, low, high in (
            ("tis", self.tis.low, self.tis.high),
            ("mis", self.mis.low, self.mis.high),
            ("icepop", self.icepop.alpha, self.icepop.beta),
            ("gates.geometric", self.gates.geometric_low, self.gates.geometric_high),
            ("gates.product", self.gates.product_low, self.gates.product_high),
        ):
            ends = ("alpha", "beta") if name == "icepop" else ("low", "high")
            dot = "_" if name.startswith("gates") else "."
            if not math.isfinite(low) or (high is not None and not low < high < math.inf):
                raise ConfigError(
                    f"{path}.{name}{dot}{ends[0]} must be below {path}.{name}{dot}{ends[1]}, "
                    f"got {low:g} and {high:g}"
                )
        if self.aggregation == "fixed" and self.fixed_tokens is None:
            raise ConfigError(
                f"{path}.aggregation = 'fixed' divides by {path}.fixed_tokens: set it"
            )
