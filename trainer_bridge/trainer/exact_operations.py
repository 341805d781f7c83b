"""The engine's own kernels in the forward pass, plain torch in the backward pass.

Row-invariant kernels give a token the same bits in the trainer's packing as in the engine's steps,
so the trainer's logprob of a sampled token is the engine's to the bit. Their gradient is that of
`trainable_operations.py` at the same inputs, computed again in the backward pass.

Legend: T packed rows, H hidden, D head size, G kv heads, K experts per token. T is float32 or
bfloat16, on the CPU, as in the engine.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from ... import kernels
from ...engine.checkpoint.ring_config import RingConfig
from ...engine.model import model
from ...engine.model.model import KernelOperations, KVStore, Norms
from ...kernels import ExpertBank, GateUp, Linear, Pair, QuerySpan, Weight
from . import trainable_operations as plain
from .packing import PackedBatch
from .target_logprobs import PlainHead, Project
from .trainable_operations import PlainOperations, Tables

# positions of a KV block; the bits do not depend on it
_BLOCK = 16

Out = torch.Tensor | tuple[torch.Tensor, ...]


class _Kernel(torch.autograd.Function):
    """`kernel(*tensors)` in value, `plain(*tensors)` in gradient."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Callable[..., Out], in_plain: Callable[..., Out], *tensors: torch.Tensor
    ) -> Out:
        ctx.in_plain = in_plain
        ctx.save_for_backward(*tensors)
        return kernel(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            inputs = [
                tensor.detach().requires_grad_(needs)
                for tensor, needs in zip(ctx.saved_tensors, needed, strict=True)
            ]
            out = ctx.in_plain(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(outs, wanted, grads))
        return None, None, *(next(found) if needs else None for needs in needed)


def through(
    kernel: Callable[..., Out], in_plain: Callable[..., Out], *tensors: torch.Tensor
) -> Any:
    """`kernel(*tensors)`, with the gradient of `in_plain(*tensors)`."""
    return _Kernel.apply(kernel, in_plain, *tensors)  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    """`kernels.linear`, whose gradient needs no second forward pass. bias None: without."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        prepared = kernels.prepare(Weight(weight, weight.dtype, bias=bias))
        return kernels.linear(x, prepared)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = grad.float()
        d_bias = wide.sum(0).to(grad.dtype) if ctx.needs_input_grad[2] else None
        d_weight = (wide.t() @ x.float()).to(grad.dtype)
        return (wide @ weight.float()).to(grad.dtype), d_weight, d_bias


class ExactOperations(PlainOperations):
    """`engine.model.Operations` with the bits of the engine."""

    def __init__(self, config: RingConfig, batch: PackedBatch, tables: Tables) -> None:
        super().__init__(config, batch, tables)
        blocks = [-(-length // _BLOCK) for length in batch.lengths]
        # block 0 is never written: the kernels read it where a sequence has no token
        ends = list(itertools.accumulate(blocks, initial=1))
        rows = itertools.accumulate(batch.lengths, initial=0)
        spans = [
            QuerySpan(row, 0, length, range(first, end))
            for row, length, first, end in zip(rows, batch.lengths, ends, ends[1:], strict=False)
        ]
        self._plan = model.plan_step(config, spans, _BLOCK)
        slots = ends[-1] * _BLOCK
        self._cache_shape = (slots, config.num_key_value_heads, config.head_dim)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        eps = self.config.rms_norm_eps
        out: torch.Tensor = through(
            lambda x, weight: kernels.rms_norm(x, weight, eps), super().rms_norm, x, weight
        )
        return out

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = through(kernels.add, super().add, x, y)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        eps = self.config.rms_norm_eps
        total, out = through(
            lambda x, y, weight: kernels.add_rms_norm(x, y, weight, eps),
            super().add_rms_norm,
            x,
            y,
            weight,
        )
        return total, out

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        assert isinstance(weight, Weight)
        out: torch.Tensor = _Linear.apply(x, weight.data, weight.bias)  # type: ignore[no-untyped-call]
        return out

    def gate_up(self, x: torch.Tensor, weights: GateUp) -> torch.Tensor:
        assert isinstance(weights, Pair)

        def kernel(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return kernels.gate_up(x, _prepared_pair(gate, up))

        out: torch.Tensor = through(kernel, plain.gate_up, x, weights.gate.data, weights.up.data)
        return out

    def attend(self, index: int, qkv: torch.Tensor, norms: Norms) -> torch.Tensor:  # noqa: ARG002
        def kernel(qkv: torch.Tensor, *norms: torch.Tensor) -> torch.Tensor:
            caches = (qkv.new_zeros(self._cache_shape),), (qkv.new_zeros(self._cache_shape),)
            ops = KernelOperations(self.config, KVStore(*caches), self._plan, self.tables)
            return ops.attend(0, qkv, _pair_of(norms))

        def in_plain(qkv: torch.Tensor, *norms: torch.Tensor) -> torch.Tensor:
            return plain.attend(qkv, _pair_of(norms), self.config, self.batch, self.tables)

        out: torch.Tensor = through(kernel, in_plain, qkv, *(norms or ()))
        return out

    def _route(
        self, x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, replay: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ops = KernelOperations(self.config, KVStore((), ()), self._plan, self.tables)
        with torch.no_grad():
            prepared = kernels.prepare(Weight(gate.float(), torch.float32))
            ids, found = ops.route(x, prepared, bias, replay)
        weights: torch.Tensor = through(
            lambda *_: found.clone(),
            lambda x, gate: plain.route(x, gate, bias, ids, self.config)[1],
            x,
            gate,
        )
        return ids, weights

    def experts(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bank: ExpertBank
    ) -> torch.Tensor:
        count = len(bank.downs)

        def kernel(x: torch.Tensor, weights: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            gates, ups, downs = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
            prepared = kernels.prepare_experts(
                [_prepared_pair(gate, up) for gate, up in zip(gates, ups, strict=True)],
                [kernels.prepare(Weight(down, down.dtype)) for down in downs],
            )
            return kernels.experts(x, ids, weights, prepared)

        def in_plain(
            x: torch.Tensor, weights: torch.Tensor, *tensors: torch.Tensor
        ) -> torch.Tensor:
            def one(expert: int, rows: torch.Tensor) -> torch.Tensor:
                gate, up, down = tensors[expert::count]
                return plain.linear(plain.gate_up(rows, gate, up), down)

            return plain.experts(x, ids, weights, count, one)

        pairs = [pair for pair in bank.gate_ups if isinstance(pair, Pair)]
        downs = [down for down in bank.downs if isinstance(down, Weight)]
        out: torch.Tensor = through(
            kernel,
            in_plain,
            x,
            weights,
            *(pair.gate.data for pair in pairs),
            *(pair.up.data for pair in pairs),
            *(down.data for down in downs),
        )
        return out


class ExactHead(PlainHead):
    """The head with the bits of the engine."""

    def project(self, weight: torch.Tensor) -> Project:
        head = kernels.prepare_head(weight.detach())
        return lambda hidden: kernels.project(hidden, head)

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        return kernels.log_softmax(logits)


def _prepared_pair(gate: torch.Tensor, up: torch.Tensor) -> GateUp:
    return kernels.prepare_gate_up(Weight(gate, gate.dtype), Weight(up, up.dtype))


def _pair_of(norms: tuple[torch.Tensor, ...]) -> Norms:
    return (norms[0], norms[1]) if norms else None
