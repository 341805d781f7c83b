"""The model in plain float64 numpy, written from the specification alone.

This is the second implementation that every other one is compared with: it shares no function
with the engine and reads checkpoints by itself, so a mistake in either shows up as a difference.
It streams: one slice of one matrix is decoded at a time, hence a checkpoint larger than memory
works, slowly.

Legend: T tokens of one sequence, H hidden, D head size, R rotary size, E experts, K chosen experts,
V vocabulary. `cast` is the rounding written T(·) in the definition (identity in float64, to bf16
in bf16); a `Linear` is any function x ↦ x Wᵀ + b that does not round its result.

Source: modeling_bailing_moe_v2.py of inclusionAI/Ling-V2 (below: HF), transformers 4.56.2 for YaRN.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError

Array = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Cast = Callable[[Array], Array]
Linear = Callable[[Array], Array]
Tables = Literal["exact", "float32", "model"]

CHUNK = 1 << 22  # elements of a matrix decoded at once (32 MB in float64)
QUERY_ROWS = 512  # queries whose scores are held at once


# -- number formats ------------------------------------------------------------------------------


def keep(x: Array) -> Array:
    """The cast of a float64 run: nothing is rounded."""
    return x


def to_bf16(x: Array) -> Array:
    """Round float64 to the nearest bf16 value, ties to even, in one step; the result is float64."""
    bits = np.ascontiguousarray(x, dtype=np.float64).view(np.int64)
    # bf16 keeps 7 of the 52 mantissa bits; a carry into the exponent is what rounding up means
    bits = (bits + ((1 << 44) - 1) + ((bits >> 45) & 1)) & ~((1 << 45) - 1)
    rounded = bits.view(np.float64)
    # below 2^-126 the spacing no longer shrinks
    rounded = np.where(np.abs(x) < 2.0**-126, np.rint(x * 2.0**133) * 2.0**-133, rounded)
    rounded = np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, x), rounded)
    return np.where(np.isfinite(x), rounded, x)


def to_float32(x: Array) -> Array:
    """Round to float32, held as float64."""
    return x.astype(np.float32).astype(np.float64)


def to_e4m3(x: Array) -> Array:
    """Round to the nearest float8_e4m3fn value, ties to even, after a clamp to ±448."""
    x = np.clip(x, -448.0, 448.0)
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)  # subnormals share the exponent of 2^-6
    step = np.ldexp(1.0, exponent - 3)
    return np.asarray(np.rint(x / step) * step)


def _e4m3_values() -> Array:
    """Value of each byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f and 0xff are NaN."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    size = np.where(
        exponent == 0,
        np.ldexp(mantissa / 8.0, -6),
        np.ldexp(1.0 + mantissa / 8.0, exponent - 7),
    )
    size[(byte & 127) == 127] = np.nan
    return np.asarray(np.where(byte < 128, size, -size))


E4M3 = _e4m3_values()
STORAGE = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "F8_E4M3": "u1"}


