"""The operations as the engine calls them: one contract each, by the C++ library or by torch.

`native.level()` decides for the process; weights prepared here remember their own form. Levels
are each row-invariant and each have bits of their own, so the level is part of every rollout's
numerics id. W8A8 products and float16 stay with torch at every level.

Shapes: T packed tokens, H hidden, I width of an MLP, E experts, K experts per token.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from . import activation, gemm, native, native_sampling, norm
from . import attention as torch_attention
from . import experts as torch_experts
from . import rope as torch_rope
from . import router as torch_router
from . import sampling as torch_sampling
from .attention import AttentionPlan, QuerySpan
from .gemm import Weight
from .native_experts import ExpertTable
from .native_ops import Ops, PagedPlan
from .native_ops import plan_attention as plan_paged
from .packed import PackedWeight, packed_gate_up, packed_linear, packed_linear_float, packing
from .pieces import Pieces, at_once, drain
from .sampling import Draw, DrawArrays, Rule

Linear = Weight | PackedWeight
Plan = AttentionPlan | PagedPlan
Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """Gate and up (I, H) of an MLP, each a weight of its own."""

    gate: Weight
    up: Weight


GateUp = Pair | PackedWeight


class _Chosen:
    """The library of this process; None: torch. `use` swaps it in tests."""

    def __init__(self) -> None:
        self._ops: Ops | None = None
        self._name: str | None = None

    def ops(self) -> Ops | None:
        if self._name is None:
            library = native.library()
            self._ops = None if library is None else Ops(library)
            self._name = native.level().name
        return self._ops

    def name(self) -> str:
        self.ops()
        assert self._name is not None
        return self._name

    def set(self, name: str | None, library: ctypes.CDLL | None = None) -> None:
        if name is None or name == "torch":
            self._ops, self._name = None, name
        else:
            library = library or native.open_library(native.find_library(name))
            self._ops, self._name = Ops(library), name


_chosen = _Chosen()


def level_name() -> str:
    """amx, avx512, avx2, portable or torch."""
    return _chosen.name()


def library_in_use() -> ctypes.CDLL | None:
    """The C++ library of this process's level, None for torch."""
    ops = _chosen.ops()
    return None if ops is None else ops.library


@contextlib.contextmanager
def use_level(name: str, library: ctypes.CDLL | None = None) -> Iterator[None]:
    """Another level inside the block, for tests and comparisons; weights prepared outside keep
    their own.

    library  None: that of this level; else one built otherwise
    """
    _chosen.set(name, library)
    try:
        yield
    finally:
        _chosen.set(None)


# -- weights


def prepare(weight: Weight) -> Linear:
    """A copy of `weight` in the form that this level multiplies; its tensors may be a file's map."""
    return drain(preparing(weight))


def prepare_gate_up(gate: Weight, up: Weight) -> GateUp:
    """Gate and up of one MLP, together."""
    return drain(preparing_gate_up(gate, up))


def prepare_head(head: torch.Tensor) -> Linear:
    """(V, H) T whose products keep their float32 sums (`project`).

    torch has no bf16 product with float32 output on a CPU, so there the head is held in float32.
    """
    return drain(preparing_head(Weight(head, head.dtype)))


def preparing(weight: Weight, *, expands: bool = False) -> Pieces[Linear]:
    """`prepare`, in pieces. expands: FP8 weights are dequantised now, not at each use."""
    ops = _chosen.ops()
    if ops is None or _needs_torch(weight):
        return (yield from _copying(weight, expands=expands))
    return (yield from packing((weight,), ops.library, expands=expands))


def preparing_gate_up(gate: Weight, up: Weight, *, expands: bool = False) -> Pieces[GateUp]:
    """`prepare_gate_up`, in pieces."""
    ops = _chosen.ops()
    is_mixed = gate.kind != up.kind and not expands  # a file may keep one of them unquantised
    if ops is None or is_mixed or _needs_torch(gate) or _needs_torch(up):
        first = yield from _copying(gate, expands=expands)
        second = yield from _copying(up, expands=expands)
        return Pair(first, second)
    return (yield from packing((gate, up), ops.library, expands=expands))


def preparing_head(head: Weight) -> Pieces[Linear]:
    """`prepare_head`, in pieces."""
    if _chosen.ops() is not None:
        return (yield from preparing(head))
    copied = yield from _copying(head, held_in=torch.float32)
    return replace(copied, dtype=torch.float32)


@dataclass(frozen=True)
class ExpertBank:
    """The experts of a layer: gate and up 2 × (I, H), down (H, I) of each; `table` where the
    library takes all of them in one call."""

    gate_ups: Sequence[GateUp]
    downs: Sequence[Linear]
    table: ExpertTable | None = None


