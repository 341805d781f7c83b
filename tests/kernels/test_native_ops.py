"""The C++ operations against their definitions, and the bits of a row against its company.

Everything runs at every level (../levels.py).
"""

import ctypes
import math
from itertools import accumulate

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from everstep.kernels import QuerySpan, Rule, native, native_ops, native_sampling, reference
from everstep.kernels.activation import swiglu
from everstep.kernels.norm import rms_norm
from everstep.kernels.sampling import sample

from ..levels import NATIVE, open_level, quick
from ..tolerances import assert_close, logprob_tolerance
from .draws import (
    DTYPES,
    NAN,
    assert_same_bits,
    dtypes,
    few,
    many,
    misaligned,
    random,
    seeds,
    strided,
    threads,
)
from .test_attention import assert_attention_close, make_paged
from .test_router import SHAPES as ROUTERS
from .test_router import are_decided as routes_are_decided
from .test_router import make_router, options
from .test_row_invariance import assert_rows_are_alone, chunked, make_rules
from .test_sampling import (
    ALL,
    EXTREMES,
    LAST_U,
    VOCABS,
    assert_is_drawn_at,
    assert_relations,
    assert_tops_close,
    make_rule,
    rules,
)
from .test_sampling import are_decided as draws_are_decided

# groups of 1, 2, 3, 5, 8, 16 and 24; head sizes odd, below and above a vector, and real ones
HEADS = [(1, 1, 8), (2, 1, 5), (4, 2, 16), (3, 1, 20), (5, 1, 33), (8, 1, 4), (16, 1, 8),
         (24, 1, 6), (4, 4, 1), (9, 3, 64), (4, 1, 128)]  # fmt: skip
WIDTHS = (1, 2, 7, 15, 16, 17, 63, 64, 65, 130, 257, 576, 1030)


def load(name):
    try:
        return native_ops.Ops(open_level(name))
    except native.BuildError as error:
        pytest.skip(f"no library of level {name}: {error}")


@pytest.fixture(params=quick(NATIVE), scope="module")
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


@pytest.mark.parametrize(
    "heads", [(1, 1, 16), (4, 4, 32), (6, 2, 64), (14, 2, 32), (8, 1, 128), (26, 2, 16), (3, 1, 24)]
)
def test_tokens_of_many_rollouts_have_the_bits_of_their_prefills(ops, heads):
    """Alone, few and many: a level may go through a token's heads one by one or together."""
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 131, 200]
    paged = make_paged(lengths, heads, torch.bfloat16, 16, seed=7)
    attend = by(ops, paged)
    with threads(1):
        wholes = [paged.step([(i, 0, n)], attend)[0][-1:] for i, n in enumerate(lengths)]
    shares = [(i, n - 1, 1) for i, n in enumerate(lengths)]
    # the last beside a prompt, too
    for some in (shares, shares[-3:], shares[-1:], [*shares[-2:], (3, 0, 16)]):
        for count in (1, 2):
            with threads(count):
                found = paged.step(some, attend)
            for (i, _, length), out in zip(some, found, strict=True):
                assert_same_bits(out[-1:] if length > 1 else out, wholes[i])


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


# -- router


@many
@given(
    st.integers(0, 9),
    st.sampled_from(ROUTERS),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, -3.0, 3.0]),
    seeds,
)
def test_route_is_the_definition_ties_included(ops, tokens, shape, twins, is_forced, center, seed):
    x = random(seed + 2, tokens, 8)
    gate, bias = make_router(seed, 8, shape, twins)
    bias += center
    assume(routes_are_decided(x, gate, bias, shape))
    # float64 sums rounded once: the logits that the definition sees
    logits = (x.double() @ gate.double().t()).float()
    forced = None
    if is_forced:
        generator = torch.Generator().manual_seed(seed)
        forced = torch.rand(tokens, shape[0], generator=generator).argsort(dim=-1)[:, : shape[3]]
    ids, weights = ops.route(logits, bias, forced_ids=forced, **options(shape))
    expected_ids, expected = reference.route(x, gate, bias, forced_ids=forced, **options(shape))
    assert torch.equal(ids, expected_ids)
    assert_close(weights, expected, torch.tensor(2.5))