def decode(raw: npt.NDArray[Any], dtype: str) -> Array:
    """Stored bits of a safetensors dtype → float64, exactly."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "F8_E4M3":
        return np.asarray(E4M3[raw])
    return raw.astype(np.float64)


# -- files ---------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Where one tensor lies: `start` is its first byte in `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def raw(self) -> npt.NDArray[Any]:
        """The stored bits, mapped and not read."""
        kind = np.dtype(STORAGE[self.dtype])
        return np.memmap(self.path, kind, mode="r", offset=self.start, shape=self.shape)


def list_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name, from the headers of its safetensors files."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    found: dict[str, Stored] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; download the checkpoint again")
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start = 8 + length + entry["data_offsets"][0]
            found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), start)
    return found


@dataclass(frozen=True)
class Matrix:
    """One stored matrix as a `Linear`: x ↦ x Wᵀ + b, decoded in slices of rows.

    scale        None, or FP8 scales, multiplied: [1], [out] or blocks [ceil(out/b0), ceil(in/b1)]
    weight_cast  rounding of each (dequantised) weight
    quantize     None, or the rounding of the input in FP8 inference (W8A8)
    """

    stored: Stored
    scale: Array | None
    block: tuple[int, int]
    bias: Array | None
    weight_cast: Cast
    quantize: Cast | None

    def rows(self, start: int, stop: int) -> Array:
        """Rows start … stop-1 as float64 [stop - start, in]."""
        values = decode(self.stored.raw()[start:stop], self.stored.dtype)
        if self.scale is not None:
            values = values * self._scale_rows(start, stop, values.shape[1])
            if self.weight_cast is not keep:
                # the definition rounds the float32 product, not the exact one
                values = to_float32(values)
        return self.weight_cast(values)

    def _scale_rows(self, start: int, stop: int, width: int) -> Array:
        assert self.scale is not None
        out = self.stored.shape[0]
        if self.scale.size == 1:
            return self.scale.reshape(1, 1)
        if self.scale.size == out and (self.scale.ndim == 1 or self.scale.shape[1] == 1):
            return self.scale.reshape(out, 1)[start:stop]
        row, column = np.arange(start, stop) // self.block[0], np.arange(width) // self.block[1]
        return self.scale[row[:, None], column[None, :]]

    def __call__(self, x: Array) -> Array:
        out, width = self.stored.shape
        x = self.quantize(x) if self.quantize else x
        y = np.empty((len(x), out))
        step = max(1, CHUNK // width)
        for start in range(0, out, step):
            stop = min(start + step, out)
            y[:, start:stop] = x @ self.rows(start, stop).T
        return y if self.bias is None else y + self.bias


def dense(weight: Array, bias: Array | None = None) -> Linear:
    """A `Linear` of an array in memory, weight [out, in]."""
    return lambda x: x @ weight.T if bias is None else x @ weight.T + bias


def quantize_groups(x: Array, group: int | None) -> Array:
    """Dynamic FP8 activations: each group of `group` columns (None: the whole row) gets a scale.

    x [T, in] → q·s in float64, with s = amax/448 and x/s in float32, q in e4m3. The last group may
    be shorter. The caller's product of these with q_w·s_w is the FP8 GEMM with exact sums.
    """
    floor = 1e-10 if group is not None else 0.0
    x32 = x.astype(np.float32)
    result = np.zeros(x.shape)
    step = group or x.shape[1]
    for start in range(0, x.shape[1], step):
        part = x32[:, start : start + step]
        peak = np.maximum(np.abs(part).max(axis=1, keepdims=True), np.float32(floor))
        scale = peak / np.float32(448.0)
        safe = np.where(scale > 0, scale, np.float32(1.0))  # a row of zeros quantises to zeros
        values = to_e4m3((part / safe).astype(np.float64))
        result[:, start : start + step] = values * scale.astype(np.float64)
    return result


# -- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What config.json says about the computation; defaults are those of HF's config class.

    rope_scaling holds rope_type, factor, … as written, or None. groups = 1 means no grouping;
    experts = 0 means that every layer is dense.
    """

    hidden: int
    layers: int
    nextn: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    eps: float
    theta: float
    rope_scaling: dict[str, Any] | None
    max_positions: int
    dense_layers: int
    experts: int
    topk: int
    groups: int
    topk_groups: int
    routed_scale: float
    qk_norm: bool
    expert_bias: bool
    tied: bool


