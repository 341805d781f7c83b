"""The Ring model as a module whose parameters are trained and bear the checkpoint's names.

The architecture is `engine.model.run_layer`, over operations that autograd follows; which tensors
there are is `engine.expected_tensors`, so every variant that the engine runs is trained: dense and
MoE layers, groups, shared experts, partial rotary, QK norm, biases, a tied head.

Shapes: T packed rows, R scored rows, L MoE layers, K experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from msgspec.structs import replace
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as recompute

from ...engine import log
from ...engine.checkpoint.checkpoint import Checkpoint
from ...engine.checkpoint.expected_tensors import expected_tensors
from ...engine.checkpoint.ring_config import RingConfig
from ...engine.errors import CheckpointError
from ...engine.model import model
from ...engine.model.rotary import rotary_tables
from ...engine.model.weights import Layer, Mlp, Moe
from ...kernels import ExpertBank, Pair, Weight
from .exact_operations import ExactHead, ExactOperations
from .fp8_operations import Fp8Operations
from .packing import PackedBatch
from .target_logprobs import PlainHead, target_logprobs
from .trainable_operations import PlainOperations, wide

Numerics = Literal["plain", "exact", "fp8"]
"""plain: torch's products, any device; exact: the engine's kernels and bits, on the CPU; fp8: as
plain, with FP8 products (CUDA)."""


@dataclass(frozen=True)
class Scores:
    """What a forward pass gives.

    lp           (R,) float32: logprob of each target at its temperature, in `wanted`'s order
    entropy      (R,) float32, without gradient
    routing_ids  (L, T, K) int64: the experts that were used
    """

    lp: torch.Tensor
    entropy: torch.Tensor
    routing_ids: torch.Tensor


def tensor_of(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its dotted path."""
    path, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(path), last)
    return found


def weight_of(module: nn.Module, name: str) -> Weight:
    """The linear layer `name` with its bias, if it has one."""
    linear = module.get_submodule(name)
    data: torch.Tensor = linear.weight  # type: ignore[assignment]
    return Weight(data, data.dtype, bias=getattr(linear, "bias", None))


