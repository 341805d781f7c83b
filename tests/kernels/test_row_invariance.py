"""The bits of a row depend on that row alone: batch, place, order, chunking and threads are free.

Rows computed one at a time by one thread are compared with the same rows in company, by one
thread and by two, with the products that the probes choose here and with those that are left
where the probes refuse everything.
"""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import Rule, gemm, reference
from everstep.kernels.activation import sigmoid, swiglu
from everstep.kernels.experts import experts
from everstep.kernels.gemm import linear
from everstep.kernels.norm import rms_norm
from everstep.kernels.rope import apply_rope
from everstep.kernels.router import route
from everstep.kernels.sampling import log_softmax, sample

from ..tolerances import assert_close
from .draws import (
    DTYPES,
    FORMATS,
    NAN,
    assert_same_bits,
    bits,
    few,
    make_weight,
    misaligned,
    random,
    seeds,
    threads,
)
from .test_attention import HEADS, make_paged
from .test_experts import make_experts, make_routes

# fills every tile size, with a rest
ROWS = 256 + 64 + 16 + 5
# rows where the library is called for each: no tile to fill
FEW_ROWS = 37


def refuse_all(monkeypatch):
    """As on a machine where no product holds its bits."""
    monkeypatch.setattr(gemm, "PLAN", gemm.TilePlan())
    monkeypatch.setattr(gemm, "ITEMS", gemm.ItemPlan())
    monkeypatch.setattr(gemm, "probe", lambda w: (1,))
    monkeypatch.setattr(gemm, "probe_items", lambda *shape: False)


@pytest.fixture(params=["probed", "refused"])
def rows(request, monkeypatch):
    """How many rows to try; with `refused` the probes refuse everything."""
    if request.param == "probed":
        return ROWS
    refuse_all(monkeypatch)
    return FEW_ROWS


def assert_rows_are_alone(operation, *inputs):
    """`operation` maps tensors with a row per first index to a tuple of such tensors."""
    count = inputs[0].shape[0]
    generator = torch.Generator().manual_seed(count)
    some = torch.randperm(count, generator=generator)[:12].tolist()

    def of(rows):
        return operation(*(x[rows] for x in inputs))

    with threads(1):
        alone = [of(slice(i, i + 1)) for i in some]
        whole = operation(*inputs)

    def check(results, places):
        for result, *expected in zip(results, *alone, strict=True):
            assert_same_bits(result[places], torch.cat(expected))

    check(whole, some)
    # by two threads
    with threads(2):
        check(operation(*inputs), some)
    # in any order
    order = torch.randperm(count, generator=generator)
    check(of(order), order.argsort()[some])
    # any number of them, from any place on
    for first, n in [
        (0, 2),
        (1, 15),
        (0, 16),
        (3, 17),
        (2, 63),
        (0, 64),
        (7, 79),
        (1, 257),
        (9, 320),
    ]:
        for part, expected in zip(of(slice(first, first + n)), whole, strict=True):
            assert_same_bits(part, expected[first : first + n])
    # at any address
    check(operation(*(misaligned(x) for x in inputs)), some)
    # among rows that hold no number
    spoiled = torch.ones(count, dtype=torch.bool)
    spoiled[some] = False
    others = [x.clone() for x in inputs]
    for x in others:
        if x.is_floating_point():
            x[spoiled] = NAN
    check(operation(*others), some)


# -- rows of one tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_linear_rows_do_not_see_each_other(kind, dtype, rows):
    for n, k in [(40, 130), (65, 257)]:
        weight = make_weight(kind, n, k, dtype)
        x = random(0, rows, k, dtype=dtype)
        assert_rows_are_alone(lambda x, w=weight: (linear(x, w),), x)


@few
@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from(DTYPES), seeds)
def test_linear_rows_do_not_see_each_other_for_any_shape(n, k, dtype, seed):
    weight = make_weight("plain", n, k, dtype, seed)
    x = random(seed, ROWS, k, dtype=dtype)
    whole = linear(x, weight)
    for first, count in [(0, 1), (3, 1), (255, 1), (340, 1), (5, 17), (60, 70), (1, 300)]:
        assert_same_bits(linear(x[first : first + count], weight), whole[first : first + count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 576), (1, 2048), (2048, 1), (1536, 300)])
