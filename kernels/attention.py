"""Attention over paged keys and values: one order of summation for prefill and decode.

Keys are taken in blocks of KEY_BLOCK positions counted from position 0. Each block's products
are matrix products of one fixed shape; sums inside a block follow a fixed tree, blocks are
added pairwise in ascending order, and blocks that a query does not reach count as zero. So the
bits of a query row depend on its own query and on the keys up to its position: not on how many
rows were computed with it, nor on how the keys came to be there.

Plan, then run: `plan_attention` turns a step's block tables into gather indices once, `attention`
uses them in every layer.

Shapes: T packed tokens, H query heads, G kv heads, D head size, S block size, n sequences of a
bucket, J query tiles, R rows of a tile, B key blocks, L = KEY_BLOCK.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .gemm import matmul_items
from .reduce import pairwise_sum, tree_sum

KEY_BLOCK = 64
QUERY_ROWS = 16
# elements of one product's operands that are in memory at once
WORKING_SET = 4 * 2**20


@dataclass(frozen=True)
class QuerySpan:
    """The share of one rollout in a step: `length` tokens from packed row `row`, at `start`."""

    row: int
    start: int
    length: int
    block_table: Sequence[int]


@dataclass(frozen=True)
class Bucket:
    """Sequences with as many query tiles and (padded) key blocks as each other.

    rows       (n, J, tokens of a tile) int64: packed row of each query, 0 where there is none
    positions  (n, J, tokens of a tile) int64: its position, 0 where there is none
    is_real    (n, J, tokens of a tile) bool
    slots      (n, B·L) int64: KV slot of each position; slot 0 (never written) beyond the end
    """

    rows: torch.Tensor
    positions: torch.Tensor
    is_real: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """Where each packed token is stored, and what it attends to.

    write_slots  (T,) int64
    positions    (T,) int64
    """

    write_slots: torch.Tensor
    positions: torch.Tensor
    buckets: tuple[Bucket, ...]


def tokens_per_tile(heads: int, kv_heads: int) -> int:
    """Query tokens whose heads of one kv group fill a tile."""
    return max(1, QUERY_ROWS // (heads // kv_heads))


def plan_attention(
    sequences: Sequence[QuerySpan], *, block_size: int, tile_tokens: int
) -> AttentionPlan:
    """Gather and scatter indices of one step.

    sequences  in packed order, rows contiguous from 0
    Raises ValueError if a block table does not cover its sequence.
    """
    writes, positions = [], []
    groups: dict[tuple[int, int], list[tuple[QuerySpan, np.ndarray]]] = defaultdict(list)
    for sequence in sequences:
        end = sequence.start + sequence.length
        if len(sequence.block_table) * block_size < end:
            raise ValueError(f"block table covers too little for {end} tokens")
        table = np.asarray(sequence.block_table, dtype=np.int64)
        slots = (table[:, None] * block_size + np.arange(block_size)).reshape(-1)[:end]
        writes.append(slots[sequence.start :])
        positions.append(np.arange(sequence.start, end))
        key_blocks = _power_of_two(-(-end // KEY_BLOCK))
        groups[(-(-sequence.length // tile_tokens), key_blocks)].append((sequence, slots))
    buckets = tuple(
        _bucket(members, tiles, key_blocks, tile_tokens)
        for (tiles, key_blocks), members in sorted(groups.items())
    )
    return AttentionPlan(
        torch.from_numpy(np.concatenate(writes)),
        torch.from_numpy(np.concatenate(positions)),
        buckets,
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _bucket(
    members: list[tuple[QuerySpan, np.ndarray]], tiles: int, key_blocks: int, tile_tokens: int
) -> Bucket:
    count, width = len(members), tiles * tile_tokens
    rows = np.zeros((count, width), dtype=np.int64)
    positions = np.zeros((count, width), dtype=np.int64)
    is_real = np.zeros((count, width), dtype=np.bool_)
    all_slots = np.zeros((count, key_blocks * KEY_BLOCK), dtype=np.int64)
    for i, (sequence, slots) in enumerate(members):
        rows[i, : sequence.length] = np.arange(sequence.row, sequence.row + sequence.length)
        positions[i, : sequence.length] = np.arange(
            sequence.start, sequence.start + sequence.length
        )
        is_real[i, : sequence.length] = True
        all_slots[i, : len(slots)] = slots
    shape = (count, tiles, tile_tokens)
    return Bucket(
        torch.from_numpy(rows.reshape(shape)),
        torch.from_numpy(positions.reshape(shape)),
        torch.from_numpy(is_real.reshape(shape)),
        torch.from_numpy(all_slots),
    )


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
) -> torch.Tensor:
    """Causal attention of every packed token over its rollout's keys up to itself.

    q        (T, H, D) T
    k_cache  (slots, G, D) T, this step's keys written already; G divides H
    v_cache  as k_cache
    scale    multiplies q·k before the softmax (D**-0.5)
    returns  (T, H, D) T. Softmax in float32, weights rounded to T, sums in float32 (MODEL.md §3.2)

    Never reads slots that the plan does not name (they may hold NaN).
    """
    out = torch.empty_like(q)
    for bucket in plan.buckets:
        _attend(q, k_cache, v_cache, bucket, scale, out)
    return out


def _attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    bucket: Bucket,
    scale: float,
    out: torch.Tensor,
) -> None:
    """One bucket, as many query tiles at a time as the working set allows."""
    n, tiles, tile_tokens = bucket.rows.shape
    kv_heads, head_dim = k_cache.shape[1:]
    keys = _gather(k_cache, bucket.slots)
    values = _gather(v_cache, bucket.slots)
    blocks = keys.shape[2]
    per_tile = n * kv_heads * blocks * KEY_BLOCK * max(head_dim, KEY_BLOCK)
    step = max(1, WORKING_SET // per_tile)
    for first in range(0, tiles, step):
        part = slice(first, min(first + step, tiles))
        rows = bucket.rows[:, part]
        queries = _tile_queries(q, rows, kv_heads)
        group = q.shape[1] // kv_heads
        o = _attend_tiles(queries, keys, values, bucket.positions[:, part], group, scale, q.dtype)
        # (n, G, J, tokens·group, D) → (n, J, tokens, G·group, D)
        o = o[..., : tile_tokens * group, :].reshape(
            n, kv_heads, rows.shape[1], tile_tokens, group, head_dim
        )
        o = o.permute(0, 2, 3, 1, 4, 5).reshape(-1, q.shape[1], head_dim)
        real = bucket.is_real[:, part].reshape(-1)
        out[rows.reshape(-1)[real]] = o[real].to(q.dtype)


def _gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(slots, G, D) → (n, G, B, L, D) float32, in positions' order."""
    n, length = slots.shape
    taken = cache.index_select(0, slots.reshape(-1))
    shaped = taken.view(n, length // KEY_BLOCK, KEY_BLOCK, *cache.shape[1:])
    return shaped.permute(0, 3, 1, 2, 4).float().contiguous()


def _tile_queries(q: torch.Tensor, rows: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(T, H, D) → (n, G, J, R, D) float32: a tile's tokens × heads of one kv group, zero-padded."""
    n, tiles, tile_tokens = rows.shape
    heads, head_dim = q.shape[1:]
    group = heads // kv_heads
    taken = q.index_select(0, rows.reshape(-1)).float()
    taken = taken.view(n, tiles, tile_tokens, kv_heads, group, head_dim).permute(0, 3, 1, 2, 4, 5)
    taken = taken.reshape(n, kv_heads, tiles, tile_tokens * group, head_dim)
    real = tile_tokens * group
    padded = -(-real // QUERY_ROWS) * QUERY_ROWS
    if padded == real:
        return taken
    return torch.nn.functional.pad(taken, (0, 0, 0, padded - real))


def _attend_tiles(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    group: int,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(n, G, J, R, D) × (n, G, B, L, D) → (n, G, J, R, D) float32."""
    n, kv_heads, tiles, rows, head_dim = queries.shape
    blocks = keys.shape[2]
    items = n * kv_heads * tiles * blocks
    shape = (n, kv_heads, tiles, blocks)
    q = queries.unsqueeze(3).expand(*shape, rows, head_dim).reshape(items, rows, head_dim)
    k = keys.unsqueeze(2).expand(*shape, KEY_BLOCK, head_dim).reshape(items, KEY_BLOCK, head_dim)
    v = values.unsqueeze(2).expand(*shape, KEY_BLOCK, head_dim).reshape(items, KEY_BLOCK, head_dim)
    scores = matmul_items(q, k).view(*shape, rows, KEY_BLOCK) * scale
    scores = scores.masked_fill_(_is_future(positions, blocks, rows, group), float("-inf"))
    top = scores.amax(dim=(3, 5), keepdim=True)
    weights = torch.exp(scores - top)
    total = pairwise_sum(tree_sum(weights).movedim(3, -1))
    weights = (weights / total.view(n, kv_heads, tiles, 1, rows, 1)).to(dtype).float()
    parts = matmul_items(weights.view(items, rows, KEY_BLOCK), v.transpose(1, 2)).view(
        *shape, rows, head_dim
    )
    return pairwise_sum(parts.movedim(3, -1))


def _is_future(positions: torch.Tensor, blocks: int, rows: int, group: int) -> torch.Tensor:
    """(n, 1, J, B, R, L) bool: key position beyond the query's. Padding rows see position 0."""
    n, tiles, _ = positions.shape
    key = torch.arange(blocks * KEY_BLOCK).view(1, 1, 1, blocks, 1, KEY_BLOCK)
    query = positions.repeat_interleave(group, dim=2)
    query = torch.nn.functional.pad(query, (0, rows - query.shape[2]))
    return key > query.view(n, 1, tiles, 1, rows, 1)