def read_shape(config: dict[str, Any]) -> Shape:
    """config.json → Shape."""

    def get(key: str, default: Any) -> Any:
        """The value, or the default if the key is missing; null is a value."""
        return config.get(key, default)

    rope = dict(get("rope_parameters", None) or {})
    hidden, heads = int(get("hidden_size", 2048)), int(get("num_attention_heads", 16))
    head_dim = int(get("head_dim", 128) or hidden // heads)
    groups = int(get("n_group", 8) or 1)
    experts = int(get("num_experts", 256) or 0)
    return Shape(
        hidden=hidden,
        layers=int(get("num_hidden_layers", 20)),
        nextn=int(get("num_nextn_predict_layers", 0) or 0),
        heads=heads,
        kv_heads=int(get("num_key_value_heads", 4)),
        head_dim=head_dim,
        rotary_dim=_rotary_dim(config, rope, head_dim),
        eps=float(get("rms_norm_eps", 1e-6)),
        theta=float(get("rope_theta", None) or rope.get("rope_theta", 600000.0)),
        rope_scaling=_rope_scaling(config, rope),
        max_positions=int(get("max_position_embeddings", 32768)),
        dense_layers=int(get("first_k_dense_replace", 1)) if experts else 1 << 30,
        experts=experts,
        topk=int(get("num_experts_per_tok", 8) or 1),
        groups=groups,
        topk_groups=int(get("topk_group", 4) or 1),
        routed_scale=float(get("routed_scaling_factor", 1.0)),
        qk_norm=bool(get("use_qk_norm", True)),
        expert_bias=bool(get("moe_router_enable_expert_bias", True)),
        tied=bool(get("tie_word_embeddings", False)),
    )


def _rotary_dim(config: dict[str, Any], rope: dict[str, Any], head_dim: int) -> int:
    """`partial_rotary_factor`, else `rotary_dim` (as the 1T models write it), else all of the head."""
    factor = config.get("partial_rotary_factor", rope.get("partial_rotary_factor"))
    written = config.get("rotary_dim")
    by_factor = None if factor is None else int(head_dim * factor)
    if by_factor is not None and written is not None and by_factor != written:
        raise CheckpointError(
            f"config.json: rotary_dim {written} disagrees with partial_rotary_factor {factor}"
            f" of head_dim {head_dim}; remove the wrong one"
        )
    if by_factor is not None:
        return by_factor
    return head_dim if written is None else int(written)


def _rope_scaling(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any] | None:
    scaling = dict(config.get("rope_scaling") or rope)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"config.json: rope_scaling type {kind!r}; known: linear, yarn")
    return scaling | {"rope_type": kind}


# -- rotary --------------------------------------------------------------------------------------


def yarn_range(shape: Shape) -> tuple[float, float]:
    """The pairs between which YaRN ramps from unscaled (below lo) to scaled (above hi)."""
    scaling = shape.rope_scaling or {}
    original = scaling.get("original_max_position_embeddings") or shape.max_positions

    def pair_turning(turns: float) -> float:
        """The (real) pair index that makes `turns` full turns within the original context."""
        ratio = math.log(original / (turns * 2 * math.pi)) / (2 * math.log(shape.theta))
        return shape.rotary_dim * ratio

    lo = pair_turning(scaling.get("beta_fast") or 32)
    hi = pair_turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        lo, hi = math.floor(lo), math.ceil(hi)
    lo, hi = max(lo, 0), min(hi, shape.rotary_dim - 1)
    return lo, hi + 0.001 if lo == hi else hi


def yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """m, which multiplies cos and sin (so that only rotary dims are scaled)."""
    given = scaling.get("attention_factor", scaling.get("attn_factor"))
    if given is not None:
        return float(given)
    factor = float(scaling["factor"])

    def gain(c: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * c * math.log(factor) + 1.0

    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return gain(mscale) / gain(all_dim) if mscale and all_dim else gain(1.0)


def inverse_frequencies(shape: Shape) -> tuple[Array, float]:
    """Radians per position of each rotary pair [R/2], and the factor m of the tables.

    Source: MODEL 3.3; transformers modeling_rope_utils._compute_yarn_parameters.
    """
    pair = np.arange(shape.rotary_dim // 2)
    base = shape.theta ** (-2.0 * pair / shape.rotary_dim)
    scaling = shape.rope_scaling
    if scaling is None:
        return base, 1.0
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return base / factor, 1.0
    lo, hi = yarn_range(shape)
    ramp = np.clip((pair - lo) / (hi - lo), 0.0, 1.0)
    return base / factor * ramp + base * (1.0 - ramp), yarn_attention_factor(scaling)


def rope_tables(shape: Shape, positions: Ids, kind: Tables = "exact") -> tuple[Array, Array]:
    """cos and sin, each [T, R/2]: exact, or with the float32 roundings of the definition."""
    inverse, factor = inverse_frequencies(shape)
    if kind == "exact":
        angle = positions[:, None] * inverse
        return np.cos(angle) * factor, np.sin(angle) * factor
    angle = to_float32(to_float32(positions[:, None].astype(np.float64)) * to_float32(inverse))
    m = np.float64(np.float32(factor))
    return to_float32(to_float32(np.cos(angle)) * m), to_float32(to_float32(np.sin(angle)) * m)


def rotate(u: Array, cos: Array, sin: Array, cast: Cast, tables: Tables = "exact") -> Array:
    """Rotary embedding of u [T, heads, D] in its first R dims; pairs are (j, j + R/2).

    tables = "model" is HF: tables in T and each product and the sum rounded to T. Otherwise one
    rounding at the end, as the engine does.
    """
    half = cos.shape[1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = u[..., :half], u[..., half : 2 * half]
    if tables == "model":
        cos, sin = cast(cos), cast(sin)
        turned = cast(first * cos) - cast(second * sin), cast(second * cos) + cast(first * sin)
    else:
        turned = first * cos - second * sin, second * cos + first * sin
    return np.concatenate([cast(turned[0]), cast(turned[1]), u[..., 2 * half :]], axis=-1)


# -- modules -------------------------------------------------------------------------------------


def rms(x: Array, weight: Array, eps: float, cast: Cast = keep) -> Array:
    """RMSNorm over the last axis: rounded to T, then multiplied by the weight in T (HF)."""
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return cast(weight * cast(y))


def silu(x: Array) -> Array:
    """x·sigmoid(x)."""
    return x * sigmoid(x)


def sigmoid(x: Array) -> Array:
    """1/(1 + e^-x), by tanh so that no size of x overflows."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


class MLP(NamedTuple):
    """The three projections of a SwiGLU."""

    gate: Linear
    up: Linear
    down: Linear


def mlp(x: Array, weights: MLP, cast: Cast = keep) -> Array:
    """SwiGLU with HF's casts: x [T, H] → [T, H]."""
    return cast(weights.down(cast(cast(silu(cast(weights.gate(x)))) * cast(weights.up(x)))))


def attention(
    y: Array,
    qkv: Linear,
    out: Linear,
    norms: tuple[Array, Array] | None,
    shape: Shape,
    rope: tuple[Array, Array],
    cast: Cast = keep,
    tables: Tables = "exact",
) -> Array:
    """Causal grouped-query attention over one sequence: y [T, H] (normed) → [T, H].

    norms  query and key norm weights [D], applied per head before rotary; None without QK norm
    rope   cos and sin of `rope_tables`
    Rows of the fused projection: all query heads, all key heads, all value heads. The softmax is
    scaled by the full head size, also when the rotary part is smaller (HF BailingMoeV2Attention).
    """
    rows, size = len(y), shape.head_dim
    fused = cast(qkv(y)).reshape(rows, shape.heads + 2 * shape.kv_heads, size)
    q, k, v = np.split(fused, [shape.heads, shape.heads + shape.kv_heads], axis=1)
    if norms is not None:
        q, k = rms(q, norms[0], shape.eps, cast), rms(k, norms[1], shape.eps, cast)
    q, k = rotate(q, *rope, cast, tables), rotate(k, *rope, cast, tables)
    mixed = np.empty_like(q)
    for head in range(shape.heads):
        shared = head // (shape.heads // shape.kv_heads)
        mixed[:, head] = causal_mix(q[:, head], k[:, shared], v[:, shared], cast)
    return cast(out(mixed.reshape(rows, -1)))


def causal_mix(q: Array, k: Array, v: Array, cast: Cast = keep) -> Array:
    """softmax(q kᵀ/√D) v of one head, each [T, D]; position t sees positions 0 … t."""
    result = np.empty_like(q)
    for start in range(0, len(q), QUERY_ROWS):
        stop = min(start + QUERY_ROWS, len(q))
        scores = q[start:stop] @ k[:stop].T / math.sqrt(q.shape[1])
        scores[np.arange(start, stop)[:, None] < np.arange(stop)[None, :]] = -np.inf
        share = np.exp(scores - scores.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        result[start:stop] = cast(cast(share) @ v[:stop])
    return result


class Routing(NamedTuple):
    """The experts of each token.

    ids      [T, K] that were used: the replayed ones, else `own`
    weights  [T, K] of these ids, from this model's own scores
    own      [T, K] that this model chooses, by choice score descending, then by index
    margin   [T] smallest difference of scores that would have to vanish to change the set `own`
    slots    [T] the same for its order
    """

    ids: Ids
    weights: Array
    own: Ids
    margin: Array
    slots: Array


def router(y: Array, gate: Array, bias: Array, shape: Shape, replay: Ids | None = None) -> Routing:
    """Grouped sigmoid routing: y [T, H], gate [E, H], bias [E] → Routing. Nothing is rounded.

    The bias moves only the choice, never the weights; groups that lose are masked with -inf, since
    a choice score may be negative. Source: HF BailingMoeV2Gate.
    """
    scores = sigmoid(y @ gate.T)
    choice, group_margin = limit_groups(scores + bias, shape)
    order = np.argsort(-choice, axis=1, kind="stable")  # of equals, the lower index
    own = order[:, : shape.topk]
    best = np.take_along_axis(choice, order[:, : shape.topk + 1], axis=1)
    with np.errstate(invalid="ignore"):
        gaps = best[:, :-1] - best[:, 1:]
    last = gaps[:, shape.topk - 1] if gaps.shape[1] >= shape.topk else np.full(len(y), np.inf)
    margin = np.minimum(last, group_margin)
    slots = np.minimum(gaps[:, : shape.topk - 1].min(axis=1, initial=np.inf), margin)
    ids = own if replay is None else replay
    weights = np.take_along_axis(scores, ids, axis=1)
    if shape.topk > 1:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return Routing(ids, weights * shape.routed_scale, own, margin, slots)


def limit_groups(choice: Array, shape: Shape) -> tuple[Array, Array]:
    """Keep the groups with the largest sum of their two best scores; -inf elsewhere.

    choice [T, E] → the masked scores, and [T] the difference that decided between groups.
    """
    rows = len(choice)
    if shape.groups <= 1 or shape.topk_groups >= shape.groups:
        return choice, np.full(rows, np.inf)
    grouped = choice.reshape(rows, shape.groups, -1)
    totals = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    order = np.argsort(-totals, axis=1, kind="stable")
    ranked = np.take_along_axis(totals, order, axis=1)
    kept = np.zeros(totals.shape, dtype=bool)
    np.put_along_axis(kept, order[:, : shape.topk_groups], True, axis=1)
    masked = np.where(kept[:, :, None], grouped, -np.inf).reshape(rows, -1)
    return masked, ranked[:, shape.topk_groups - 1] - ranked[:, shape.topk_groups]


def moe(
    y: Array,
    routing: Routing,
    expert: Callable[[int], MLP],
    shared: MLP | None,
    cast: Cast = keep,
    w8a8: bool = False,
) -> Array:
    """Weighted sum of the chosen experts plus the shared expert: y [T, H] → [T, H].

    `expert(e)` loads expert e when its turn comes. With w8a8 the roundings are those of fused FP8
    kernels: SwiGLU rounded once, and the routing weight multiplies before the result is rounded.
    """
    total = np.zeros_like(y)
    for e in np.unique(routing.ids):
        token, slot = np.nonzero(routing.ids == e)
        weight = routing.weights[token, slot][:, None]
        m = expert(int(e))
        if w8a8:
            x = y[token]
            part = cast(weight * m.down(cast(silu(cast(m.gate(x))) * cast(m.up(x)))))
        else:
            part = weight * mlp(y[token], m, cast)
        np.add.at(total, token, part)
    total = cast(total)
    return total if shared is None else cast(total + mlp(y, shared, cast))


# -- the model -----------------------------------------------------------------------------------


class LayerTrace(NamedTuple):
    """After one layer: the residual stream [T, H], and its routing if it is a MoE layer."""

    layer: int
    hidden: Array
    routing: Routing | None


@dataclass(frozen=True)
class ReferenceOutput:
    """Of one sequence: logits [T, V]; the rest per MoE layer, [moe_layers, T, K] or [moe_layers, T]."""

    logits: Array
    routing_ids: Ids
    routing_weights: Array
    margin: Array
    slots: Array


class Reference:
    """A checkpoint folder, computed by the definition.

    dtype         float64: nothing is rounded. bfloat16: every T(·) of the definition is applied,
                  to weights (dequantised ones included) and activations.
    numerics      exact: FP8 weights are dequantised. w8a8: inputs of FP8 matrices are quantised too.
    rope_tables   exact (default in float64), float32 (default in bf16: the engine's),
                  model (HF's: tables and products in T)
    head_rounds   HF rounds logits to T; by default the accumulator is kept

    Raises CheckpointError if a tensor is missing or the layer count fits no MTP convention.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Literal["float64", "bfloat16"] = "float64",
        numerics: Literal["exact", "w8a8"] = "exact",
        rope_tables: Tables | None = None,
        head_rounds: bool = False,
    ) -> None:
        self.folder = Path(folder)
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.shape = read_shape(config)
        self.tensors = list_tensors(self.folder)
        self.num_layers = self._main_layers()
        self.first_moe = min(self.shape.dense_layers, self.num_layers)
        self.cast: Cast = to_bf16 if dtype == "bfloat16" else keep
        self.numerics = numerics
        self.tables: Tables = rope_tables or ("exact" if dtype == "float64" else "float32")
        self.head_rounds = head_rounds
        self.quantization = _quantization(config)

    @property
    def num_moe_layers(self) -> int:
        """Main layers that have a router; they are the last ones."""
        return self.num_layers - self.first_moe

    def _main_layers(self) -> int:
        """Layers before the first MTP layer, which is known by its eh_proj and by nothing else."""
        counted = self.shape.layers
        mtp = [
            m for m in range(counted + self.shape.nextn) if self._at(m, "eh_proj") in self.tensors
        ]
        if not mtp:
            return counted
        if mtp[0] not in (counted, counted - self.shape.nextn):
            raise CheckpointError(
                f"{self.folder}: first MTP layer is {mtp[0]}, but num_hidden_layers is {counted}"
                f" and num_nextn_predict_layers {self.shape.nextn}"
            )
        return mtp[0]

    @staticmethod
    def _at(layer: int, module: str) -> str:
        return f"model.layers.{layer}.{module}.weight"

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self.tensors[name]

    def vector(self, name: str, cast: Cast | None = None) -> Array:
        """A small tensor, whole, rounded to T unless another cast is given."""
        stored = self._stored(name)
        return (cast or self.cast)(decode(stored.raw(), stored.dtype))

    def linear(self, module: str) -> Matrix:
        """The matrix of a module with its bias and FP8 scales, each if stored."""
        name = f"{module}.weight"
        stored = self._stored(name)
        scale_name = next(
            (name + end for end in ("_scale_inv", "_scale") if name + end in self.tensors), None
        )
        quantised = stored.dtype == "F8_E4M3"
        if quantised and scale_name is None:
            raise CheckpointError(f"{self.folder}: {name} is FP8 but has no scale tensor")
        block, activations = self.quantization
        fp8_inputs = quantised and self.numerics == "w8a8" and activations != "none"
        group = None if activations == "row" else 128
        return Matrix(
            stored=stored,
            scale=self.vector(scale_name, keep) if quantised and scale_name else None,
            block=block,
            bias=self.vector(f"{module}.bias") if f"{module}.bias" in self.tensors else None,
            weight_cast=keep if fp8_inputs else self.cast,
            quantize=(lambda x: quantize_groups(x, group)) if fp8_inputs else None,
        )

    def mlp_weights(self, prefix: str) -> MLP:
        """The SwiGLU stored under a prefix."""
        return MLP(*(self.linear(f"{prefix}.{part}_proj") for part in ("gate", "up", "down")))

    def attend(self, x: Array, layer: int, rope: tuple[Array, Array]) -> Array:
        """Residual stream after the attention half of a layer."""
        at = f"model.layers.{layer}."
        norms = None
        if self.shape.qk_norm:
            norms = (
                self.vector(f"{at}attention.query_layernorm.weight"),
                self.vector(f"{at}attention.key_layernorm.weight"),
            )
        y = rms(x, self.vector(f"{at}input_layernorm.weight"), self.shape.eps, self.cast)
        qkv, out = (self.linear(f"{at}attention.{m}") for m in ("query_key_value", "dense"))
        mixed = attention(y, qkv, out, norms, self.shape, rope, self.cast, self.tables)
        return self.cast(x + mixed)

    def feed_forward(
        self, x: Array, layer: int, replay: Ids | None = None
    ) -> tuple[Array, Routing | None]:
        """Residual stream after the MLP or MoE half of a layer, and the routing of the latter."""
        at = f"model.layers.{layer}."
        y = rms(x, self.vector(f"{at}post_attention_layernorm.weight"), self.shape.eps, self.cast)
        if layer < self.first_moe:
            return self.cast(x + mlp(y, self.mlp_weights(f"{at}mlp"), self.cast)), None
        gate = self.vector(f"{at}mlp.gate.weight")
        bias_name = f"{at}mlp.gate.expert_bias"
        if bias_name in self.tensors or self.shape.expert_bias:
            bias = self.vector(bias_name, keep)
        else:
            bias = np.zeros(self.shape.experts)
        routing = router(y, gate, bias, self.shape, replay)
        has_shared = self._at(layer, "mlp.shared_experts.gate_proj") in self.tensors
        shared = self.mlp_weights(f"{at}mlp.shared_experts") if has_shared else None
        w8a8 = (
            self.numerics == "w8a8"
            and self.linear(f"{at}mlp.experts.0.up_proj").quantize is not None
        )
        mixed = moe(
            y, routing, lambda e: self.mlp_weights(f"{at}mlp.experts.{e}"), shared, self.cast, w8a8
        )
        return self.cast(x + mixed), routing

    def layers(
        self, ids: Sequence[int], replay: Callable[[int], Ids | None] | None = None
    ) -> Iterator[LayerTrace]:
        """The residual stream after each main layer, computed when asked for.

        `replay(layer)` gives the expert ids [T, K] to use in a MoE layer, or None for its own; it
        is called when that layer is computed, so it may wait for another model's choice.
        """
        rope = rope_tables(self.shape, np.arange(len(ids)), self.tables)
        embedding = self._stored("model.word_embeddings.weight")
        x = self.cast(decode(embedding.raw()[np.asarray(ids)], embedding.dtype))
        for layer in range(self.num_layers):
            x = self.attend(x, layer, rope)
            chosen = replay(layer) if replay and layer >= self.first_moe else None
            x, routing = self.feed_forward(x, layer, chosen)
            yield LayerTrace(layer, x, routing)

    def head(self, hidden: Array) -> Array:
        """Logits [T, V] of the last residual stream [T, H]."""
        h = rms(hidden, self.vector("model.norm.weight"), self.shape.eps, self.cast)
        logits = self.linear("model.word_embeddings" if self.shape.tied else "lm_head")(h)
        return self.cast(logits) if self.head_rounds else logits

    def forward(
        self,
        ids: Sequence[int],
        *,
        routes: Ids | None = None,
        on_layer: Callable[[int, LayerTrace], None] | None = None,
    ) -> ReferenceOutput:
        """Logits of every position of one sequence.

        routes  [moe_layers, T, K] expert ids to use; their weights come from this model's scores
        """
        first = self.first_moe

        def replay(layer: int) -> Ids | None:
            return None if routes is None else np.asarray(routes[layer - first], dtype=np.int64)

        routings: list[Routing] = []
        hidden = np.empty((len(ids), self.shape.hidden))
        for trace in self.layers(ids, replay):
            hidden = trace.hidden
            if trace.routing is not None:
                routings.append(trace.routing)
            if on_layer is not None:
                on_layer(trace.layer, trace)
        rows, topk = len(ids), self.shape.topk
        return ReferenceOutput(
            logits=self.head(hidden),
            routing_ids=np.array([r.ids for r in routings])
            .reshape(-1, rows, topk)
            .astype(np.int64),
            routing_weights=np.array([r.weights for r in routings]).reshape(-1, rows, topk),
            margin=np.array([r.margin for r in routings]).reshape(-1, rows),
            slots=np.array([r.slots for r in routings]).reshape(-1, rows),
        )


def _quantization(
    config: dict[str, Any],
) -> tuple[tuple[int, int], Literal["none", "row", "group"]]:
    """Block size of FP8 weight scales, and which inputs share a scale: a row, 128 columns, or none."""
    section = config.get("quantization_config") or config.get("compression_config") or {}
    if section.get("quant_method") != "compressed-tensors":
        rows, columns = section.get("weight_block_size") or (128, 128)
        return (int(rows), int(columns)), "group"
    group = next(iter(section["config_groups"].values()))
    rows, columns = group["weights"].get("block_structure") or (128, 128)
    inputs = group.get("input_activations")
    if inputs is None:
        return (int(rows), int(columns)), "none"
    return (int(rows), int(columns)), "row" if inputs["strategy"] == "token" else "group"
