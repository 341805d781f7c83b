"""The forward pass of a runner's step: one C++ call where the library covers the weights, else
operation by operation (model.py); the same bits either way.

Shapes: T packed tokens, R wanted rows, H hidden, V vocabulary, L MoE layers, K experts per token.
"""

import ctypes
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from ...kernels import (
    GateUp,
    Linear,
    NativeStep,
    PackedWeight,
    QuerySpan,
    StepBatch,
    StepLayer,
    StepOutput,
    StepShape,
    library_in_use,
)
from ...kernels.torch_threads import one_thread
from ..core.plan import Row
from . import model
from .model import KVStore
from .weights import Layer, Mlp, Weights

# steps of fewer tokens run on one of torch's threads: waking a second one for each of some 300 small
# products costs more than it gives. The C++ library's own threads are woken for less.
FEW_TOKENS = 16


class ForwardPass:
    """Steps of one set of weights over one KV store.

    tables  cosines and sines by position (engine/model/rotary.py)
    """

    def __init__(
        self,
        weights: Weights,
        store: KVStore,
        tables: tuple[torch.Tensor, torch.Tensor],
        block_size: int,
    ) -> None:
        self._weights, self._store, self._tables = weights, store, tables
        self._block_size = block_size
        self.native = compile_step(weights, store, tables, block_size)

    def replace(self, other: "ForwardPass") -> None:
        """Run in its place from here on."""
        if self.native is not None and other.native is not None:
            self.native.take_memory(other.native)

    def run(self, rows: Sequence[Row], *, wants_routes: bool) -> StepOutput:
        """Compute the rows' tokens and write their KV; logits of the last token of every row that
        samples, in order.

        Raises ValueError where a row does not fit the model or its block table.
        """
        batch = batch_of(rows, wants_routes=wants_routes)
        if self.native is not None:
            return self.native.run(batch, threads=torch.get_num_threads())
        return self._by_operation(rows, batch)

    def first_bad_layer(self, rows: Sequence[Row]) -> dict[int, int]:
        """Packed row → the layer after which its residual stream is first not finite. Runs the rows
        again, operation by operation; the same bits are written again."""
        first: dict[int, int] = {}

        def trace(layer: int, x: torch.Tensor) -> None:
            for token in (~torch.isfinite(x).all(dim=1)).nonzero()[:, 0].tolist():
                first.setdefault(token, layer)

        self._forward(rows, batch_of(rows, wants_routes=False), trace)
        return first

    def _by_operation(self, rows: Sequence[Row], batch: StepBatch) -> StepOutput:
        with _threads_for(batch.ids.size):
            out = self._forward(rows, batch, None)
            logits = model.logits(self._weights, out.hidden[torch.from_numpy(batch.wanted)])
        routes = None
        if batch.wants_routes and out.routes:
            routes = (
                torch.stack([routes.ids for routes in out.routes]),
                torch.stack([routes.weights for routes in out.routes]),
            )
        return StepOutput(out.hidden, logits, _not_finite(out.hidden), _not_finite(logits), routes)

    def _forward(
        self, rows: Sequence[Row], batch: StepBatch, trace: model.Trace | None
    ) -> model.Forward:
        spans = [
            QuerySpan(first, row.start, row.num_tokens, row.block_table)
            for first, row in zip(batch.spans[0].tolist(), rows, strict=True)
        ]
        plan = model.plan_step(self._weights.config, spans, self._block_size)
        ids = torch.from_numpy(batch.ids)
        return model.forward(self._weights, ids, self._store, plan, self._tables, trace=trace)


def _threads_for(tokens: int) -> AbstractContextManager[None]:
    """One of torch's threads for a small step, all of them for others."""
    return one_thread() if tokens < FEW_TOKENS else nullcontext()


def _not_finite(x: torch.Tensor) -> list[int]:
    found: list[int] = (~torch.isfinite(x).all(dim=1)).nonzero()[:, 0].tolist()
    return found


def batch_of(rows: Sequence[Row], *, wants_routes: bool) -> StepBatch:
    """The rows as the kernels take them, packed in their order."""
    spans = np.empty((5, len(rows)), dtype=np.int64)
    missing = np.array([row.num_missing for row in rows])
    spans[1] = [len(row.all_ids) for row in rows]
    spans[1] -= missing
    spans[2] = [row.num_tokens for row in rows]
    spans[4] = [len(row.block_table) for row in rows]
    ends = np.cumsum(spans[2])
    spans[0] = ends - spans[2]
    spans[3] = np.cumsum(spans[4]) - spans[4]
    ids: list[int] = []
    for row in rows:
        if row.num_missing == 1:
            ids.append(row.all_ids[-1])
        else:
            ids += row.token_ids
    blocks = itertools.chain.from_iterable([row.block_table for row in rows])
    return StepBatch(
        ids=np.array(ids, dtype=np.int64),
        spans=spans,
        blocks=np.fromiter(blocks, np.int32, count=int(spans[4].sum())),
        wanted=ends[spans[2] == missing] - 1,
        wants_routes=wants_routes,
    )


# -- the weights as the library takes them


def compile_step(
    weights: Weights,
    store: KVStore,
    tables: tuple[torch.Tensor, torch.Tensor],
    block_size: int,
) -> NativeStep | None:
    """The whole step for the C++ library; None where it does not cover these weights: the level is
    torch, or a product is (W8A8, gate and up of two formats)."""
    library = library_in_use()
    config = weights.config
    caches = zip(weights.layers, store.keys, store.values, strict=True)
    layers = [_compile_layer(layer, keys, values, library) for layer, keys, values in caches]
    head = _packed(weights.head, library)
    found = [layer for layer in layers if layer is not None]
    if library is None or head is None or len(found) < len(layers) or not layers:
        return None
    shape = StepShape(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
        routed_scaling_factor=config.routed_scaling_factor,
        rms_norm_eps=config.rms_norm_eps,
        block_size=block_size,
    )
    return NativeStep(
        shape,
        found,
        embedding=weights.embedding,
        norm=weights.norm,
        head=head,
        tables=tables,
    )


def _compile_layer(
    layer: Layer, keys: torch.Tensor, values: torch.Tensor, library: ctypes.CDLL | None
) -> StepLayer | None:
    qkv, dense = _packed(layer.qkv, library), _packed(layer.dense, library)
    if qkv is None or dense is None:
        return None
    ffn = layer.ffn
    block = ffn if isinstance(ffn, Mlp) else ffn.shared
    mlp, router, experts = None, None, None
    if block is not None:
        gate_up, down = _packed(block.gate_up, library), _packed(block.down, library)
        if gate_up is None or down is None:
            return None
        mlp = (gate_up, down)
    if not isinstance(ffn, Mlp):
        gate, experts = _packed(ffn.router, library), ffn.experts.table
        if gate is None or experts is None or experts.library is not library:
            return None
        router = (gate, ffn.bias)
    norms = None
    if layer.query_norm is not None and layer.key_norm is not None:
        norms = (layer.query_norm, layer.key_norm)
    return StepLayer(
        input_norm=layer.input_norm,
        post_norm=layer.post_norm,
        qk_norms=norms,
        qkv=qkv,
        dense=dense,
        mlp=mlp,
        router=router,
        experts=experts,
        keys=keys,
        values=values,
    )


def _packed(weight: Linear | GateUp, library: ctypes.CDLL | None) -> PackedWeight | None:
    """The weight if it is packed for the library in use."""
    if isinstance(weight, PackedWeight) and weight.library is library:
        return weight
    return None
