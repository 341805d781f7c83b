"""What config.json says of the rotary embedding: dimensions, theta, scaling (MODEL.md §3.3)."""

import json
import math

from msgspec import Struct

from .. import log
from ..errors import CheckpointError
from .json_keys import Keys

_YARN_KEYS = {
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "finetuned"),
    *("original_max_position_embeddings", "max_position_embeddings", "beta_fast", "beta_slow"),
    *("attention_factor", "attn_factor", "extrapolation_factor", "mscale", "mscale_all_dim"),
    "truncate",
}


class YarnScaling(Struct, frozen=True, kw_only=True):
    """`rope_scaling` of type yarn (MODEL.md §3.3); `attention_factor` is m, resolved."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


class LinearScaling(Struct, frozen=True, kw_only=True):
    """`rope_scaling` of type linear: positions divided by `factor`."""

    factor: float


def read_rope_section(keys: Keys) -> Keys:
    """`rope_scaling`, or what transformers ≥ 5 calls `rope_parameters`; both must agree."""
    old, new = keys.section("rope_scaling"), keys.section("rope_parameters")
    if old is not None and new is not None:
        for key in old.data.keys() & new.data.keys():
            if old.data[key] != new.data[key]:
                raise new.wrong(key, f"{json.dumps(old.data[key])}, as in rope_scaling")
        return Keys(old.data | new.data, new.where)
    return old or new or Keys({}, "config.json: rope_scaling")


def read_rope_theta(keys: Keys, rope: Keys) -> float:
    if not rope.has("rope_theta"):
        return keys.number("rope_theta", 600000.0)
    theta = rope.number("rope_theta")
    if keys.has("rope_theta") and keys.number("rope_theta") != theta:
        raise rope.wrong("rope_theta", f"{keys.number('rope_theta'):g}, as at the top level")
    return theta


def read_rotary_dim(keys: Keys, rope: Keys, head_dim: int) -> int:
    """partial_rotary_factor, else rotary_dim, else the whole head (MODEL.md §1.2)."""
    stated: dict[str, int] = {}
    for source in (keys, rope):
        if source.has("partial_rotary_factor"):
            name = f"{source.where}: partial_rotary_factor"
            stated[name] = int(head_dim * source.number("partial_rotary_factor"))
    if keys.has("rotary_dim"):
        stated["config.json: rotary_dim"] = keys.integer("rotary_dim")
    if not stated:
        keys.defaults_used.append("rotary_dim")
        stated["config.json: head_dim"] = head_dim
    if len(set(stated.values())) > 1:
        said = ", ".join(f"{name} gives {value}" for name, value in stated.items())
        raise CheckpointError(f"the rotary dimension is stated twice: {said}; accepted: one value")
    name, value = next(iter(stated.items()))
    if value < 2 or value > head_dim or value % 2:
        raise CheckpointError(
            f"{name} gives {value} rotary dimensions; accepted: an even number 2..head_dim = {head_dim}"
        )
    return value


def read_rope_scaling(rope: Keys, max_positions: int) -> YarnScaling | LinearScaling | None:
    rope.only("type", "yarn", "linear", "default")
    rope.only("rope_type", "yarn", "linear", "default")
    kinds = {rope.data[key] for key in ("type", "rope_type") if rope.has(key)}
    if len(kinds) > 1:
        raise rope.wrong("rope_type", f"{json.dumps(rope.data['type'])}, as in type")
    if not kinds:
        if unknown := sorted(rope.data.keys() - {"rope_theta", "partial_rotary_factor"}):
            raise CheckpointError(f"{rope.where} has {unknown[0]} but no type or rope_type")
        return None
    kind = kinds.pop()
    if kind == "linear":
        return LinearScaling(factor=rope.number("factor", low=1.0))
    return _yarn(rope, max_positions) if kind == "yarn" else None


def _yarn(rope: Keys, max_positions: int) -> YarnScaling:
    if unknown := sorted(rope.data.keys() - _YARN_KEYS):
        raise CheckpointError(
            f"{rope.where}: {unknown[0]} is not a known key of type yarn; "
            f"accepted: {', '.join(sorted(_YARN_KEYS))}"
        )
    factor = rope.number("factor", low=1.0)
    original = max_positions
    if rope.has("original_max_position_embeddings"):
        original = rope.integer("original_max_position_embeddings")
        if not math.isclose(factor, max_positions / original):
            # transformers 4.52.3 computes the quotient and never looks at the factor
            log.event(
                "checkpoint.yarn_factor",
                level="warning",
                factor=factor,
                quotient=max_positions / original,
                used="factor",
            )
    if rope.has("extrapolation_factor") and rope.number("extrapolation_factor") != 1.0:
        raise rope.wrong("extrapolation_factor", "1")
    # 0 and null mean "not given" to the published code
    beta_fast = rope.number("beta_fast") if rope.data.get("beta_fast") else 32.0
    beta_slow = rope.number("beta_slow") if rope.data.get("beta_slow") else 1.0
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        attention_factor=_attention_factor(rope, factor),
        truncate=rope.boolean("truncate", True),
    )


def _attention_factor(rope: Keys, factor: float) -> float:
    """m of MODEL.md §3.3, in whichever spelling the file has; the spellings must agree.

    attention_factor is m itself; mscale and mscale_all_dim give a quotient; attn_factor (SGLang,
    vLLM) multiplies the standard value.
    """

    def standard(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    stated: dict[str, float] = {}
    if rope.has("attention_factor"):
        stated["attention_factor"] = rope.number("attention_factor")
    elif rope.data.get("mscale") and rope.data.get("mscale_all_dim"):
        quotient = standard(rope.number("mscale")) / standard(rope.number("mscale_all_dim"))
        stated["mscale / mscale_all_dim"] = quotient
    if rope.has("attn_factor"):
        stated["attn_factor"] = rope.number("attn_factor") * standard(1.0)
    values = list(stated.values()) or [standard(1.0)]
    if not math.isclose(values[0], values[-1], rel_tol=1e-6):
        said = ", ".join(f"{name} gives {value:.6g}" for name, value in stated.items())
        raise CheckpointError(
            f"{rope.where}: the attention factor is stated twice: {said}; accepted: one value"
        )
    return values[0]
