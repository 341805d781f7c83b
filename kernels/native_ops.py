"""The operations of `kernels/cpu` on tensors: attention, what acts on rows, router, sampling.

Same contracts as the torch kernels of the same names, with bits of their own: each level is
row-invariant, and levels may differ. Matrix products are elsewhere (kernels/cpu/gemm.cpp).

    ops = Ops(library)          # native.library(), or one level of it
    plan = plan_attention(spans, block_size=16)
    q = ops.place_qkv(qkv, plan, k_cache, v_cache, heads=9, tables=tables)
    out = ops.attention(q, k_cache, v_cache, plan, scale=64**-0.5)

Shapes: T packed tokens, H query heads, G kv heads, D head size, E experts, V vocabulary.
"""

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import native_sampling
from .attention import QuerySpan
from .sampling import Draw, Rule

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
# p pointer, i int32, l int64, f float
_SIGNATURES = {
    "attention": "ippppllllllpppppl" + "fi",
    "rms_norm": "iplppllfi",
    "add_rms_norm": "ipppppllfi",
    "add": "ippplli",
    "swiglu": "iplplplli",
    "rope": "ippppllllii",
    "place_qkv": "ipl" + "llll" + "ppf" + "ppli" + "pppppli",
    "route": "plplllllfippi",
}
_KINDS = {"p": _POINTER, "i": _INT, "l": _LONG, "f": _FLOAT}


@dataclass(frozen=True)
class PagedPlan:
    """Where each packed token is stored, and which block table it reads.

    write_slots  (T,) int64
    positions    (T,) int64
    spans        (4, n) int64: per rollout first row, start, length, where its table begins
    blocks       int32: all block tables, one after another
    block_size   slots of a block
    num_slots    a cache must have as many
    """

    write_slots: torch.Tensor
    positions: torch.Tensor
    spans: torch.Tensor
    blocks: torch.Tensor
    block_size: int
    num_slots: int
    num_positions: int


def plan_attention(sequences: Sequence[QuerySpan], *, block_size: int) -> PagedPlan:
    """What one step's layers share.

    sequences  in packed order, rows contiguous from 0
    Raises ValueError if a block table does not cover its sequence.
    """
    spans = np.empty((4, len(sequences)), dtype=np.int64)
    spans[0] = [s.row for s in sequences]
    spans[1] = [s.start for s in sequences]
    spans[2] = [s.length for s in sequences]
    sizes = np.array([len(s.block_table) for s in sequences], dtype=np.int64)
    spans[3] = np.cumsum(sizes) - sizes
    starts, lengths = spans[1], spans[2]
    ends = starts + lengths
    if (short := np.flatnonzero(sizes * block_size < ends)).size:
        raise ValueError(f"block table covers too little for {ends[short[0]]} tokens")
    named = itertools.chain.from_iterable(s.block_table for s in sequences)
    blocks = np.fromiter(named, dtype=np.int32, count=int(sizes.sum()))
    owner = np.repeat(np.arange(len(sequences)), lengths)
    positions = np.arange(owner.size) - (np.cumsum(lengths) - lengths)[owner] + starts[owner]
    block, inside = np.divmod(positions, block_size)
    slots = blocks[spans[3][owner] + block].astype(np.int64) * block_size + inside
    return PagedPlan(
        torch.from_numpy(slots),
        torch.from_numpy(positions),
        torch.from_numpy(spans),
        torch.from_numpy(blocks),
        block_size,
        (int(blocks.max()) + 1) * block_size if blocks.size else 0,
        int(ends.max()) if ends.size else 0,
    )


