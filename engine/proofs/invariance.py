"""Which operation is not row-invariant: each one alone against in a batch, on real weights."""

from collections.abc import Callable, Iterator

import torch

from ...kernels import (
    QuerySpan,
    attention,
    experts,
    gate_up,
    linear,
    log_softmax,
    place_qkv,
    plan_attention,
    project,
    rms_norm,
    route,
)
from ..model.rotary import rotary_tables
from ..model.weights import Mlp, Moe, Weights

ROWS = 40
Operation = Callable[[torch.Tensor], torch.Tensor]


def failing_operations(weights: Weights) -> list[str]:
    """Names of the operations whose rows change with the rows beside them on this machine."""
    generator = torch.Generator().manual_seed(7)
    found = []
    with torch.inference_mode():
        for name, width, operation in _row_operations(weights):
            x = torch.randn(ROWS, width, generator=generator).to(weights.dtype)
            whole = operation(x)
            alone = torch.cat([operation(x[i : i + 1]) for i in range(ROWS)])
            shuffled = operation(x.flip(0)).flip(0)
            if not (torch.equal(whole, alone) and torch.equal(whole, shuffled)):
                found.append(name)
        if not _attention_holds(weights, generator):
            found.append("attention")
    return found


def _row_operations(weights: Weights) -> Iterator[tuple[str, int, Operation]]:
    """(name, width of a row, operation) of everything but attention, once per kind of layer."""
    config = weights.config
    hidden, d = config.hidden_size, config.head_dim
    first = weights.layers[0]
    yield "rms_norm", hidden, lambda x: rms_norm(x, weights.norm, config.rms_norm_eps)
    yield "linear (qkv)", hidden, lambda x: linear(x, first.qkv)
    yield "linear (dense)", config.num_attention_heads * d, lambda x: linear(x, first.dense)
    yield "head", hidden, lambda x: project(x, weights.head)
    yield "log_softmax", hidden, lambda x: log_softmax(x.float())
    mlp = next((layer.ffn for layer in weights.layers if isinstance(layer.ffn, Mlp)), None)
    if mlp is not None:
        yield "gate_up", hidden, lambda x: gate_up(x, mlp.gate_up)
    moe = next((layer.ffn for layer in weights.layers if isinstance(layer.ffn, Moe)), None)
    if moe is not None:
        yield "router", hidden, lambda x: _route(weights, moe, x)[1]
        yield (
            "experts",
            hidden,
            lambda x: experts(x, *_route(weights, moe, x), moe.experts),
        )


def _route(weights: Weights, moe: Moe, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config = weights.config
    return route(
        x,
        moe.router,
        moe.bias,
        top_k=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
        scaling=config.routed_scaling_factor,
    )


def _attention_holds(weights: Weights, generator: torch.Generator) -> bool:
    """Rotary, KV write and attention: token by token against one prefill beside another rollout."""
    config, size = weights.config, 16
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    blocks = -(-ROWS // size)
    tables = [list(range(1, 1 + blocks)), list(range(1 + blocks, 1 + 2 * blocks))]
    qkv = torch.randn(2 * ROWS, (heads + 2 * groups) * d, generator=generator).to(weights.dtype)
    rotary = rotary_tables(config, ROWS)

    def run(rows: torch.Tensor, spans: list[QuerySpan], kv: list[torch.Tensor]) -> torch.Tensor:
        plan = plan_attention(spans, block_size=size, heads=heads, kv_heads=groups)
        q = place_qkv(rows, plan, kv[0], kv[1], heads=heads, tables=rotary, norms=None, eps=0.0)
        return attention(q, kv[0], kv[1], plan, scale=d**-0.5)

    def empty() -> list[torch.Tensor]:
        shape = ((1 + 2 * blocks) * size, groups, d)
        return [torch.zeros(shape, dtype=weights.dtype) for _ in range(2)]

    whole = run(qkv, [QuerySpan(i * ROWS, 0, ROWS, tables[i]) for i in range(2)], empty())
    kv = empty()
    return all(
        torch.equal(run(qkv[p : p + 1], [QuerySpan(0, p, 1, tables[0])], kv)[0], whole[p])
        for p in range(ROWS)
    )
