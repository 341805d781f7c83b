"""Teacher forcing: the engine's own forward pass over given tokens, outside any scheduler.

`score` holds the whole model; `layers` reads one layer at a time, so that a checkpoint larger
than memory can be compared with the reference (engine/proofs/verify.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from ...kernels import Plan, QuerySpan, project, rms_norm
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.ring_config import RingConfig
from ..config import ModelConfig
from . import model
from .model import KVStore, Routes
from .rotary import rotary_tables
from .weights import WeightReader, load_weights

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
BLOCK = 16


@dataclass(frozen=True)
class TeacherScore:
    """logits (T, V); routing (T, MoE layers, K); hidden: residual stream (T, H) per layer."""

    logits: Floats
    routing_ids: Ints
    routing_weights: Floats
    hidden: list[Floats] = field(default_factory=list)


@dataclass(frozen=True)
class LayerResult:
    """The residual stream after `layer`, and its routing if it is a MoE layer; layer −1 is the
    last: logits (T, V), hidden after the final norm."""

    layer: int
    hidden: Floats
    routing_ids: Ints | None = None
    logits: Floats | None = None


def _array(x: torch.Tensor) -> Floats:
    values: Floats = x.float().numpy().astype(np.float32)
    return values


def _whole_sequence(config: RingConfig, length: int) -> Plan:
    """A plan in which one sequence lies in blocks 1, 2, …"""
    table = list(range(1, 1 + -(-length // BLOCK)))
    return model.plan_step(config, [QuerySpan(0, 0, length, table)], BLOCK)


def _num_slots(length: int) -> int:
    return (1 + -(-length // BLOCK)) * BLOCK


@torch.inference_mode()
def score(
    folder: Path,
    ids: Sequence[int],
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    numerics: Literal["exact", "w8a8"] = "exact",
    replay_routes: Ints | None = None,
    rope_tables: Literal["float32", "model"] = "float32",
) -> TeacherScore:
    """Logits at every position of `ids`.

    replay_routes  (MoE layers, T, K): route to these experts
    """
    config = ModelConfig(path=str(folder), dtype=dtype, numerics=numerics, rope_tables=rope_tables)
    weights = load_weights(Checkpoint.open(folder), config, on_progress=lambda *_: None)
    hidden: list[Floats] = []
    table_dtype = weights.dtype if rope_tables == "model" else torch.float32
    forced = None if replay_routes is None else [torch.from_numpy(r) for r in replay_routes]
    out = model.forward(
        weights,
        torch.tensor(list(ids)),
        KVStore.empty(weights.config, _num_slots(len(ids)), weights.dtype),
        _whole_sequence(weights.config, len(ids)),
        rotary_tables(weights.config, len(ids), table_dtype),
        forced=forced,
        trace=lambda _, x: hidden.append(_array(x)),
    )
    shape = (len(ids), 0, weights.config.num_experts_per_tok)
    routed = [r.ids.numpy() for r in out.routes], [r.weights.numpy() for r in out.routes]
    return TeacherScore(
        logits=_array(model.logits(weights, out.hidden)),
        routing_ids=np.stack(routed[0], axis=1) if routed[0] else np.zeros(shape, np.int64),
        routing_weights=np.stack(routed[1], axis=1) if routed[1] else np.zeros(shape, np.float32),
        hidden=hidden,
    )


@torch.inference_mode()
def layers(
    folder: Path,
    ids: Sequence[int],
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    numerics: Literal["exact", "w8a8"] = "exact",
    replay_routes: Ints | None = None,
) -> Iterator[LayerResult]:
    """The same layer by layer and expert by expert: at no time more than the attention, the router
    and one expert of a layer are in memory (beside the embedding, then the head)."""
    reader = WeightReader(
        Checkpoint.open(folder), ModelConfig(path=str(folder), dtype=dtype, numerics=numerics)
    )
    config = reader.config
    plan = _whole_sequence(config, len(ids))
    tables = rotary_tables(config, len(ids))
    one_layer = KVStore.empty(config, _num_slots(len(ids)), reader.dtype)
    x = reader.embedding()[torch.tensor(list(ids))]
    ops = model.KernelOperations(config, one_layer, plan, tables)
    num_moe = 0
    for index in range(config.num_hidden_layers):
        layer = reader.layer(index, streamed=True)
        replay = None
        if replay_routes is not None and num_moe < len(replay_routes):
            replay = torch.from_numpy(replay_routes[num_moe])
        x, routes = model.run_layer(ops, layer, x, index, replay)
        num_moe += routes is not None
        yield LayerResult(index, _array(x), _ids(routes))
    hidden = rms_norm(x, reader.tensor("model.norm.weight"), config.rms_norm_eps)
    values = project(hidden, reader.head())
    yield LayerResult(-1, _array(hidden), logits=_array(values))


def _ids(routes: Routes | None) -> Ints | None:
    return None if routes is None else routes.ids.numpy()