@pytest.mark.parametrize("shape", ROUTERS)
def test_equal_logits_choose_the_lowest_experts_in_order(ops, shape):
    ids, _ = ops.route(torch.zeros(3, shape[0]), torch.zeros(shape[0]), **options(shape))
    assert ids.tolist() == [list(range(shape[3]))] * 3


def test_underflown_and_saturated_scores_are_weighed(ops):
    one = {"n_group": 1, "topk_group": 1, "scaling": 2.5}
    ids, weights = ops.route(torch.full((1, 4), -200.0), torch.zeros(4), top_k=2, **one)
    assert (ids.tolist(), weights.tolist()) == ([[0, 1]], [[0.0, 0.0]])
    ids, _ = ops.route(torch.tensor([[20.0, 40.0, 30.0]]), torch.zeros(3), top_k=2, **one)
    assert ids.tolist() == [[0, 1]]
    # a broken row still names experts that exist
    ids, _ = ops.route(torch.full((1, 4), NAN), torch.zeros(4), top_k=3, **one)
    assert ids.tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="beyond"):
        ops.route(torch.zeros(1, 3), torch.zeros(3), top_k=1, forced_ids=torch.tensor([[3]]), **one)


def test_routes_do_not_see_each_other(ops):
    bias = random(1, 64, scale=0.1)
    logits = random(2, 341, 64)
    logits[:, 5] = logits[:, 9]
    assert_rows_are_alone(lambda x: ops.route(x, bias, **options((64, 8, 4, 8))), logits)
    assert_rows_are_alone(lambda x: ops.route(x, bias, **options((64, 1, 1, 4))), logits)


# -- sampling


@settings(many, max_examples=150)
@given(st.sampled_from(VOCABS), st.sampled_from([0.25, 1.0, 8.0]), rules(), seeds)
def test_a_draw_is_the_definition_in_every_number(ops, vocab, step, fields, seed):
    # logits on a grid: exact ties are common, near ties are not
    logits = (random(seed, vocab, scale=6.0 / step).round() * step).float()
    rule = make_rule(fields, vocab)
    expected = reference.sample(logits, rule)
    lp = reference.tempered(logits.tolist(), rule).tolist()
    assume(draws_are_decided(lp, rule, expected.kept_ids))
    got = ops.sample(logits.unsqueeze(0), [rule])[0]
    close = logprob_tolerance(reference.penalised(logits.tolist(), rule), rule.temperature)

    assert got.is_cut == expected.is_cut
    assert got.kept_ids == (expected.kept_ids if got.is_cut else [])
    assert_is_drawn_at(got.token_id, lp, expected.kept_ids, rule, close)
    raw = reference.log_softmax(logits).tolist()
    mass = reference.log_mass(lp, expected.kept_ids)
    assert got.lp_temp == pytest.approx(lp[got.token_id], abs=close)
    assert got.lp_sampled == pytest.approx(lp[got.token_id] - mass, abs=2 * close)
    assert got.kept_mass == pytest.approx(math.exp(mass), rel=close, abs=0.0)
    assert got.lp_raw == pytest.approx(raw[got.token_id], abs=logprob_tolerance(logits.tolist()))
    assert got.entropy == pytest.approx(expected.entropy, abs=10 * close)
    if rule.num_top:
        assert_tops_close(got.top, expected.top, 2 * close)
    else:
        assert got.top is None
    assert_relations(got)