class Ops:
    """The operations of one level; `threads` follows torch.get_num_threads()."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, kinds in _SIGNATURES.items():
            function = getattr(library, f"everstep_{name}")
            function.argtypes = [_KINDS[kind] for kind in kinds]
            function.restype = None
        native_sampling.declare(library)
        self.library = library

    # -- attention

    def attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: PagedPlan,
        *,
        scale: float,
    ) -> torch.Tensor:
        """Causal attention of every packed token over its rollout's keys up to itself.

        q        (T, H, D) T
        k_cache  (slots, G, D) T, this step's keys written already; G divides H
        v_cache  as k_cache
        returns  (T, H, D) T. Softmax in float32, weights rounded to T (MODEL.md §3.2)

        Never reads a slot beyond a token's own position.
        """
        tokens, heads, dim = q.shape
        kv_heads = k_cache.shape[1]
        if tokens != plan.positions.shape[0] or heads % kv_heads:
            raise ValueError(f"{tuple(q.shape)} does not fit the plan or {kv_heads} kv heads")
        _check_caches(k_cache, v_cache, plan)
        q = _with_heads(q)
        k_cache, v_cache = _same_slots(k_cache, v_cache)
        out = torch.empty((tokens, heads, dim), dtype=q.dtype)
        count = plan.spans.shape[1]
        rows, starts, lengths, tables = (plan.spans.data_ptr() + 8 * i * count for i in range(4))
        self.library.everstep_attention(
            _is_bf16(q, k_cache, v_cache),
            q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(),
            heads, kv_heads, dim, q.stride(0), k_cache.stride(0),
            count, rows, starts, lengths, tables,
            plan.blocks.data_ptr(), plan.block_size, scale, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def place_qkv(
        self,
        qkv: torch.Tensor,
        plan: PagedPlan,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        heads: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        norms: tuple[torch.Tensor, torch.Tensor] | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """QK norm, rotary, and this step's keys and values into their slots (MODEL.md §3.2).

        qkv      (T, (H + 2G)·D) T
        tables   cosines and sines by position, (positions, d_r/2) float32, or T: the rotation is
                 then rounded to T at each step
        norms    weights (D,) T of the query norm and the key norm, None without QK norm
        returns  (T, H, D) T
        """
        tokens, (_, kv_heads, dim) = qkv.shape[0], k_cache.shape
        if qkv.shape[1] != (heads + 2 * kv_heads) * dim or tokens != plan.positions.shape[0]:
            raise ValueError(f"{tuple(qkv.shape)} is not {heads} + 2·{kv_heads} heads of {dim}")
        _check_caches(k_cache, v_cache, plan)
        if not (_has_heads(k_cache) and _has_heads(v_cache)) or (
            k_cache.stride(0) != v_cache.stride(0)
        ):
            raise ValueError("the caches must be alike, with heads side by side in a slot")
        if tables[0].shape[0] < plan.num_positions:
            raise ValueError(f"rotary tables end before position {plan.num_positions - 1}")
        qkv = _with_rows(qkv)
        rounds = tables[0].dtype == qkv.dtype
        cos, sin = (_contiguous(table.float()) for table in tables)
        weights = None if norms is None else [_contiguous(w) for w in norms]
        q = torch.empty((tokens, heads, dim), dtype=qkv.dtype)
        self.library.everstep_place_qkv(
            _is_bf16(qkv, k_cache, v_cache, *(weights or ())),
            qkv.data_ptr(), qkv.stride(0), tokens, heads, kv_heads, dim,
            weights[0].data_ptr() if weights else None,
            weights[1].data_ptr() if weights else None, eps,
            cos.data_ptr(), sin.data_ptr(), cos.shape[1], rounds,
            plan.positions.data_ptr(), plan.write_slots.data_ptr(),
            q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), k_cache.stride(0),
            torch.get_num_threads(),
        )  # fmt: skip
        return q

    def apply_rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate the first d_r dimensions of each head, halves paired, the rest unchanged.

        x         (T, heads, D) T
        cos, sin  (T, d_r/2) float32, or T: the rotation is then done in T
        """
        x = _contiguous(x)
        rounds = cos.dtype == x.dtype
        cos, sin = _contiguous(cos.float()), _contiguous(sin.float())
        out = torch.empty_like(x)
        self.library.everstep_rope(
            _is_bf16(x), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
            *x.shape, cos.shape[1], rounds, torch.get_num_threads(),
        )  # fmt: skip
        return out

    # -- rows

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """T(weight · T(y · rsqrt(mean(y²) + eps))) over the last dimension, y = float32(x)."""
        width = x.shape[-1]
        rows = _with_rows(x.reshape(-1, width))
        weight = _contiguous(weight)
        out = torch.empty(x.shape, dtype=x.dtype)
        self.library.everstep_rms_norm(
            _is_bf16(x, weight), rows.data_ptr(), rows.stride(0), weight.data_ptr(),
            out.data_ptr(), rows.shape[0], width, eps, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """s = T(x + y) and rms_norm(s), both (T, H) T."""
        x, y, weight = _contiguous(x), _contiguous(y), _contiguous(weight)
        _check_same_shape(x, y)
        total, out = torch.empty_like(x), torch.empty_like(x)
        self.library.everstep_add_rms_norm(
            _is_bf16(x, y, weight), x.data_ptr(), y.data_ptr(), weight.data_ptr(),
            total.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps,
            torch.get_num_threads(),
        )  # fmt: skip
        return total, out

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """T(x + y), (T, H) T."""
        x, y = _contiguous(x), _contiguous(y)
        _check_same_shape(x, y)
        out = torch.empty_like(x)
        self.library.everstep_add(
            _is_bf16(x, y), x.data_ptr(), y.data_ptr(), out.data_ptr(), *x.shape,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """T(T(silu(gate)) · up), (M, I) T; silu inside in float32."""
        gate, up = _with_rows(gate), _with_rows(up)
        _check_same_shape(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype)
        self.library.everstep_swiglu(
            _is_bf16(gate, up), gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0),
            out.data_ptr(), *gate.shape, torch.get_num_threads(),
        )  # fmt: skip
        return out

    # -- router

    def route(
        self,
        logits: torch.Tensor,
        bias: torch.Tensor,
        *,
        top_k: int,
        n_group: int,
        topk_group: int,
        scaling: float,
        forced_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts and their weights from the router's logits.

        logits      (T, E) float32
        bias        (E,) float32; added to the sigmoids for the choice, not in the weights
        forced_ids  (T, K) int64: use these experts instead (routing replay)
        returns     ids (T, K) int64, weights (T, K) float32; slots by choice score descending.
                    Ties: the lower expert, and the lower group, wins.
        """
        tokens, num_experts = logits.shape
        logits, bias = _with_rows(logits), _contiguous(bias)
        if logits.dtype != torch.float32 or bias.dtype != torch.float32:
            raise ValueError(f"the router is float32, not {logits.dtype} and {bias.dtype}")
        if not 0 < top_k <= num_experts or num_experts % max(n_group, 1):
            raise ValueError(f"{top_k} of {num_experts} experts in {n_group} groups")
        ids = torch.empty((tokens, top_k), dtype=torch.int64)
        if forced_ids is not None:
            if forced_ids.numel() and not 0 <= forced_ids.min() <= forced_ids.max() < num_experts:
                raise ValueError(f"forced experts beyond {num_experts}")
            ids.copy_(forced_ids)
        weights = torch.empty((tokens, top_k), dtype=torch.float32)
        self.library.everstep_route(
            logits.data_ptr(), logits.stride(0), bias.data_ptr(), tokens, num_experts,
            top_k, n_group, topk_group, scaling, forced_ids is not None,
            ids.data_ptr(), weights.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return ids, weights

    # -- sampling

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, V) float32 → (B, V) float32: the numbers that a draw reports as lp_raw."""
        return native_sampling.log_softmax(self.library, logits)

    def sample(self, logits: torch.Tensor, rules: Sequence[Rule]) -> list[Draw | None]:
        """Draw one token per row, as `sampling.sample` does; None where its rule takes the
        logits beyond float32.

        logits  (B, V) float32, finite; not changed
        rules   B
        """
        return native_sampling.draw_list(self.library, logits, rules)


# -- layouts that the library takes; anything else is copied


def _is_bf16(*tensors: torch.Tensor) -> bool:
    """Which of the two dtypes all of them have."""
    dtype = tensors[0].dtype
    if dtype not in (torch.bfloat16, torch.float32):
        raise NotImplementedError(f"{dtype}: the C++ kernels know bfloat16 and float32")
    if any(t.dtype != dtype for t in tensors):
        raise ValueError(f"mixed dtypes: {[str(t.dtype) for t in tensors]}")
    return dtype == torch.bfloat16


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """(rows, width) with the elements of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _has_heads(x: torch.Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _with_heads(x: torch.Tensor) -> torch.Tensor:
    """(rows, heads, D) with the heads of a row side by side."""
    return x if _has_heads(x) else x.contiguous()


def _same_slots(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = _with_heads(k), _with_heads(v)
    return (k, v) if k.stride(0) == v.stride(0) else (k.contiguous(), v.contiguous())


def _check_same_shape(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.shape != y.shape or x.dim() != 2:
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)}")


def _check_caches(k: torch.Tensor, v: torch.Tensor, plan: PagedPlan) -> None:
    if k.shape != v.shape or k.shape[0] < plan.num_slots:
        raise ValueError(
            f"caches {tuple(k.shape)}, {tuple(v.shape)}: the plan needs {plan.num_slots} slots"
        )
