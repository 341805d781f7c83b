"""The weights of a Ring model as the forward pass takes them, read from a checkpoint.

Everything is copied out of the memory map into aligned memory: a library may round otherwise
on unaligned data. Linear layers take the form that the kernels' level multiplies. Router and
head keep their float32 sums (PAPER.md §3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import torch

from ..kernels import (
    ExpertBank,
    GateUp,
    Linear,
    Weight,
    prepare,
    prepare_experts,
    prepare_gate_up,
    prepare_head,
)
from .checkpoint import Checkpoint, StoredLinear
from .config import ModelConfig
from .errors import ConfigError
from .ring_config import RingConfig

Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Mlp:
    """A SwiGLU block: gate and up (I, H) together; down (H, I)."""

    gate_up: GateUp
    down: Linear


@dataclass(frozen=True)
class Moe:
    """Router (E, H) and bias (E,) in float32; the experts; the shared MLP."""

    router: Linear
    bias: torch.Tensor
    experts: ExpertBank
    shared: Mlp | None


@dataclass(frozen=True)
class Layer:
    """One decoder layer; norms (H,) or (d,) in T."""

    input_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    dense: Linear
    post_norm: torch.Tensor
    ffn: Mlp | Moe


@dataclass(frozen=True)
class Weights:
    """A whole model under one policy version (number and content digest)."""

    config: RingConfig
    dtype: torch.dtype
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Linear
    version: int
    digest: str
    formats: str
    """How linear layers are stored and run: plain, block, channel, with -w8a8-… where it is on."""

    @property
    def num_moe_layers(self) -> int:
        return sum(isinstance(layer.ffn, Moe) for layer in self.layers)


class WeightReader:
    """Turns a checkpoint's tensors into what the forward pass takes, piece by piece."""

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.dtype = compute_dtype(self.config, model)
        self._expand_now = model.dequantize == "load" and model.numerics == "exact"
        quant = self.config.quant
        if model.numerics == "w8a8" and (quant is None or quant.activations == "none"):
            raise ConfigError(
                "model.numerics: w8a8 needs FP8 weights with dynamic activation scales; "
                f"{checkpoint.folder} has none (use exact)"
            )
        self._activations = quant.activations if quant and model.numerics == "w8a8" else "none"

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy in T or `dtype`, contiguous and aligned."""
        return self.checkpoint.tensor(name).to(dtype or self.dtype, copy=True).contiguous()

    def linear(self, name: str) -> Linear:
        """The linear layer `name` (without `.weight`), in the form that this level multiplies."""
        return prepare(self._weight(name))

    def _weight(self, name: str) -> Weight:
        """The linear layer `name`, every format; it may alias the map (`prepare` copies)."""
        stored = self.checkpoint.linear(name)
        bias = None if stored.bias is None else stored.bias.to(self.dtype)
        if stored.scale is None:
            return Weight(stored.weight.to(self.dtype), self.dtype, bias=bias)
        weight = self._quantised(stored, bias)
        if self._expand_now:
            return Weight(weight.expanded().contiguous(), self.dtype, bias=bias)
        return weight

    def _quantised(self, stored: StoredLinear, bias: torch.Tensor | None) -> Weight:
        assert stored.scale is not None
        return Weight(
            stored.weight,
            self.dtype,
            kind=stored.kind,
            scale=stored.scale.float(),
            bias=bias,
            activations=self._activations,
        )

    def mlp(self, prefix: str) -> Mlp:
        return Mlp(self.gate_up(prefix), self.linear(f"{prefix}.down_proj"))

    def gate_up(self, prefix: str) -> GateUp:
        gate, up = self._weight(f"{prefix}.gate_proj"), self._weight(f"{prefix}.up_proj")
        return prepare_gate_up(gate, up)

    def router(self, layer: int) -> tuple[Linear, torch.Tensor]:
        """(E, H) and (E,) in float32; a bias that the checkpoint does not have is zero."""
        prefix = f"model.layers.{layer}.mlp.gate"
        gate = self.tensor(f"{prefix}.weight", torch.float32)
        bias = torch.zeros(gate.shape[0])
        if f"{prefix}.expert_bias" in self.checkpoint.names:
            bias = self.tensor(f"{prefix}.expert_bias", torch.float32)
        return prepare(Weight(gate, torch.float32)), bias

    def moe(self, layer: int, *, streamed: bool = False) -> Moe:
        """streamed: an expert is read each time it is used, and not kept."""
        prefix = f"model.layers.{layer}.mlp"
        gate, bias = self.router(layer)
        count = self.config.num_experts
        gate_ups: Sequence[GateUp] = _Streamed(
            count, lambda e: self.gate_up(f"{prefix}.experts.{e}")
        )
        downs: Sequence[Linear] = _Streamed(
            count, lambda e: self.linear(f"{prefix}.experts.{e}.down_proj")
        )
        if streamed:
            bank = ExpertBank(gate_ups, downs)
        else:
            bank = prepare_experts(tuple(gate_ups), tuple(downs))
        shared = self.mlp(f"{prefix}.shared_experts") if self.config.num_shared_experts else None
        return Moe(gate, bias, bank, shared)

    def layer(self, index: int, *, streamed: bool = False) -> Layer:
        """One decoder layer; streamed: without its experts' weights in memory."""
        p = f"model.layers.{index}"
        norms = (
            [self.tensor(f"{p}.attention.{which}_layernorm.weight") for which in ("query", "key")]
            if self.config.use_qk_norm
            else [None, None]
        )
        is_moe = self.config.is_moe_layer(index)
        return Layer(
            input_norm=self.tensor(f"{p}.input_layernorm.weight"),
            qkv=self.linear(f"{p}.attention.query_key_value"),
            query_norm=norms[0],
            key_norm=norms[1],
            dense=self.linear(f"{p}.attention.dense"),
            post_norm=self.tensor(f"{p}.post_attention_layernorm.weight"),
            ffn=self.moe(index, streamed=streamed) if is_moe else self.mlp(f"{p}.mlp"),
        )

    def embedding(self) -> torch.Tensor:
        return self.tensor("model.word_embeddings.weight")

    def head(self) -> Linear:
        """(V, H) T; the embedding's values where tied."""
        tied = self.config.tie_word_embeddings
        return prepare_head(
            self.tensor("model.word_embeddings.weight" if tied else "lm_head.weight")
        )

    @property
    def formats(self) -> str:
        """How linear layers are stored and run."""
        quant = self.config.quant
        if quant is None:
            return "plain"
        scheme = "" if self._activations == "none" else f"-w8a8-{self._activations}"
        return quant.kind + scheme