def test_linear_rows_do_not_see_each_other_at_real_sizes(shape, dtype):
    weight = make_weight("plain", *shape, dtype)
    x = random(0, ROWS, shape[1], dtype=dtype)
    with threads(1):
        alone = torch.cat([linear(x[i : i + 1], weight) for i in (0, 100, 340)])
    for count in (1, 2):
        with threads(count):
            for n in (1, 2, 33, ROWS):
                places = [i for i in (0, 100, 340) if i < n]
                assert_same_bits(linear(x[:n], weight)[places], alone[: len(places)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_rope_and_activation_rows_do_not_see_each_other(dtype):
    for width in (1, 17, 130, 1030):
        x, up = random(0, ROWS, width, dtype=dtype), random(1, ROWS, width, dtype=dtype)
        weight = random(2, width, dtype=dtype)
        assert_rows_are_alone(lambda x, w=weight: (rms_norm(x, w, 1e-6),), x)
        assert_rows_are_alone(lambda x, up: (swiglu(x, up), sigmoid(x.float())), x, up)
    for heads, d, half in [(1, 2, 1), (3, 10, 4), (4, 64, 32)]:
        x, angle = random(0, ROWS, heads, d, dtype=dtype), random(1, ROWS, half)
        for tables in (torch.float32, torch.bfloat16):
            cos, sin = torch.cos(angle).to(tables), torch.sin(angle).to(tables)
            assert_rows_are_alone(lambda *parts: (apply_rope(*parts),), x, cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_activation_does_not_see_its_place(dtype):
    # a library's vector tail may round otherwise than its body
    x, up = random(0, 1, 5000, dtype=dtype, scale=5.0), random(1, 1, 5000, dtype=dtype)
    whole = swiglu(x, up)
    for first in range(40):
        for part in [slice(first, first + n) for n in (1, 3, 15, 17)] + [slice(4960 + first, 5000)]:
            assert_same_bits(swiglu(x[:, part], up[:, part]), whole[:, part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_routes_of_a_token_do_not_see_the_others(dtype, rows):
    gate, bias = random(0, 32, 129), random(1, 32, scale=0.1)
    gate[5] = gate[9]

    def choose(x):
        return route(x, gate, bias, top_k=4, n_group=4, topk_group=2, scaling=2.5)

    assert_rows_are_alone(choose, random(2, rows, 129, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "bias", "block-group", "channel-token"])
def test_expert_outputs_of_a_token_do_not_see_the_others(kind, dtype, rows):
    layers = make_experts(kind, 5, 33, 20, dtype)
    ids, weights = make_routes(rows, 5, 3)
    # one expert takes most tokens, one none
    ids[ids == 4] = 0
    x = random(0, rows, 33, dtype=dtype)
    assert_rows_are_alone(lambda *parts: (experts(*parts, *layers),), x, ids, weights)


def test_log_softmax_rows_do_not_see_each_other():
    for vocab in (1, 63, 1000):
        assert_rows_are_alone(lambda x: (log_softmax(x),), random(0, ROWS, vocab, scale=5.0))
    x = random(1, 3, 151_000, scale=5.0)
    with threads(1):
        alone = torch.cat([log_softmax(row) for row in x.split(1)])
    with threads(2):
        assert_same_bits(log_softmax(x), alone)


# -- attention


def chunked(lengths, seed):
    """A random schedule: steps of (rollout, start, length), each rollout in its own order."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n):
        return int(torch.randint(n, (1,), generator=generator))

    done, steps = [0] * len(lengths), []
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        waiting = [i for i, n in enumerate(lengths) if done[i] < n]
        order = torch.randperm(len(waiting), generator=generator)
        step = []
        for i in [waiting[j] for j in order.tolist()[: 1 + pick(len(waiting))]]:
            left = lengths[i] - done[i]
            # decode steps, short chunks, and what is left
            n = min(left, (1, 1, 1 + pick(20), 1 + pick(left))[pick(4)])
            step.append((i, done[i], n))
            done[i] += n
        steps.append(step)
    return steps


def assert_schedules_agree(lengths, heads, dtype, block_size, seed):
    """Each rollout prefilled alone, against a random schedule in other blocks."""
    paged = make_paged(lengths, heads, dtype, block_size, seed)
    with threads(1):
        alone = [paged.step([(i, 0, n)], paged.kernel)[0] for i, n in enumerate(lengths)]
    paged.tables = make_paged(lengths, heads, dtype, block_size, seed + 1).tables
    for count, steps in ((1, chunked(lengths, seed)), (2, chunked(lengths, seed + 1))):
        parts = [[] for _ in lengths]
        with threads(count):
            for step in steps:
                for (i, _, _), out in zip(step, paged.step(step, paged.kernel), strict=True):
                    parts[i].append(out)
        for own, expected in zip(parts, alone, strict=True):
            assert_same_bits(torch.cat(own), expected)


@few
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=4),
    st.sampled_from(HEADS),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 16, 64]),
    seeds,
)
def test_attention_of_a_token_does_not_see_the_schedule(lengths, heads, dtype, block_size, seed):
    assert_schedules_agree(lengths, heads, dtype, block_size, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2, 16), (5, 1, 7)])
def test_attention_by_elementwise_products_does_not_see_the_schedule(heads, dtype, monkeypatch):
    refuse_all(monkeypatch)
    assert_schedules_agree([70, 1, 13], heads, dtype, 16, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_has_the_bits_of_prefill_over_many_blocks(dtype):
    # 1, 2, 4, 8 and 16 key blocks, and their borders
    paged = make_paged([600], (2, 1, 32), dtype, seed=5)
    with threads(2):
        whole = paged.step([(0, 0, 600)], paged.kernel)[0]
    for position in (0, 1, 62, 63, 64, 65, 127, 128, 191, 255, 256, 511, 512, 599):
        out = paged.step([(0, position, 1)], paged.kernel)[0]
        assert_same_bits(out, whole[position : position + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_batch_has_the_bits_of_each_rollout_alone(dtype):
    # far more items in one batched product than the probe has tried
    paged = make_paged([65] * 150, (4, 4, 16), dtype, seed=6)
    shares = [(i, 64, 1) for i in range(150)]
    for count in (1, 2):
        with threads(count):
            together = paged.step(shares, paged.kernel)
        for i in (0, 1, 77, 149):
            assert_same_bits(together[i], paged.step([shares[i]], paged.kernel)[0])


def test_attention_does_not_see_how_many_tiles_fit_in_memory(monkeypatch):
    paged = make_paged([150, 20], (4, 2, 16), torch.bfloat16)
    shares = [(0, 0, 150), (1, 0, 20)]
    whole = paged.step(shares, paged.kernel)
    module = importlib.import_module("everstep.kernels.attention")
    monkeypatch.setattr(module, "WORKING_SET", 1)
    for part, expected in zip(paged.step(shares, paged.kernel), whole, strict=True):
        assert_same_bits(part, expected)


# -- what is left where every product is refused is still the definition


def test_attention_by_elementwise_products_is_the_definition(monkeypatch):
    paged = make_paged([90], (4, 2, 16))
    refuse_all(monkeypatch)
    out, expected = (paged.step([(0, 0, 90)], f)[0] for f in (paged.kernel, paged.definition))
    assert set(gemm.ITEMS.is_safe.values()) == {False}
    assert_close(out, expected, 4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_linear_row_by_row_is_the_definition(kind, dtype, monkeypatch):
    refuse_all(monkeypatch)
    x, weight = random(0, 33, 129, dtype=dtype), make_weight(kind, 20, 129, dtype)
    out = linear(x, weight)
    assert set(gemm.PLAN.tiles.values()) == {(1,)}
    assert_close(out, reference.linear(x, weight), torch.tensor(10.0))


# -- sampling

RULES = [
    {},
    {"temperature": 0.7, "top_p": 0.8},
    {"top_k": 5, "min_p": 0.05},
    {"temperature": 0.0, "banned": (1,)},
    {"temperature": 1.3, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.3},
    {"logit_bias": {0: 3.0}, "num_top": 3, "top_of": "sampled", "top_k": 2},
    {"wants_raw": True, "wants_entropy": True, "wants_kept_ids": True, "top_p": 0.5, "num_top": 2},
]  # fmt: skip


def make_rules(count):
    return [
        Rule(seed=i * 7, position=i % 5, prompt_ids=(0, 0), output_ids=(0,) * (i % 3), **RULES[i % len(RULES)])
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("vocab", [2, 50, 512, 513, 3000])
def test_a_draw_does_not_see_the_other_rows(vocab):
    rules = make_rules(21)
    logits = random(vocab, 21, vocab, scale=4.0)
    before = logits.clone()
    with threads(1):
        alone = [sample(logits[i : i + 1], rules[i : i + 1])[0] for i in range(21)]
    for count in (1, 2):
        with threads(count):
            assert sample(logits, rules) == alone
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0)).tolist()
    assert sample(logits[order], [rules[i] for i in order]) == [alone[i] for i in order]
    for first, n in [(0, 2), (5, 7), (20, 1)]:
        part = slice(first, first + n)
        assert sample(logits[part], rules[part]) == alone[part]
    assert torch.equal(bits(logits), bits(before))


def test_a_draw_over_a_large_vocabulary_does_not_see_the_threads():
    rules = make_rules(7)
    logits = random(3, 7, 151_000, scale=4.0)
    with threads(1):
        alone = [sample(logits[i : i + 1], rules[i : i + 1])[0] for i in (0, 1, 6)]
    with threads(2):
        drawn = sample(logits, rules)
    assert [drawn[i] for i in (0, 1, 6)] == alone
