"""A whole step of the model as one call of the C++ library (cpu/step.cpp).

`engine/model/model.py` is the definition; this runs the same functions of the library in the same order,
without coming back to Python between them: the same bits, for the weights that the library has
packed. What it does not cover (W8A8, a pair of two formats, forced routes) goes the other way.

Shapes: T packed tokens, R wanted rows, H hidden, D head size, G kv heads, V vocabulary, L MoE layers,
K experts per token.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .native_experts import ExpertTable
from .packed import PackedWeight, aligned_bytes

Longs = npt.NDArray[np.int64]
_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


@dataclass(frozen=True)
class StepLayer:
    """One decoder layer, every product packed; norms (H,) or (D,) T.

    mlp      gate-up and down of the dense MLP, or of the shared expert; None: it has none
    router   weight (E, H) and bias (E,) float32; None: a dense layer, as `experts`
    keys     (slots, G, D) T, as values: where this layer's KV lies
    """

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    qkv: PackedWeight
    dense: PackedWeight
    mlp: tuple[PackedWeight, PackedWeight] | None
    router: tuple[PackedWeight, torch.Tensor] | None
    experts: ExpertTable | None
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class StepShape:
    """The numbers of a model, as RingConfig names them; block_size: slots of a KV block."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    rms_norm_eps: float
    block_size: int


@dataclass(frozen=True)
class StepBatch:
    """Packed tokens of some rollouts: what a step computes.

    ids           (T,) int64
    spans         (5, n) int64, per rollout: first packed row, position of it, number of tokens, where
                  its block table begins in `blocks`, and the table's length
    blocks        int32: all block tables, one after another
    wanted        (R,) int64: packed rows whose logits are wanted
    wants_routes  whether the routes are
    """

    ids: Longs
    spans: Longs
    blocks: npt.NDArray[np.int32]
    wanted: Longs
    wants_routes: bool = False


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves; it lies in memory that the next step uses again.

    hidden       (T, H) T after the last norm
    logits       (R, V) float32
    bad_tokens   packed rows whose hidden state is not finite, bad_logits: places in `wanted`
    routes       ids (L, T, K) int64 and weights (L, T, K) float32 in slot order, where asked for
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    bad_tokens: list[int]
    bad_logits: list[int]
    routes: tuple[torch.Tensor, torch.Tensor] | None


class _Layer(ctypes.Structure):
    """The struct `Layer` of cpu/step.cpp."""

    _fields_ = [
        (name, _P)
        for name in (
            *("input_norm", "post_norm", "query_norm", "key_norm", "qkv", "dense"),
            *("gate_up", "down", "router", "bias", "gate_ups", "downs", "keys", "values"),
        )
    ]


class _Model(ctypes.Structure):
    """The struct `Model` of cpu/step.cpp."""

    _fields_ = [
        *((name, _L) for name in ("model_bytes", "layer_bytes", "step_bytes")),
        *((name, _L) for name in ("num_layers", "hidden", "heads", "kv_heads", "dim")),
        *((name, _L) for name in ("vocab", "half", "num_positions")),
        *((name, _L) for name in ("experts", "top_k", "groups", "top_groups")),
        *((name, _L) for name in ("num_blocks", "block_size")),
        *((name, _P) for name in ("embedding", "norm", "head", "cos", "sin", "layers")),
        *((name, _F) for name in ("eps", "scaling", "scale")),
        *((name, _I) for name in ("is_bf16", "rounds")),
    ]


class _Step(ctypes.Structure):
    """The struct `Step` of cpu/step.cpp."""

    _fields_ = [
        *((name, _L) for name in ("tokens", "rollouts", "wanted")),
        *((name, _P) for name in ("ids", "first_row", "start", "length", "table")),
        *((name, _P) for name in ("table_length", "blocks", "wanted_rows", "memory", "hidden")),
        *((name, _P) for name in ("logits", "bad_tokens", "bad_logits")),
        *((name, _P) for name in ("route_ids", "route_weights")),
        ("threads", _L),
    ]


_WRONG = {
    -2: "a token id is outside the vocabulary",
    -3: "a block table covers too little for its tokens",
    -4: "a block table names a block that the cache does not have",
    -5: "a position is beyond the rotary tables",
    -6: "rows are not packed from 0 without gaps, or a wanted row is none of them",
}