def prepare_experts(gate_ups: Sequence[GateUp], downs: Sequence[Linear]) -> ExpertBank:
    """All experts of a layer, held in memory."""
    pairs = [pair for pair in gate_ups if isinstance(pair, PackedWeight)]
    packed = [down for down in downs if isinstance(down, PackedWeight)]
    if len(pairs) == len(gate_ups) and len(packed) == len(downs):
        return ExpertBank(gate_ups, downs, ExpertTable(pairs, packed))
    return ExpertBank(gate_ups, downs)


def _copying(
    weight: Weight, *, expands: bool = False, held_in: torch.dtype | None = None
) -> Pieces[Weight]:
    """In memory of its own, contiguous and aligned: torch may round otherwise on other data."""
    keeps = weight.scale is not None and not expands
    n, k = weight.data.shape
    data = torch.empty((n, k), dtype=weight.data.dtype if keeps else held_in or weight.dtype)
    # of a dequantised row there is a float32 copy on the way
    count = at_once(n, k * (1 if keeps else 4), multiple=gemm.GROUP)
    for start in range(0, n, count):
        rows = slice(start, min(start + count, n))
        data[rows] = weight.data[rows] if keeps else weight.rows(rows).expanded()
        yield

    def copy(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.clone(memory_format=torch.contiguous_format)

    if keeps:
        return replace(weight, data=data, scale=copy(weight.scale), bias=copy(weight.bias))
    return Weight(data, weight.dtype, bias=copy(weight.bias))


def _needs_torch(weight: Weight) -> bool:
    is_w8a8 = weight.activations != "none" and weight.scale is not None
    return is_w8a8 or weight.dtype not in (torch.bfloat16, torch.float32)


# -- products


def linear(x: torch.Tensor, weight: Linear) -> torch.Tensor:
    """T(x Wᵀ + b), row-invariant, for every weight format. x (M, K) T → (M, N) T."""
    return packed_linear(x, weight) if isinstance(weight, PackedWeight) else gemm.linear(x, weight)


def project(x: torch.Tensor, head: Linear) -> torch.Tensor:
    """x Wᵀ with its float32 sums kept: (M, H) T → (M, V) float32."""
    if isinstance(head, PackedWeight):
        return packed_linear_float(x, head)
    return gemm.matmul_rows(x.float().contiguous(), head.data)


def gate_up(x: torch.Tensor, weights: GateUp) -> torch.Tensor:
    """T(T(silu(T(x Gᵀ))) · T(x Uᵀ)): (M, H) T → (M, I) T (MODEL.md §3.1)."""
    if isinstance(weights, PackedWeight):
        return packed_gate_up(x, weights)
    return activation.swiglu(gemm.linear(x, weights.gate), gemm.linear(x, weights.up))


def experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bank: "ExpertBank"
) -> torch.Tensor:
    """T(Σ_slot float32(mlp_{ids[slot]}(x)) · weights[slot]), slots in order (MODEL.md §3.5).

    x        (T, H) T
    ids      (T, K) int64, weights (T, K) float32
    returns  (T, H) T; each expert's output is rounded to T before it is weighted
    """
    if bank.table is not None:
        return bank.table(x, ids, weights)

    def one(expert: int, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        pair, down = bank.gate_ups[expert], bank.downs[expert]
        if isinstance(pair, Pair) and pair.gate.activations != "none":
            assert isinstance(down, Weight)
            return torch_experts.expert_w8a8(rows, pair.gate, pair.up, down, weight)
        return linear(gate_up(rows, pair), down).float() * weight

    return torch_experts.sum_slots(x, ids, weights, len(bank.gate_ups), one)


def route(
    x: torch.Tensor,
    gate: Linear,
    bias: torch.Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    scaling: float,
    forced_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts and their weights, all in float32 (MODEL.md §3.4).

    x           (T, H) T
    gate        (E, H) float32
    bias        (E,) float32; added for the choice, not in the weights
    forced_ids  (T, K) int64: use these experts instead (routing replay)
    returns     ids (T, K) int64, weights (T, K) float32; slots by choice score descending.
                Ties: the lower expert, and the lower group, wins.
    """
    ops = _chosen.ops()
    choose = torch_router.choose if ops is None else ops.route
    return choose(
        linear(x.float(), gate),
        bias,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scaling=scaling,
        forced_ids=forced_ids,
    )


# -- rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """T(weight · T(y · rsqrt(mean(y²) + eps))), y = float32(x); (…, H) T (MODEL.md §3.1)."""
    ops = _chosen.ops()
    return norm.rms_norm(x, weight, eps) if ops is None else ops.rms_norm(x, weight, eps)


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """T(x + y), (T, H) T."""
    ops = _chosen.ops()
    return x + y if ops is None else ops.add(x, y)


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = T(x + y) and rms_norm(s), both (T, H) T."""
    ops = _chosen.ops()
    if ops is not None:
        return ops.add_rms_norm(x, y, weight, eps)
    total = x + y
    return total, norm.rms_norm(total, weight, eps)


# -- attention


def plan_attention(
    sequences: Sequence[QuerySpan], *, block_size: int, heads: int, kv_heads: int
) -> Plan:
    """Gather and scatter indices of one step, for every layer.

    sequences  in packed order, rows contiguous from 0
    Raises ValueError if a block table does not cover its sequence.
    """
    if _chosen.ops() is not None:
        return plan_paged(sequences, block_size=block_size)
    tile = torch_attention.tokens_per_tile(heads, kv_heads)
    return torch_attention.plan_attention(sequences, block_size=block_size, tile_tokens=tile)


def place_qkv(
    qkv: torch.Tensor,
    plan: Plan,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    heads: int,
    tables: Tables,
    norms: Tables | None,
    eps: float,
) -> torch.Tensor:
    """QK norm, rotary, and this step's keys and values into their slots (MODEL.md §3.2).

    qkv      (T, (heads + 2G)·D) T: all query heads, all key heads, all value heads
    k_cache  (slots, G, D) T, as v_cache
    tables   cosines and sines by position, (positions, d_r/2) float32, or T for comparisons with
             Hugging Face: the rotation is then done in T
    norms    weights (D,) T of the query norm and the key norm, None without QK norm
    returns  q (T, heads, D) T
    """
    if isinstance(plan, PagedPlan):
        ops = _chosen.ops()
        assert ops is not None
        return ops.place_qkv(
            qkv, plan, k_cache, v_cache, heads=heads, tables=tables, norms=norms, eps=eps
        )
    kv_heads, d = k_cache.shape[1:]
    q_end, k_end = heads * d, (heads + kv_heads) * d
    q = qkv[:, :q_end].reshape(-1, heads, d)
    k = qkv[:, q_end:k_end].reshape(-1, kv_heads, d)
    v = qkv[:, k_end:].reshape(-1, kv_heads, d)
    if norms is not None:
        q, k = norm.rms_norm(q, norms[0], eps), norm.rms_norm(k, norms[1], eps)
    cos, sin = tables[0][plan.positions], tables[1][plan.positions]
    k_cache.index_copy_(0, plan.write_slots, torch_rope.apply_rope(k, cos, sin))
    v_cache.index_copy_(0, plan.write_slots, v)
    return torch_rope.apply_rope(q, cos, sin)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
) -> torch.Tensor:
    """Causal attention of every packed token over its rollout's keys up to itself.

    q        (T, heads, D) T
    k_cache  (slots, G, D) T, this step's keys written already; G divides heads
    v_cache  as k_cache
    scale    multiplies q·k before the softmax (D**-0.5)
    returns  (T, heads, D) T. Softmax in float32, weights rounded to T, sums in float32
             (MODEL.md §3.2). Never reads slots beyond a token's own position.
    """
    if isinstance(plan, PagedPlan):
        ops = _chosen.ops()
        assert ops is not None
        return ops.attention(q, k_cache, v_cache, plan, scale=scale)
    return torch_attention.attention(q, k_cache, v_cache, plan, scale=scale)


# -- drawing


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """(B, V) float32 → (B, V) float32, in the order of sums of `sample`'s logprobs."""
    ops = _chosen.ops()
    return torch_sampling.log_softmax(logits) if ops is None else ops.log_softmax(logits)


def sample(logits: torch.Tensor, rules: Sequence[Rule]) -> list[Draw | None]:
    """Draw one token per row, in the order of operations of DESIGN.md §2; None where its rule
    takes the logits beyond float32.

    logits  (B, V) float32, finite; not changed
    rules   B
    A row's outcome depends on that row and its rule alone.
    """
    ops = _chosen.ops()
    return torch_sampling.sample(logits, rules) if ops is None else ops.sample(logits, rules)


def draw(
    logits: torch.Tensor,
    rules: Sequence[Rule],
    *,
    seeds: Sequence[int],
    positions: Sequence[int],
    rows: Sequence[int],
) -> DrawArrays:
    """`sample` for many rows at once, as columns.

    logits     (.., V) float32, finite where a row is drawn from; not changed
    rules      N; they may be shared, since each draw has its
    seeds, positions  N: in place of the rules' own
    rows       N: which row of the logits each draws from
    """
    ops = _chosen.ops()
    if ops is not None:
        return native_sampling.draw(
            ops.library, logits, rules, seeds=seeds, positions=positions, rows=rows
        )
    each = zip(rules, seeds, positions, strict=True)
    own = [replace(rule, seed=seed, position=position) for rule, seed, position in each]
    return DrawArrays.of(torch_sampling.sample(logits[torch.tensor(rows)], own))


def explain() -> dict[str, str]:
    """What is used for each operation, and why: for `doctor`."""
    name, level = level_name(), native.level()
    reason = level.reason if level.name == name else "chosen by the caller"
    if name == "torch":
        return {"level": f"torch ({reason})"} | gemm.explain()
    return {
        "level": f"{name} ({reason})",
        "library": str(level.path),
        "linear": "packed tiles, one chain over K whatever the number of rows",
        "attention": "paged keys in ascending blocks, one code for prefill and decode",
        "sampling": "philox4x32-10, inverse of the cumulative sums",
    }