class DecoderLayer(nn.Module):
    """Decoder layer `index`; shards and recomputation work on it as a whole."""

    def __init__(self, config: RingConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.recomputes = False

    def forward(
        self, x: torch.Tensor, ops: model.Operations, replay: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream after the layer (T, H), and the ids (T, K) if it is a MoE layer."""
        if self.recomputes and torch.is_grad_enabled():
            out: tuple[torch.Tensor, torch.Tensor | None] = recompute(
                self._run, x, ops, replay, use_reentrant=False
            )
            return out
        return self._run(x, ops, replay)

    def _run(
        self, x: torch.Tensor, ops: model.Operations, replay: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, routes = model.run_layer(ops, self._weights(), x, self.index, replay)
        return x, None if routes is None else routes.ids

    def _weights(self) -> Layer:
        """The parameters as they are now, in the engine's terms."""
        norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if self.config.use_qk_norm:
            norms = (
                tensor_of(self, "attention.query_layernorm.weight"),
                tensor_of(self, "attention.key_layernorm.weight"),
            )
        return Layer(
            input_norm=tensor_of(self, "input_layernorm.weight"),
            qkv=weight_of(self, "attention.query_key_value"),
            query_norm=norms[0],
            key_norm=norms[1],
            dense=weight_of(self, "attention.dense"),
            post_norm=tensor_of(self, "post_attention_layernorm.weight"),
            ffn=self._moe() if self.config.is_moe_layer(self.index) else self._mlp("mlp"),
        )

    def _pair(self, prefix: str) -> Pair:
        return Pair(weight_of(self, f"{prefix}.gate_proj"), weight_of(self, f"{prefix}.up_proj"))

    def _mlp(self, prefix: str) -> Mlp:
        return Mlp(self._pair(prefix), weight_of(self, f"{prefix}.down_proj"))

    def _moe(self) -> Moe:
        prefixes = [f"mlp.experts.{e}" for e in range(self.config.num_experts)]
        gate = tensor_of(self, "mlp.gate.weight")
        bias: torch.Tensor | None = getattr(self.get_submodule("mlp.gate"), "expert_bias", None)
        return Moe(
            router=Weight(gate, gate.dtype),
            bias=wide(gate).new_zeros(gate.shape[0]) if bias is None else bias,
            experts=ExpertBank(
                [self._pair(prefix) for prefix in prefixes],
                [weight_of(self, f"{prefix}.down_proj") for prefix in prefixes],
            ),
            shared=self._mlp("mlp.shared_experts") if self.config.num_shared_experts else None,
        )


class TrainableRing(nn.Module):
    """The whole model; `state_dict()` has the checkpoint's names.

    numerics          see `Numerics`
    dtype             of the parameters
    device            "meta" makes no memory: shard, then `to_empty`, then `load`
    recompute_layers  keep a layer's input only, and compute the rest again for the backward pass

    The router's `expert_bias` is a buffer in float32: frozen (PAPER.md §4).
    """

    def __init__(
        self,
        config: RingConfig,
        *,
        numerics: Numerics = "plain",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        recompute_layers: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.numerics: Numerics = numerics
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        for spec in expected_tensors(self.config):
            path, _, last = spec.name.rpartition(".")
            node = self._make(path)
            if last == "expert_bias":
                empty = torch.empty(spec.shape, dtype=torch.float32, device=device)
                node.register_buffer(last, empty)
            else:
                empty = torch.empty(spec.shape, dtype=dtype, device=device)
                node.register_parameter(last, nn.Parameter(empty))
        self.layers: list[DecoderLayer] = []
        for index in range(config.num_hidden_layers):
            layer = self.get_submodule(f"model.layers.{index}")
            assert isinstance(layer, DecoderLayer)
            layer.recomputes = recompute_layers
            self.layers.append(layer)

    def _make(self, path: str) -> nn.Module:
        """The module at a dotted path, made with those above it where there is none."""
        node: nn.Module = self
        walked: list[str] = []
        for part in path.split("."):
            walked.append(part)
            child = getattr(node, part, None)
            if child is None:
                is_layer = walked[:-1] == ["model", "layers"]
                child = DecoderLayer(self.config, int(part)) if is_layer else nn.Module()
                node.add_module(part, child)
            node = child
        return node

    def forward(self, batch: PackedBatch, trace: model.Trace | None = None) -> Scores:
        """Score a batch's targets. All of the model's parameters take part, whatever is routed.

        trace  called with (layer, residual stream (T, H)) after each layer
        """
        ops, head = self._operations(batch)
        forced, weights = batch.routing_ids, batch.routing_weights
        x = nn.functional.embedding(batch.ids, tensor_of(self, "model.word_embeddings.weight"))
        used: list[torch.Tensor] = []
        for layer in self.layers:
            replay, moe = None, len(used)
            if forced is not None and moe < len(forced):
                replay = forced[moe]
                ops = ops if weights is None else ops.with_routing_weights(weights[moe])
            x, ids = layer(x, ops, replay)
            if ids is not None:
                used.append(ids)
            if trace is not None:
                trace(layer.index, x)
        x = ops.rms_norm(x, tensor_of(self, "model.norm.weight"))
        tied = self.config.tie_word_embeddings
        lp, entropy = target_logprobs(
            x.index_select(0, batch.wanted),
            tensor_of(self, "model.word_embeddings.weight" if tied else "lm_head.weight"),
            batch.targets,
            batch.temperatures,
            batch.kept,
            head,
        )
        routes = torch.stack(used) if used else batch.ids.new_empty(0, batch.num_rows, 0)
        return Scores(lp, entropy, routes)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(checkpoint name, parameter or buffer) of every tensor, as checkpoints list them: what is
        exported and what is sent to engines. DTensors where the model is sharded."""
        for spec in expected_tensors(self.config):
            yield spec.name, tensor_of(self, spec.name)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read a bf16 or float32 checkpoint of this shape; each rank keeps its own shards.

        Raises CheckpointError naming what does not fit.
        """
        checkpoint = Checkpoint.open(folder)
        if without_mtp(checkpoint.config) != self.config:
            raise CheckpointError(f"{folder}: its config.json is not that of the model in training")
        for name, target in self.tensors():
            if name in checkpoint.entries:
                copy_into(target, checkpoint.tensor(name))
            else:
                # the router's bias, where the configuration lets it be left out
                target.zero_()
        checkpoint.close()

    def _operations(self, batch: PackedBatch) -> tuple[PlainOperations, PlainHead]:
        tables = self._rotary(max(batch.lengths), batch.ids.device)
        if self.numerics == "exact":
            return ExactOperations(self.config, batch, tables), ExactHead()
        operations = Fp8Operations if self.numerics == "fp8" else PlainOperations
        return operations(self.config, batch, tables), PlainHead()

    def _rotary(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of `length` positions at least, kept from pass to pass."""
        if self._tables is None or self._tables[0].shape[0] < length:
            dtype = wide(tensor_of(self, "model.norm.weight")).dtype
            cos, sin = rotary_tables(self.config, 1 << (length - 1).bit_length(), dtype)
            self._tables = cos.to(device), sin.to(device)
        return self._tables


def open_trainable(
    folder: Path,
    *,
    numerics: Numerics = "plain",
    dtype: torch.dtype = torch.float32,
    recompute_layers: bool = False,
) -> TrainableRing:
    """A checkpoint as an unsharded model on the CPU, its parameters in `dtype`."""
    ring = TrainableRing(
        trainable_config(folder),
        numerics=numerics,
        dtype=dtype,
        recompute_layers=recompute_layers,
    )
    ring.load(folder)
    return ring


def trainable_config(folder: Path) -> RingConfig:
    """The configuration of a checkpoint that can be trained.

    Raises CheckpointError for FP8 weights, and what `Checkpoint.open` raises.
    """
    config = Checkpoint.open(folder).config
    if config.quant is not None:
        raise CheckpointError(
            f"{folder}: FP8 weights cannot be trained; accepted: a bfloat16 or float32 checkpoint"
        )
    if config.num_nextn_predict_layers:
        log.event("trainer.mtp_dropped", folder=str(folder), layers=config.num_nextn_predict_layers)
    return without_mtp(config)


def without_mtp(config: RingConfig) -> RingConfig:
    """MTP layers are not trained, and after a step they would speak for another model."""
    return replace(config, num_nextn_predict_layers=0, defaults_used=())


def copy_into(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's part of it into a DTensor's shard."""
    whole = whole.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        # None: every rank has the whole at hand, so nothing is sent
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)