class NativeStep:
    """One set of weights over one KV store, ready to run steps. Not thread safe.

    embedding  (V, H) T;  head (V, H), its float32 sums are kept
    tables     cosines and sines by position, (positions, d_r/2) float32, or T: rounded at each step
    """

    def __init__(
        self,
        shape: StepShape,
        layers: Sequence[StepLayer],
        *,
        embedding: torch.Tensor,
        norm: torch.Tensor,
        head: PackedWeight,
        tables: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        if not layers:
            raise ValueError("a step needs at least one layer")
        self._shape, self._dtype = shape, embedding.dtype
        self._vocab, self._num_moe = head.n, sum(layer.router is not None for layer in layers)
        cos, sin = (table.float().contiguous() for table in tables)
        # the addresses below are these objects'
        self._held = (embedding.contiguous(), norm.contiguous(), head, cos, sin, tuple(layers))
        self._layers = (_Layer * len(layers))(*(self._describe(layer) for layer in layers))
        slots = layers[0].keys.shape[0]
        self._model = _Model(
            model_bytes=ctypes.sizeof(_Model), layer_bytes=ctypes.sizeof(_Layer),
            step_bytes=ctypes.sizeof(_Step), num_layers=len(layers), hidden=shape.hidden_size,
            heads=shape.num_attention_heads, kv_heads=shape.num_key_value_heads,
            dim=shape.head_dim, vocab=embedding.shape[0], half=cos.shape[1],
            num_positions=cos.shape[0], experts=shape.num_experts, top_k=shape.num_experts_per_tok,
            groups=shape.n_group, top_groups=shape.topk_group,
            num_blocks=slots // shape.block_size, block_size=shape.block_size,
            embedding=self._held[0].data_ptr(), norm=self._held[1].data_ptr(), head=head.address,
            cos=cos.data_ptr(), sin=sin.data_ptr(), layers=ctypes.addressof(self._layers),
            eps=shape.rms_norm_eps, scaling=shape.routed_scaling_factor,
            scale=shape.head_dim**-0.5, is_bf16=self._dtype == torch.bfloat16,
            rounds=tables[0].dtype == self._dtype,
        )  # fmt: skip
        library = head.library
        self._run, self._memory_of = library.everstep_step, library.everstep_step_memory
        self._run.argtypes, self._run.restype = [_P, _P], _L
        self._memory_of.argtypes, self._memory_of.restype = [_P, _L, _L], _L
        self._memory = aligned_bytes(0)
        self._rooms: dict[str, torch.Tensor] = {}

    def run(self, batch: StepBatch, *, threads: int) -> StepOutput:
        """Compute a step and write its KV.

        Raises ValueError if the batch does not fit the model or the cache (nothing is written then).
        """
        tokens, wanted = batch.ids.size, batch.wanted.size
        shape = self._shape
        hidden = self._room("hidden", (tokens, shape.hidden_size), self._dtype)
        logits = self._room("logits", (wanted, self._vocab), torch.float32)
        flags = self._room("flags", (tokens + wanted,), torch.uint8)
        routes = None
        if batch.wants_routes:
            size = (self._num_moe, tokens, shape.num_experts_per_tok)
            routes = (
                self._room("ids", size, torch.int64),
                self._room("weights", size, torch.float32),
            )
        needed = self._memory_of(ctypes.addressof(self._model), tokens, wanted)
        if needed > self._memory.numel():
            self._memory = aligned_bytes(needed)
        spans = [batch.spans.ctypes.data + 8 * i * batch.spans.shape[1] for i in range(5)]
        step = _Step(
            tokens, batch.spans.shape[1], wanted, batch.ids.ctypes.data, *spans,
            batch.blocks.ctypes.data, batch.wanted.ctypes.data, self._memory.data_ptr(),
            hidden.data_ptr(), logits.data_ptr(), flags.data_ptr(), flags.data_ptr() + tokens,
            routes[0].data_ptr() if routes else None, routes[1].data_ptr() if routes else None,
            threads,
        )  # fmt: skip
        found = self._run(ctypes.addressof(self._model), ctypes.addressof(step))
        if found < 0:
            raise ValueError(_WRONG.get(found, "the library is of another version: build it anew"))
        bad = flags.nonzero()[:, 0].tolist() if found else []
        return StepOutput(
            hidden,
            logits,
            [row for row in bad if row < tokens],
            [row - tokens for row in bad if row >= tokens],
            routes,
        )

    def take_memory(self, other: "NativeStep") -> None:
        """Go on with the memory of another, which runs no more: fresh pages would cost the first
        step of new weights more than all else of a flip."""
        self._memory, self._rooms = other._memory, other._rooms

    def _room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for an output, the same one as long as it is large enough: fresh pages of a step's
        logits would cost as much as drawing from them."""
        size = math.prod(shape)
        room = self._rooms.get(name)
        if room is None or room.numel() < size:
            room = self._rooms[name] = torch.empty(size, dtype=dtype)
        return room[:size].view(shape)

    def _describe(self, layer: StepLayer) -> _Layer:
        for norm in (layer.input_norm, layer.post_norm, *(layer.qk_norms or ())):
            if not norm.is_contiguous() or norm.dtype != self._dtype:
                raise ValueError(f"norms must be contiguous {self._dtype}")
        if not (layer.keys.is_contiguous() and layer.values.is_contiguous()):
            raise ValueError("the caches must be contiguous")
        query_norm, key_norm = layer.qk_norms or (None, None)
        gate_up, down = layer.mlp or (None, None)
        router, bias = layer.router or (None, None)
        gate_ups, downs = layer.experts.addresses if layer.experts else (None, None)
        return _Layer(
            layer.input_norm.data_ptr(), layer.post_norm.data_ptr(),
            query_norm.data_ptr() if query_norm is not None else None,
            key_norm.data_ptr() if key_norm is not None else None,
            layer.qkv.address, layer.dense.address,
            gate_up.address if gate_up else None, down.address if down else None,
            router.address if router else None, bias.data_ptr() if bias is not None else None,
            gate_ups, downs, layer.keys.data_ptr(), layer.values.data_ptr(),
        )  # fmt: skip
