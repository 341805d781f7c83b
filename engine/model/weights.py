"""The weights of a Ring model as the forward pass takes them, read from a checkpoint.

Everything is copied out of the memory map into aligned memory: a library may round otherwise
on unaligned data. Linear layers take the form that the kernels' level multiplies. Router and
head keep their float32 sums (PAPER.md §3).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar, overload

import msgspec
import torch

from ...kernels import (
    PIECE_BYTES,
    ExpertBank,
    GateUp,
    Linear,
    PackedWeight,
    Pair,
    Pieces,
    Weight,
    drain,
    prepare_experts,
    preparing,
    preparing_gate_up,
    preparing_head,
)
from ..checkpoint.checkpoint import Checkpoint, StoredLinear
from ..checkpoint.expected_tensors import expected_tensors
from ..checkpoint.manifest import combine_digests
from ..checkpoint.ring_config import RingConfig
from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError, WeightsRefused

Progress = Callable[[str, int, int], None]
Part = torch.Tensor | PackedWeight
Item = TypeVar("Item")
TELL_EVERY_S = 0.1
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
    parts: "tuple[Part, ...]"
    """What holds the memory, in the order in which it was allocated."""

    @property
    def num_moe_layers(self) -> int:
        return sum(isinstance(layer.ffn, Moe) for layer in self.layers)


class WeightReader:
    """Turns a checkpoint's tensors into what the forward pass takes, piece by piece."""

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.dtype = compute_dtype(self.config, model)
        self.made: list[Part] = []
        """What `reading` has read so far that holds memory."""
        self._is_reading = False
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
        return drain(self._copying(name, dtype))

    def _copying(self, name: str, dtype: torch.dtype | None = None) -> Pieces[torch.Tensor]:
        stored = self.checkpoint.tensor(name)
        out = torch.empty(stored.shape, dtype=dtype or self.dtype)
        source, target = stored.reshape(-1), out.view(-1)
        count = PIECE_BYTES // max(source.element_size(), target.element_size())
        for start in range(0, source.numel(), count):
            target[start : start + count] = source[start : start + count]
            yield
        yield from self.checkpoint.letting_go(name)
        return out

    def linear(self, name: str) -> Linear:
        """The linear layer `name` (without `.weight`), in the form that this level multiplies."""
        return drain(self._linear(name))

    def _linear(self, name: str) -> Pieces[Linear]:
        linear = yield from preparing(self._weight(name), expands=self._expand_now)
        self._note(linear)
        yield from self.checkpoint.letting_go(f"{name}.weight")
        return linear

    def _note(self, weight: Linear | GateUp) -> None:
        if not self._is_reading:
            return
        if isinstance(weight, Pair):
            self.made += [weight.gate.data, weight.up.data]
        else:
            self.made.append(weight if isinstance(weight, PackedWeight) else weight.data)

    def _weight(self, name: str) -> Weight:
        """The linear layer `name`, every format, as it is stored; it aliases the map (`preparing`
        copies, and rounds to T)."""
        stored = self.checkpoint.linear(name)
        bias = None if stored.bias is None else stored.bias.to(self.dtype)
        if stored.scale is None:
            return Weight(stored.weight, self.dtype, bias=bias)
        return self._quantised(stored, bias)

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
        return drain(self._mlp(prefix))

    def _mlp(self, prefix: str) -> Pieces[Mlp]:
        gate_up = yield from self._gate_up(prefix)
        down = yield from self._linear(f"{prefix}.down_proj")
        return Mlp(gate_up, down)

    def gate_up(self, prefix: str) -> GateUp:
        return drain(self._gate_up(prefix))

    def _gate_up(self, prefix: str) -> Pieces[GateUp]:
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        gate, up = map(self._weight, names)
        gate_up = yield from preparing_gate_up(gate, up, expands=self._expand_now)
        self._note(gate_up)
        for name in names:
            yield from self.checkpoint.letting_go(f"{name}.weight")
        return gate_up

    def router(self, layer: int) -> tuple[Linear, torch.Tensor]:
        """(E, H) and (E,) in float32; a bias that the checkpoint does not have is zero."""
        return drain(self._router(layer))

    def _router(self, layer: int) -> Pieces[tuple[Linear, torch.Tensor]]:
        prefix = f"model.layers.{layer}.mlp.gate"
        gate = yield from preparing(
            Weight(self.checkpoint.tensor(f"{prefix}.weight"), torch.float32)
        )
        if f"{prefix}.expert_bias" in self.checkpoint.names:
            return gate, self.tensor(f"{prefix}.expert_bias", torch.float32)
        return gate, torch.zeros(self.config.num_experts)

    def _moe(self, layer: int) -> Pieces[Moe]:
        prefix = f"model.layers.{layer}.mlp"
        gate, bias = yield from self._router(layer)
        gate_ups: list[GateUp] = []
        downs: list[Linear] = []
        for e in range(self.config.num_experts):
            expert = yield from self._mlp(f"{prefix}.experts.{e}")
            gate_ups.append(expert.gate_up)
            downs.append(expert.down)
        bank = prepare_experts(tuple(gate_ups), tuple(downs))
        shared = None
        if self.config.num_shared_experts:
            shared = yield from self._mlp(f"{prefix}.shared_experts")
        return Moe(gate, bias, bank, shared)

    def _streamed_moe(self, layer: int) -> Moe:
        prefix = f"model.layers.{layer}.mlp"
        gate, bias = self.router(layer)
        count = self.config.num_experts
        gate_ups: Sequence[GateUp] = _Streamed(
            count, lambda e: self.gate_up(f"{prefix}.experts.{e}")
        )
        downs: Sequence[Linear] = _Streamed(
            count, lambda e: self.linear(f"{prefix}.experts.{e}.down_proj")
        )
        shared = self.mlp(f"{prefix}.shared_experts") if self.config.num_shared_experts else None
        return Moe(gate, bias, ExpertBank(gate_ups, downs), shared)

    def layer(self, index: int, *, streamed: bool = False) -> Layer:
        """One decoder layer; streamed: an expert is read each time it is used, and not kept."""
        return drain(self._layer(index, streamed=streamed))

    def _layer(self, index: int, *, streamed: bool = False) -> Pieces[Layer]:
        p = f"model.layers.{index}"
        norms = (
            [self.tensor(f"{p}.attention.{which}_layernorm.weight") for which in ("query", "key")]
            if self.config.use_qk_norm
            else [None, None]
        )
        qkv = yield from self._linear(f"{p}.attention.query_key_value")
        dense = yield from self._linear(f"{p}.attention.dense")
        ffn: Mlp | Moe
        if not self.config.is_moe_layer(index):
            ffn = yield from self._mlp(f"{p}.mlp")
        elif streamed:
            ffn = self._streamed_moe(index)
        else:
            ffn = yield from self._moe(index)
        return Layer(
            input_norm=self.tensor(f"{p}.input_layernorm.weight"),
            qkv=qkv,
            query_norm=norms[0],
            key_norm=norms[1],
            dense=dense,
            post_norm=self.tensor(f"{p}.post_attention_layernorm.weight"),
            ffn=ffn,
        )

    def embedding(self) -> torch.Tensor:
        return self.tensor("model.word_embeddings.weight")

    def head(self) -> Linear:
        """(V, H) T; the embedding's values where tied."""
        return drain(self._head())

    def _head(self) -> Pieces[Linear]:
        tied = self.config.tie_word_embeddings
        name = "model.word_embeddings.weight" if tied else "lm_head.weight"
        head = yield from preparing_head(Weight(self.checkpoint.tensor(name), self.dtype))
        self._note(head)
        yield from self.checkpoint.letting_go(name)
        return head

    def reading(
        self, *, version: int, on_layer: Callable[[int], None] = lambda _: None
    ) -> Pieces[Weights]:
        """Everything but the digest, in pieces (kernels/pieces.py); `on_layer` is told of the
        layer that comes next.

        Peak memory is the model plus one tensor. Raises CheckpointError naming the tensor that is
        not finite or cannot be read.
        """
        self._is_reading = True
        layers: list[Layer] = []
        for index in range(self.config.num_hidden_layers):
            on_layer(index)
            layers.append((yield from self._layer(index)))
        embedding = yield from self._copying("model.word_embeddings.weight")
        self.made.append(embedding)
        head = yield from self._head()
        return Weights(
            config=self.config,
            dtype=self.dtype,
            embedding=embedding,
            layers=tuple(layers),
            norm=self.tensor("model.norm.weight"),
            head=head,
            formats=self.formats,
            version=version,
            digest="",
            parts=tuple(self.made),
        )

    @property
    def num_bytes(self) -> int:
        """Memory that the weights take once they are read, but for padding and scales."""
        keeps_codes = self.dtype == torch.bfloat16 and not self._expand_now
        main_layers = msgspec.structs.replace(self.config, num_nextn_predict_layers=0)
        total = 0
        for spec in expected_tensors(main_layers):
            is_code = self.checkpoint.entries[spec.name].dtype == "F8_E4M3"
            width = 1 if is_code and keeps_codes else self.dtype.itemsize
            if ".mlp.gate." in spec.name:
                width = torch.float32.itemsize
            total += math.prod(spec.shape) * width
        if self.config.tie_word_embeddings:
            # once to be looked up in, once to be multiplied with
            total += self.config.vocab_size * self.config.hidden_size * self.dtype.itemsize
        return total

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

    Values are looked at, and digested, on a thread beside: numpy and sha256 hold no interpreter, and
    most of reading does not either.
    Raises CheckpointError naming the tensor that is not finite or cannot be read, ConfigError
    where the numerics do not fit the checkpoint.
    """
    reader, count = WeightReader(checkpoint, model), checkpoint.config.num_hidden_layers
    checkpoint.trust()
    with _verifying(checkpoint) as checking:

        def on_layer(index: int) -> None:
            on_progress("read", index, count)
            checking.raise_early()

        weights = drain(reader.reading(version=version, on_layer=on_layer))
        on_progress("read", count, count)
        return replace(weights, digest=checking.wait(on_progress))


class _Checking:
    """All tensors of a checkpoint, verified in the order of their names; `run` is the thread's."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        # a map of its own: the reader lets go of the pages of its
        self._checkpoint = Checkpoint(checkpoint.folder, checkpoint.config, checkpoint.entries)
        self._done = 0
        self.is_given_up = False
        self.result: Future[str]

    def run(self) -> str:
        """The content's digest; raises CheckpointError for a value that is not finite."""
        digests = {}
        for name in self._checkpoint.names:
            if self.is_given_up:
                raise InterruptedError
            try:
                digests[name] = drain(self._checkpoint.verifying(name))
            except WeightsRefused as error:
                raise CheckpointError(str(error)) from None
            self._done += 1
        return combine_digests(digests)

    def raise_early(self) -> None:
        """What `run` has raised by now."""
        if self.result.done():
            self.result.result()

    def wait(self, on_progress: Progress) -> str:
        """What `run` gives, and how far it is meanwhile."""
        count = len(self._checkpoint.names)
        while not self.result.done():
            on_progress("check", self._done, count)
            futures.wait([self.result], TELL_EVERY_S)
        digest = self.result.result()
        on_progress("check", count, count)
        return digest


@contextmanager
def _verifying(checkpoint: Checkpoint) -> Iterator[_Checking]:
    checking = _Checking(checkpoint)
    with futures.ThreadPoolExecutor(1, "check") as thread:
        checking.result = thread.submit(checking.run)
        try:
            yield checking
        finally:
            checking.is_given_up = True