@many
@given(
    st.sampled_from([0.5, 4.0, 12.0]),
    st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0 - 1e-9, 1.0]),
    st.sampled_from([0, 3, 20, 64, 65, 500, 2999]),
    st.sampled_from([(), (0,), tuple(range(0, 3000, 2))]),
    st.sampled_from([0.0, 0.011]),
    seeds,
)
def test_partial_selection_finds_the_support_of_the_full_sort(
    ops, scale, top_p, top_k, banned, min_p, seed
):
    logits = (random(seed, 3000, scale=scale) * 8).round() / 8
    rule = Rule(
        0, 0, top_p=top_p, top_k=top_k, banned=banned, min_p=min_p, wants_kept_ids=True
    )  # fmt: skip
    got = ops.sample(logits.unsqueeze(0), [rule])[0]
    kept = got.kept_ids if got.is_cut else list(range(3000))
    lp = reference.log_softmax(logits).tolist()
    if reference.support(lp, rule) != kept:
        # float32 and float64 may part at a border, nowhere else
        assert not draws_are_decided(lp, rule, kept)


def exps(ops, x):
    """e^x of float32 as every kernel computes it."""
    out = torch.empty_like(x)
    ops.library.everstep_exp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    ops.library.everstep_exp(x.data_ptr(), out.data_ptr(), x.numel())
    return out


def block_sums(values):
    """float64 sums of blocks of 512, lane by lane (16), a tree over the lanes."""
    lanes = torch.nn.functional.pad(values.double(), (0, -len(values) % 512)).view(-1, 32, 16)
    total = lanes[:, 0].clone()
    for row in range(1, 32):
        total += lanes[:, row]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0].tolist()


def first_beyond(values, target):
    """Index of the first whose cumulative sum exceeds the target, or the last above zero; and the
    sum before it."""
    total, last, before = 0.0, 0, 0.0
    for index, value in enumerate(values):
        if value <= 0.0:
            continue
        last, before = index, total
        total += value
        if total > target:
            break
    return last, before


