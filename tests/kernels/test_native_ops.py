"""The C++ operations against their definitions, and the bits of a row against its company.

Everything runs at every level that this machine has.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import QuerySpan, native, native_ops, reference
from everstep.kernels.activation import swiglu
from everstep.kernels.norm import rms_norm

from ..tolerances import assert_close
from .draws import (
    DTYPES,
    NAN,
    assert_same_bits,
    dtypes,
    few,
    many,
    misaligned,
    poisoned,  # noqa: F401
    random,
    seeds,
    strided,
    threads,
)
from .test_attention import assert_attention_close, make_paged
from .test_row_invariance import assert_rows_are_alone, chunked

LEVELS = [name for name in native.runnable(native.machine_flags()) if name != "torch"]
# groups of 1, 2, 3, 5, 8, 16 and 24; head sizes odd, below and above a vector, and real ones
HEADS = [(1, 1, 8), (2, 1, 5), (4, 2, 16), (3, 1, 20), (5, 1, 33), (8, 1, 4), (16, 1, 8),
         (24, 1, 6), (4, 4, 1), (9, 3, 64), (4, 1, 128)]  # fmt: skip
WIDTHS = (1, 2, 7, 15, 16, 17, 63, 64, 65, 130, 257, 576, 1030)


def load(name):
    try:
        return native_ops.Ops(native.open_library(native.find_library(name)))
    except native.BuildError as error:
        pytest.skip(f"no library of level {name}: {error}")


@pytest.fixture(params=LEVELS, scope="module")
def ops(request):
    return load(request.param)


# -- attention


def by(ops, paged):
    """`attend` of Paged.step, by the C++ kernel; slot 0 is poisoned as well."""

    def attend(q, k, v, spans):
        for cache in (k, v):
            cache[0] = NAN
        plan = native_ops.plan_attention(spans, block_size=paged.block_size)
        return ops.attention(q, k, v, plan, scale=paged.heads[2] ** -0.5)

    return attend


@few
@given(
    st.lists(st.tuples(st.integers(0, 150), st.integers(1, 12)), min_size=1, max_size=3),
    st.sampled_from(HEADS),
    dtypes,
    st.sampled_from([1, 3, 16, 64, 100]),
    seeds,
)
def test_attention_is_the_definition_for_any_mix_of_chunks(
    ops, shares, heads, dtype, block_size, seed
):
    paged = make_paged([start + n for start, n in shares], heads, dtype, block_size, seed)
    shares = [(i, start, n) for i, (start, n) in enumerate(shares)]
    actual, expected = (
        torch.cat(paged.step(shares, attend)) for attend in (by(ops, paged), paged.definition)
    )
    assert_attention_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 64, 65, 130])
def test_prefills_around_block_borders_round_the_weights_where_the_definition_does(
    ops, length, dtype
):
    paged = make_paged([length], (3, 1, 24), dtype)
    actual, expected = (
        paged.step([(0, 0, length)], attend)[0] for attend in (by(ops, paged), paged.definition)
    )
    assert_attention_close(actual, expected)
    assert dtype == torch.float32 or (actual != expected).float().mean() < 0.02


def test_large_scores_neither_overflow_nor_lose_the_rest(ops):
    paged = make_paged([70], (2, 1, 8), spread=6.0)
    actual, expected = (
        paged.step([(0, 0, 70)], attend)[0] for attend in (by(ops, paged), paged.definition)
    )
    assert_attention_close(actual, expected, 6.0)
    for tensors in (paged.q, paged.k):
        tensors[0].mul_(1e4)
    assert torch.isfinite(paged.step([(0, 0, 70)], by(ops, paged))[0]).all()


@few
@given(
    st.lists(st.integers(1, 140), min_size=1, max_size=4),
    st.sampled_from(HEADS),
    dtypes,
    st.sampled_from([1, 16, 64]),
    seeds,
)
def test_attention_of_a_token_does_not_see_the_schedule(
    ops, lengths, heads, dtype, block_size, seed
):
    paged = make_paged(lengths, heads, dtype, block_size, seed)
    attend = by(ops, paged)
    with threads(1):
        alone = [paged.step([(i, 0, n)], attend)[0] for i, n in enumerate(lengths)]
    # other blocks, random chunks among others, by one thread and by two
    paged.tables = make_paged(lengths, heads, dtype, block_size, seed + 1).tables
    for count in (1, 2):
        parts = [[] for _ in lengths]
        with threads(count):
            for step in chunked(lengths, seed + count):
                for (i, _, _), out in zip(step, paged.step(step, attend), strict=True):
                    parts[i].append(out)
        for own, expected in zip(parts, alone, strict=True):
            assert_same_bits(torch.cat(own), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_has_the_bits_of_prefill_over_many_blocks(ops, dtype):
    paged = make_paged([700], (6, 2, 32), dtype, seed=5)
    attend = by(ops, paged)
    with threads(2):
        whole = paged.step([(0, 0, 700)], attend)[0]
    for position in (0, 1, 15, 16, 62, 63, 64, 65, 127, 128, 191, 255, 256, 511, 512, 699):
        out = paged.step([(0, position, 1)], attend)[0]
        assert_same_bits(out, whole[position : position + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_never_sees_a_later_token_of_its_own_step(ops, dtype):
    paged = make_paged([100], (4, 2, 16), dtype)
    whole = paged.step([(0, 0, 100)], by(ops, paged))[0]
    for tokens in (paged.k, paged.v):
        tokens[0][70:] = NAN
    assert_same_bits(paged.step([(0, 0, 100)], by(ops, paged))[0][:70], whole[:70])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_batch_has_the_bits_of_each_rollout_alone(ops, dtype):
    paged = make_paged([65 + i % 3 for i in range(150)], (3, 3, 16), dtype, seed=6)
    shares = [(i, 64 + i % 3, 1) for i in range(150)]
    for count in (1, 2):
        with threads(count):
            together = paged.step(shares, by(ops, paged))
        for i in (0, 1, 77, 149):
            assert_same_bits(together[i], paged.step([shares[i]], by(ops, paged))[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_takes_strided_and_misaligned_inputs(ops, dtype):
    paged = make_paged([20, 70], (4, 2, 8), dtype)
    shares = [(0, 0, 20), (1, 60, 10)]
    expected = torch.cat(paged.step(shares, by(ops, paged)))
    for change in (strided, misaligned):
        actual = paged.step(
            shares,
            lambda q, k, v, spans, f=change: by(ops, paged)(f(q), f(k), f(v), spans),
        )
        assert_same_bits(torch.cat(actual), expected)


def test_plan_names_the_slot_and_position_of_every_token():
    spans = [QuerySpan(0, 5, 3, [4, 2]), QuerySpan(3, 0, 2, [7]), QuerySpan(5, 3, 1, [1])]
    plan = native_ops.plan_attention(spans, block_size=4)
    assert plan.positions.tolist() == [5, 6, 7, 0, 1, 3]
    assert plan.write_slots.tolist() == [9, 10, 11, 28, 29, 7]
    assert (plan.num_slots, plan.num_positions) == (32, 8)
    with pytest.raises(ValueError, match="9 tokens"):
        native_ops.plan_attention([QuerySpan(0, 0, 9, [1, 2])], block_size=4)
    empty = native_ops.plan_attention([], block_size=4)
    assert empty.positions.shape == (0,)


def test_what_does_not_fit_the_plan_is_refused(ops):
    plan = native_ops.plan_attention([QuerySpan(0, 0, 2, [3])], block_size=4)
    q, cache = torch.zeros(2, 2, 8), torch.zeros(16, 1, 8)
    with pytest.raises(ValueError, match="16 slots"):
        ops.attention(q, cache[:15], cache[:15], plan, scale=1.0)
    with pytest.raises(ValueError, match="plan"):
        ops.attention(q[:1], cache, cache, plan, scale=1.0)
    with pytest.raises(ValueError, match="mixed dtypes"):
        ops.attention(q.bfloat16(), cache, cache, plan, scale=1.0)
    with pytest.raises(NotImplementedError, match="float16"):
        ops.attention(q.half(), cache.half(), cache.half(), plan, scale=1.0)
    tables = (torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="position 1"):
        ops.place_qkv(torch.zeros(2, 32), plan, cache, cache.clone(), heads=2, tables=tables)


# -- rows


@many
@given(
    st.sampled_from([(0,), (1,), (7,), (3, 2)]),
    st.sampled_from(WIDTHS),
    dtypes,
    st.sampled_from([1e-6, 0.5]),
    st.sampled_from([1e-3, 1.0, 100.0]),
    seeds,
)
def test_rms_norm_is_the_definition(ops, rows, n, dtype, eps, scale, seed):
    x, weight = random(seed, *rows, n, dtype=dtype, scale=scale), random(seed + 1, n, dtype=dtype)
    assert_close(ops.rms_norm(x, weight, eps), reference.rms_norm(x, weight, eps))


@many
@given(st.integers(0, 9), st.sampled_from(WIDTHS), dtypes, seeds)
def test_adding_and_norming_at_once_is_both_one_after_the_other(ops, rows, n, dtype, seed):
    x, y, weight = (random(seed + i, rows, n, dtype=dtype) for i in range(3))
    total, out = ops.add_rms_norm(x, y, weight[0] if rows else random(0, n, dtype=dtype), 1e-6)
    assert_same_bits(total, x + y)
    assert_same_bits(ops.add(x, y), x + y)
    if rows:
        assert_same_bits(out, ops.rms_norm(x + y, weight[0], 1e-6))


@many
@given(st.integers(0, 9), st.sampled_from(WIDTHS), dtypes, st.sampled_from([1.0, 30.0]), seeds)
def test_swiglu_is_the_definition(ops, rows, n, dtype, scale, seed):
    gate, up = (
        random(seed, rows, n, dtype=dtype, scale=scale),
        random(seed + 1, rows, n, dtype=dtype),
    )
    assert_close(ops.swiglu(gate, up), reference.swiglu(gate, up))


@many
@given(
    st.integers(0, 9),
    st.integers(1, 5),
    st.sampled_from([1, 2, 5, 17, 32]),
    st.sampled_from([0, 1, 3, 64]),
    dtypes,
    st.booleans(),
    seeds,
)
def test_rope_is_the_definition_to_the_bit(
    ops, tokens, heads, half, rest, dtype, is_model_table, seed
):
    x = random(seed, tokens, heads, 2 * half + rest, dtype=dtype)
    angle = random(seed + 1, tokens, half, scale=3.0)
    kind = dtype if is_model_table else torch.float32
    cos, sin = torch.cos(angle).to(kind), torch.sin(angle).to(kind)
    assert_same_bits(ops.apply_rope(x, cos, sin), reference.apply_rope(x, cos, sin))


@many
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=3),
    st.sampled_from([(1, 1, 2, 1), (4, 2, 16, 8), (3, 1, 10, 3), (9, 3, 64, 32), (5, 1, 33, 8)]),
    dtypes,
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_place_qkv_is_norm_rope_and_store(
    ops, shares, shape, dtype, has_norm, is_model_table, seed
):
    heads, kv_heads, d, half = shape
    q_end, k_end = heads * d, (heads + kv_heads) * d
    spans, row, block = [], 0, 1
    for start, n in shares:
        count = -(-(start + n) // 4)
        spans.append(QuerySpan(row, start, n, list(range(block, block + count))[::-1]))
        row, block = row + n, block + count
    plan = native_ops.plan_attention(spans, block_size=4)
    qkv = random(seed, row, (heads + 2 * kv_heads) * d, dtype=dtype)
    angle = random(seed + 1, 40, half, scale=3.0)
    kind = dtype if is_model_table else torch.float32
    tables = torch.cos(angle).to(kind), torch.sin(angle).to(kind)
    norms = tuple(random(seed + i, d, dtype=dtype) for i in (2, 3)) if has_norm else None
    caches = [torch.full((block * 4, kv_heads, d), NAN, dtype=dtype) for _ in range(2)]
    q = ops.place_qkv(
        qkv, plan, *caches, heads=heads, tables=tables, norms=norms, eps=1e-6
    )  # fmt: skip

    expected = [part.reshape(row, -1, d) for part in (qkv[:, :q_end], qkv[:, q_end:k_end])]
    if norms is not None:
        expected = [ops.rms_norm(x, w, 1e-6) for x, w in zip(expected, norms, strict=True)]
    rotary = [table[plan.positions] for table in tables]
    expected = [reference.apply_rope(x, *rotary) for x in expected]
    assert_same_bits(q, expected[0])
    for cache, own in zip(caches, (expected[1], qkv[:, k_end:].view(row, -1, d)), strict=True):
        wanted = torch.full_like(cache, NAN)
        wanted[plan.write_slots] = own
        assert_same_bits(cache, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_see_each_other(ops, dtype):
    for width in (1, 17, 130, 1030):
        x, y = random(0, 341, width, dtype=dtype), random(1, 341, width, dtype=dtype)
        weight = random(2, width, dtype=dtype)
        assert_rows_are_alone(lambda x, w=weight: (ops.rms_norm(x, w, 1e-6),), x)
        assert_rows_are_alone(lambda x, y, w=weight: ops.add_rms_norm(x, y, w, 1e-6), x, y)
        assert_rows_are_alone(lambda x, y: (ops.swiglu(x, y),), x, y)
    x, angle = random(0, 341, 3, 10, dtype=dtype), random(1, 341, 4)
    assert_rows_are_alone(
        lambda *parts: (ops.apply_rope(*parts),), x, torch.cos(angle), torch.sin(angle)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_give_the_same_bits(ops, dtype):
    x, y, weight = (random(i, 9, 65, dtype=dtype) for i in range(3))
    expected = ops.rms_norm(x, weight[0], 1e-6)
    assert_same_bits(ops.rms_norm(strided(x), strided(weight[0]), 1e-6), expected)
    fused = torch.cat([y, x, y], dim=1)
    assert_same_bits(ops.rms_norm(fused[:, 65:130], weight[0], 1e-6), expected)
    assert_same_bits(ops.swiglu(fused[:, 65:130], fused[:, :65]), ops.swiglu(x, y))
    assert_same_bits(ops.swiglu(strided(x), strided(y)), ops.swiglu(x, y))


def test_casts_are_those_of_the_torch_level(ops):
    x, y = random(0, 64, 576, dtype=torch.bfloat16), random(1, 64, 576, dtype=torch.bfloat16)
    # float32 sums in another order cross a border of bf16 now and then
    assert (ops.rms_norm(x, y[0], 1e-6) != rms_norm(x, y[0], 1e-6)).float().mean() < 1e-3
    assert (ops.swiglu(x, y) != swiglu(x, y)).float().mean() < 1e-3
