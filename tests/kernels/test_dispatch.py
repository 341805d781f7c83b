"""The operations as the engine calls them, at every level (../levels.py)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep import kernels
from everstep.kernels import Weight, reference
from everstep.kernels.packed import PackedWeight

from ..levels import LEVELS, SUFFIX, use_level
from .draws import assert_same_bits, dtypes, few, make_weight, random, seeds, threads
from .test_experts import assert_experts_close, make_experts, make_routes, terms_of

FORMATS = ("plain", "block", "channel", "block-group", "channel-token")


@pytest.fixture(params=LEVELS)
def level(request):
    with use_level(request.param):
        yield request.param


def bank_of(layers):
    gate, up, down = layers
    pairs = [kernels.prepare_gate_up(g, u) for g, u in zip(gate, up, strict=True)]
    return kernels.prepare_experts(pairs, [kernels.prepare(d) for d in down])


@pytest.mark.parametrize("name", LEVELS)
@few
@given(
    st.integers(1, 20),
    st.sampled_from([(1, 1), (3, 2), (8, 4), (9, 9)]),
    st.sampled_from([(16, 16), (33, 17), (128, 40), (130, 65)]),
    dtypes,
    st.sampled_from(FORMATS),
    seeds,
)
def test_experts_are_the_definition(name, tokens, shape, sizes, dtype, kind, seed):
    hidden, width = sizes
    x = random(seed, tokens, hidden, dtype=dtype)
    layers = make_experts(kind, shape[0], hidden, width, dtype, seed)
    routes = make_routes(tokens, *shape, seed)
    with use_level(name):
        actual = kernels.experts(x, *routes, bank_of(layers))
    expected = reference.experts(x, *routes, *layers)
    assert_experts_close(actual, expected, terms_of(x, routes, layers), kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_experts_of_a_token_do_not_see_the_others(level, kind, dtype):
    x = random(1, 37, 96, dtype=dtype)
    bank = bank_of(make_experts(kind, 6, 96, 48, dtype))
    ids, weights = make_routes(37, 6, 3)
    with threads(1):
        whole = kernels.experts(x, ids, weights, bank)
        alone = [
            kernels.experts(x[i : i + 1], ids[i : i + 1], weights[i : i + 1], bank)
            for i in range(37)
        ]
    with threads(2):
        order = torch.randperm(37, generator=torch.Generator().manual_seed(2))
        shuffled = kernels.experts(x[order], ids[order], weights[order], bank)
    assert_same_bits(torch.cat(alone), whole)
    assert_same_bits(shuffled, whole[order])


def test_experts_held_and_experts_read_one_by_one_give_the_same_bits(level):
    x, (ids, weights) = random(3, 9, 64, dtype=torch.bfloat16), make_routes(9, 5, 2)
    bank = bank_of(make_experts("plain", 5, 64, 32, torch.bfloat16))
    streamed = kernels.ExpertBank(bank.gate_ups, bank.downs)
    assert (bank.table is None) == (level == "torch")
    assert_same_bits(
        kernels.experts(x, ids, weights, streamed), kernels.experts(x, ids, weights, bank)
    )


def test_a_head_keeps_its_float32_sums(level):
    head = random(1, 50, 64, dtype=torch.bfloat16, scale=0.2)
    x = random(2, 7, 64, dtype=torch.bfloat16)
    logits = kernels.project(x, kernels.prepare_head(head))
    expected = x.double() @ head.double().t()
    assert logits.dtype == torch.float32
    assert (logits.double() - expected).abs().max() < 1e-5
    assert (logits.double() - expected.bfloat16().double()).abs().max() > 1e-3


def test_weights_take_the_levels_form_and_w8a8_stays_with_torch(level):
    plain = kernels.prepare(make_weight("plain", 32, 32, torch.bfloat16))
    w8a8 = kernels.prepare(make_weight("block-group", 128, 128, torch.bfloat16))
    assert isinstance(plain, Weight if level == "torch" else PackedWeight)
    assert isinstance(w8a8, Weight)


def test_the_level_is_named_and_explained(level):
    name = level.removesuffix(SUFFIX)
    assert kernels.level_name() == name
    assert kernels.explain()["level"].startswith(name)


def test_a_gate_and_an_up_of_different_formats_still_make_an_mlp(level):
    gate = make_weight("block", 48, 128, torch.bfloat16)
    up = make_weight("plain", 48, 128, torch.bfloat16)
    x = random(1, 5, 128, dtype=torch.bfloat16)
    actual = kernels.gate_up(x, kernels.prepare_gate_up(gate, up))
    expected = reference.swiglu(reference.linear(x, gate), reference.linear(x, up))
    assert (actual.double() - expected.double()).abs().max() < 0.05


def test_prepared_weights_do_not_alias_what_they_were_made_of(level):
    data = random(1, 32, 32, dtype=torch.float32)
    x, prepared = random(2, 3, 32), kernels.prepare(Weight(data, torch.float32))
    before = kernels.linear(x, prepared).clone()
    data.zero_()
    assert_same_bits(kernels.linear(x, prepared), before)