@many
@given(
    st.sampled_from([40, 513, 3000, 9001]),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.booleans(),
    st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.02]),
    seeds,
)
def test_a_cut_row_is_summed_and_drawn_in_blocks_however_many_stay(
    ops, vocab, scale, is_rounded, top_p, min_p, seed
):
    logits = random(seed, vocab, scale=scale)
    if is_rounded:
        # ties, of which a border may keep a part
        logits = (logits * 8).round() / 8
    rule = Rule(seed, 5, top_p=top_p, min_p=min_p, wants_kept_ids=True)
    got = ops.sample(logits.unsqueeze(0), [rule])[0]
    e = exps(ops, logits - logits.max())
    *_, whole = accumulate(block_sums(e))
    if got.is_cut:
        stays = torch.zeros(vocab, dtype=torch.bool)
        stays[torch.tensor(got.kept_ids)] = True
        e = e.where(stays, 0.0)
    blocks = block_sums(e)
    *_, mass = accumulate(blocks)
    target = float(native_sampling.uniforms(ops.library, [seed], [5])[0]) * mass
    block, below = first_beyond(blocks, target)
    inside, _ = first_beyond(e[block * 512 : block * 512 + 512].double().tolist(), target - below)
    assert got.token_id == block * 512 + inside
    assert got.kept_mass == pytest.approx(min(mass / whole, 1.0), rel=1e-14)


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("temperature", [0.0, 0.001, 1.0, 100.0])
def test_every_number_is_finite_at_the_extremes(ops, name, temperature):
    logits = torch.tensor([EXTREMES[name]])
    best = int(logits[0].argmax())
    cuts = ({}, {"banned": (best,)}, {"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.9},
            {"banned": (best,), "top_p": 0.9})  # fmt: skip
    for cut in cuts:
        for top in ("raw", "temp", "sampled"):
            rule = Rule(0, 0, temperature=temperature, num_top=4, top_of=top, **ALL, **cut)
            got = ops.sample(logits, [rule])[0]
            assert 0 <= got.token_id < logits.shape[1]
            assert_relations(got)
            if "banned" in cut and logits.shape[1] > 1:
                assert got.token_id != best


@few
@given(st.sampled_from([2, 511, 512, 513, 1025, 1500]), st.sampled_from([0.1, 3.0, 30.0]), seeds)
def test_the_token_rises_with_the_uniform_number(ops, vocab, scale, seed):
    logits = random(seed, vocab, scale=scale)
    weights = torch.exp(reference.log_softmax(logits))
    borders = (weights.cumsum(0) / weights.sum()).tolist()[:: max(1, vocab // 100)]
    us = sorted({min(max(b + d, 0.0), LAST_U) for b in [*borders, 0.0] for d in (-1e-6, 0.0, 1e-6)})
    for cut in ({}, {"top_p": 0.9}):
        tokens = [draw.token_id for draw in drawn_at(ops, logits, us, **cut)]
        assert tokens == sorted(tokens)
    for u, token in zip(us, (d.token_id for d in drawn_at(ops, logits, us)), strict=True):
        below = weights[:token].sum().item()
        assert below - 1e-6 <= u <= below + weights[token].item() + 1e-6


def drawn_at(ops, logits, us, **rule):
    numbers = torch.tensor(us, dtype=torch.float64).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_sampling, "uniforms", lambda *_: numbers)
        return ops.sample(logits.expand(len(us), -1), [Rule(0, 0, **rule)] * len(us))


def test_borders_of_equal_tokens_belong_to_the_upper_one(ops):
    us = [0.0, 1 / 1024, 1 / 1024 - 2.0**-53, 0.5 - 2.0**-53, 0.5, 513 / 1024, LAST_U]
    drawn = drawn_at(ops, torch.zeros(1024), us)
    assert [draw.token_id for draw in drawn] == [0, 1, 0, 511, 512, 513, 1023]


def test_ids_outside_the_support_are_never_drawn(ops):
    logits = random(0, 1100, scale=2.0)
    kept = reference.support(reference.log_softmax(logits).tolist(), Rule(0, 0, top_p=0.6))
    drawn = drawn_at(ops, logits, [0.0, 0.25, 0.5, LAST_U], top_p=0.6)
    assert {draw.token_id for draw in drawn} <= set(kept)
    assert (drawn[0].token_id, drawn[-1].token_id) == (kept[0], kept[-1])


def test_a_ban_may_take_all_the_mass(ops):
    logits = [200.0, 0.0, math.log(3.0)]
    drawn = ops.sample(
        torch.tensor([logits] * 400), [Rule(s, 0, banned=(0,)) for s in range(400)]
    )  # fmt: skip
    assert 0.65 < sum(got.token_id == 2 for got in drawn) / 400 < 0.85
    for got in drawn:
        assert got.lp_sampled == pytest.approx(
            math.log(0.25 if got.token_id == 1 else 0.75), abs=1e-4
        )
        assert got.kept_mass == pytest.approx(4.0 * math.exp(-200.0), rel=1e-4)
    with pytest.raises(ValueError, match="vocabulary of 3"):
        ops.sample(torch.zeros(1, 3), [Rule(0, 0, banned=(3,))])


@pytest.mark.parametrize("vocab", [2, 50, 512, 513, 3000, 49152])
def test_a_draw_does_not_see_the_other_rows(ops, vocab):
    drawn_by = make_rules(21)
    logits = random(vocab, 21, vocab, scale=4.0)
    before = logits.clone()
    with threads(1):
        alone = [ops.sample(logits[i : i + 1], drawn_by[i : i + 1])[0] for i in range(21)]
    for count in (1, 2):
        with threads(count):
            assert ops.sample(logits, drawn_by) == alone
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0)).tolist()
    assert ops.sample(logits[order], [drawn_by[i] for i in order]) == [alone[i] for i in order]
    assert_same_bits(logits, before)


def test_draws_are_those_of_the_torch_level(ops):
    drawn_by = make_rules(70)
    logits = random(1, 70, 3000, scale=3.0)
    for got, expected in zip(ops.sample(logits, drawn_by), sample(logits, drawn_by), strict=True):
        assert (got.token_id, got.kept_ids, got.is_cut) == (
            expected.token_id, expected.kept_ids, expected.is_cut,
        )  # fmt: skip
        assert got.lp_sampled == pytest.approx(expected.lp_sampled, abs=1e-5)
        assert got.lp_temp == pytest.approx(expected.lp_temp, abs=1e-5)


def test_no_rows_give_no_draws(ops):
    assert ops.sample(torch.zeros(0, 600), []) == []
