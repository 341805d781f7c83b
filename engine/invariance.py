"""Which operation is not row-invariant: each one alone against in a batch, on real weights."""

from collections.abc import Callable, Iterator

import torch

from ..kernels import (
    QuerySpan,
    apply_rope,
    attention,
    experts,
    linear,
    log_softmax,
    matmul_rows,
    plan_attention,
    rms_norm,
    route,
    swiglu,
    tokens_per_tile,
)
from .rotary import rotary_tables
from .weights import Moe, Weights

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
    cos, sin = (table[3:4] for table in rotary_tables(config, 4))
    yield (
        "rope",
        d,
        lambda x: apply_rope(x.view(-1, 1, d), cos.expand(len(x), -1), sin.expand(len(x), -1)).view(
            -1, d
        ),
    )
    yield "swiglu", hidden, lambda x: swiglu(x, x.flip(1))
    yield "linear (head)", hidden, lambda x: matmul_rows(x.float(), weights.head)
    yield "log_softmax", hidden, lambda x: log_softmax(x.float())
    moe = next((layer.ffn for layer in weights.layers if isinstance(layer.ffn, Moe)), None)
    if moe is not None:
        yield "router", hidden, lambda x: _route(weights, moe, x)[1]
        yield (
            "experts",
            hidden,
            lambda x: experts(x, *_route(weights, moe, x), moe.gate, moe.up, moe.down),
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
    """Decode token by token against one prefill, beside another sequence."""
    config, size = weights.config, 16
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    tile = tokens_per_tile(heads, groups)
    slots = (1 + 2 * (-(-ROWS // size))) * size
    keys, values = (
        torch.randn(slots, groups, d, generator=generator).to(weights.dtype) for _ in range(2)
    )
    q = torch.randn(2 * ROWS, heads, d, generator=generator).to(weights.dtype)
    half = -(-ROWS // size)
    tables = [list(range(1, 1 + half)), list(range(1 + half, 1 + 2 * half))]
    spans = [QuerySpan(i * ROWS, 0, ROWS, tables[i]) for i in range(2)]
    whole = attention(
        q, keys, values, plan_attention(spans, block_size=size, tile_tokens=tile), scale=d**-0.5
    )
    for position in range(ROWS):
        plan = plan_attention(
            [QuerySpan(0, position, 1, tables[0])], block_size=size, tile_tokens=tile
        )
        alone = attention(q[position : position + 1], keys, values, plan, scale=d**-0.5)
        if not torch.equal(alone[0], whole[position]):
            return False
    return True