class _Streamed(Sequence[Item]):
    """What `read` gives for each expert, read again at each use."""

    def __init__(self, count: int, read: Callable[[int], Item]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._read(index)


def compute_dtype(config: RingConfig, model: ModelConfig) -> torch.dtype:
    """T: as asked, or what the checkpoint is stored in (float16 is run in float32)."""
    if model.dtype != "auto":
        return DTYPES[model.dtype]
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def load_weights(
    checkpoint: Checkpoint, model: ModelConfig, *, version: int = 0, on_progress: Progress
) -> Weights:
    """Read every main layer; peak memory is the model plus one tensor.

    Raises CheckpointError naming the tensor that is not finite or cannot be read, ConfigError
    where the numerics do not fit the checkpoint.
    """
    reader = WeightReader(checkpoint, model)
    count = checkpoint.config.num_hidden_layers
    layers = []
    for index in range(count):
        on_progress("read", index, count)
        layers.append(reader.layer(index))
    on_progress("read", count, count)
    return Weights(
        config=checkpoint.config,
        dtype=reader.dtype,
        embedding=reader.embedding(),
        layers=tuple(layers),
        norm=reader.tensor("model.norm.weight"),
        head=reader.head(),
        formats=reader.formats,
        version=version,
        digest=checkpoint.content_digest(lambda _, done, total: on_progress("check", done, total)),
    )
