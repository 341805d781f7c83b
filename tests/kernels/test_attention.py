"""Paged attention against the definition, query by query; unnamed slots hold NaN."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import QuerySpan, reference
from everstep.kernels.attention import attention, plan_attention, tokens_per_tile

from ..tolerances import TOLERANCES, assert_close
from .draws import DTYPES, NAN, assert_same_bits, dtypes, many, random, seeds, strided

# (query heads, kv heads, head size): groups of 1, 2, 3, 5, 8, 16 and more than a tile holds
HEADS = [
    (1, 1, 8),
    (2, 1, 5),
    (4, 2, 16),
    (3, 1, 20),
    (5, 1, 8),
    (8, 1, 4),
    (16, 1, 8),
    (24, 1, 6),
    (4, 4, 1),
]


@dataclass
class Paged:
    """Rollouts of given lengths: their queries, keys and values, and where those lie."""

    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    block_size: int
    tables: list[list[int]]
    num_blocks: int

    def caches(self, ends):
        """Keys and values up to `ends`; every other slot NaN, but for slot 0, where a plan points
        beyond an end."""
        slots = self.num_blocks * self.block_size
        caches = [
            torch.full((slots, *t[0].shape[1:]), NAN, dtype=t[0].dtype) for t in (self.k, self.v)
        ]
        for cache, tokens in zip(caches, (self.k, self.v), strict=True):
            cache[0] = 0.0
            for own, table, end in zip(tokens, self.tables, ends, strict=True):
                p = torch.arange(end)
                blocks = torch.tensor(table)[p // self.block_size]
                cache[blocks * self.block_size + p % self.block_size] = own[:end]
        return caches

    def step(self, shares, attend):
        """Attend for (rollout, start, length) in packed order; rows per share."""
        spans, rows, ends = [], 0, [0] * len(self.q)
        for i, start, length in shares:
            # blocks beyond the end are not the rollout's: name none
            used = -(-(start + length) // self.block_size)
            spans.append(QuerySpan(rows, start, length, self.tables[i][:used]))
            rows += length
            ends[i] = start + length
        q = torch.cat([self.q[i][start : start + length] for i, start, length in shares])
        out = attend(q, *self.caches(ends), spans)
        return out.split([length for _, _, length in shares])

    @property
    def heads(self):
        return self.q[0].shape[1], self.k[0].shape[1], self.q[0].shape[2]

    def kernel(self, q, k, v, spans):
        heads, kv_heads, d = self.heads
        plan = plan_attention(
            spans, block_size=self.block_size, tile_tokens=tokens_per_tile(heads, kv_heads)
        )
        return attention(q, k, v, plan, scale=d**-0.5)

    def definition(self, q, k, v, spans):
        return reference.attention(
            q, k, v, spans, block_size=self.block_size, scale=self.heads[2] ** -0.5
        )


def make_paged(lengths, heads, dtype=torch.float32, block_size=16, seed=0, spread=1.0):
    """Random tokens in randomly placed blocks; block 0 belongs to nobody."""
    num_heads, kv_heads, d = heads
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // block_size) for n in lengths]
    blocks = (torch.randperm(sum(counts) + 3, generator=generator) + 1).tolist()
    tables = []
    for count in counts:
        tables.append(blocks[:count])
        blocks = blocks[count:]
    made = [
        [
            random(seed + 7 * i + part, n, h, d, dtype=dtype, scale=spread)
            for i, n in enumerate(lengths)
        ]
        for part, h in enumerate((num_heads, kv_heads, kv_heads))
    ]
    return Paged(*made, block_size, tables, sum(counts) + 4)


def assert_attention_close(actual, expected, spread=1.0):
    """Within the tolerance of a sum of values weighted by one; bf16 weights may cross a border."""
    if actual.dtype == torch.float32:
        # exp turns an absolute error of a score into a relative one of a weight
        assert_close(actual, expected, 4.0 * max(spread, 1.0) ** 3)
        return
    allowed = TOLERANCES[actual.dtype].relative
    error = (actual.double() - expected.double()).abs()
    assert (error <= allowed * (expected.double().abs() + 0.1 * spread)).all()


@many
@given(
    st.lists(st.tuples(st.integers(0, 150), st.integers(1, 20)), min_size=1, max_size=4),
    st.sampled_from(HEADS),
    dtypes,
    st.sampled_from([1, 3, 16, 64, 100]),
    seeds,
)
def test_attention_is_the_definition_for_any_mix_of_chunks(shares, heads, dtype, block_size, seed):
    paged = make_paged([start + n for start, n in shares], heads, dtype, block_size, seed)
    shares = [(i, start, n) for i, (start, n) in enumerate(shares)]
    actual, expected = (
        torch.cat(paged.step(shares, attend)) for attend in (paged.kernel, paged.definition)
    )
    assert_attention_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [63, 64, 65, 128, 129, 200])
def test_whole_prefills_around_block_borders_are_the_definition(length, dtype):
    paged = make_paged([length], (2, 1, 8), dtype)
    actual, expected = (
        paged.step([(0, 0, length)], attend)[0] for attend in (paged.kernel, paged.definition)
    )
    assert_attention_close(actual, expected)
    unequal = (actual != expected).float().mean()
    # bf16: weights are rounded to T before they are summed; without that cast half would differ
    assert dtype == torch.float32 or unequal < TOLERANCES[dtype].differ


def test_large_scores_neither_overflow_nor_lose_the_rest():
    paged = make_paged([70], (2, 1, 8), spread=6.0)
    actual, expected = (
        paged.step([(0, 0, 70)], attend)[0] for attend in (paged.kernel, paged.definition)
    )
    assert_attention_close(actual, expected, 6.0)
    for tensors in (paged.q, paged.k):
        tensors[0].mul_(1e4)
    assert torch.isfinite(paged.step([(0, 0, 70)], paged.kernel)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_keys_share_their_weight(dtype):
    paged = make_paged([100], (2, 2, 8), dtype)
    paged.k[0][:] = 1.0
    paged.v[0][:] = 0.0
    paged.v[0][96] = 128.0
    out = paged.step([(0, 90, 10)], paged.kernel)[0]
    assert (out[:6] == 0).all()
    expected = torch.tensor([128.0 / n for n in range(97, 101)]).view(4, 1, 1).expand(4, 2, 8)
    assert torch.allclose(out[6:].float(), expected, rtol=2.0**-7)


def test_a_query_reads_the_kv_head_of_its_group():
    paged = make_paged([3], (4, 2, 8))
    for head in range(2):
        paged.v[0][:, head] = float(head)
    out = paged.step([(0, 0, 3)], paged.kernel)[0]
    assert torch.allclose(out[:, :2], torch.zeros(()))
    assert torch.allclose(out[:, 2:], torch.ones(()))


def test_the_scale_multiplies_before_the_softmax():
    paged = make_paged([9], (2, 1, 8))
    plan = plan_attention([QuerySpan(0, 0, 9, paged.tables[0])], block_size=16, tile_tokens=8)
    caches = paged.caches([9])
    out = attention(paged.q[0], *caches, plan, scale=0.0)
    means = paged.v[0].cumsum(0) / torch.arange(1, 10).view(9, 1, 1)
    assert_close(out, means.expand(9, 2, 8).contiguous(), 4.0)


def test_key_blocks_are_added_pairwise_in_ascending_order():
    # equal weights, and block sums that tell (0+1)+(2+3) from any other order
    paged = make_paged([256], (1, 1, 8))
    paged.k[0].zero_()
    for block, total in enumerate((2.0**30, 1.0, -(2.0**30), 1.0)):
        paged.v[0][64 * block : 64 * (block + 1)] = 4.0 * total
    out = paged.step([(0, 255, 1)], paged.kernel)[0]
    assert torch.equal(out, torch.zeros(1, 1, 8))


def test_plan_names_the_slot_and_position_of_every_token():
    spans = [QuerySpan(0, 5, 3, [4, 2]), QuerySpan(3, 0, 2, [7]), QuerySpan(5, 3, 1, [1])]
    plan = plan_attention(spans, block_size=4, tile_tokens=16)
    assert plan.positions.tolist() == [5, 6, 7, 0, 1, 3]
    assert plan.write_slots.tolist() == [9, 10, 11, 28, 29, 7]
    slots = torch.cat([bucket.slots.reshape(-1) for bucket in plan.buckets])
    assert set(slots.tolist()) == {0, *range(16, 20), *range(8, 12), 28, 29, *range(4, 8)}
    rows = torch.cat([bucket.rows[bucket.is_real] for bucket in plan.buckets])
    assert sorted(rows.tolist()) == list(range(6))


def test_plan_refuses_a_block_table_that_is_too_short():
    with pytest.raises(ValueError, match="9 tokens"):
        plan_attention([QuerySpan(0, 0, 9, [1, 2])], block_size=4, tile_tokens=1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (3, 1), (16, 1), (64, 2), (5, 1)])
def test_a_tile_holds_whole_groups(heads, kv_heads):
    tokens = tokens_per_tile(heads, kv_heads)
    assert tokens >= 1
    assert tokens * (heads // kv_heads) <= max(16, heads // kv_heads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_queries_and_caches_give_the_same_bits(dtype):
    paged = make_paged([20, 70], (4, 2, 8), dtype)
    shares = [(0, 0, 20), (1, 60, 10)]
    expected = torch.cat(paged.step(shares, paged.kernel))

    def with_gaps(q, k, v, spans):
        return paged.kernel(strided(q), strided(k), strided(v), spans)

    assert_same_bits(torch.cat(paged.step(shares, with_gaps)), expected)
    # the heads' part of fused q, k, v
    fused = torch.cat([q.reshape(q.shape[0], -1) for q in (paged.q[0], paged.k[0])], dim=1)
    part = fused[:, :32].view(20, 4, 8)
    plan = plan_attention([QuerySpan(0, 0, 20, paged.tables[0])], block_size=16, tile_tokens=8)
    out = attention(part, *paged.caches([20, 0]), plan, scale=8**-0.5)
    assert_same_bits(out, expected[:20])
