"""Group-limited routing: who is chosen, in which order, with which weights."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from everstep.kernels import reference
from everstep.kernels.router import route

from ..tolerances import assert_close
from .draws import DTYPES, assert_same_bits, many, misaligned, poisoned, random, seeds, strided  # noqa: F401

# (experts, groups, groups kept, experts per token)
SHAPES = [
    (1, 1, 1, 1),
    (4, 1, 1, 4),
    (5, 1, 1, 2),
    (8, 4, 1, 2),
    (8, 4, 2, 3),
    (12, 2, 1, 6),
    (16, 2, 2, 1),
    (64, 8, 4, 8),
]


def make_router(seed, hidden, shape, twins):
    """A gate and a bias; with `twins` some experts, and some whole groups, equal each other."""
    experts, groups, _, _ = shape
    gate, bias = random(seed, experts, hidden), random(seed + 1, experts, scale=0.2)
    if twins:
        generator = torch.Generator().manual_seed(seed)
        size = experts // groups
        for _ in range(experts // 2):
            a, b = torch.randint(experts, (2,), generator=generator).tolist()
            gate[a], bias[a] = gate[b], bias[b]
        for _ in range(groups // 2):
            a, b = (torch.randint(groups, (2,), generator=generator) * size).tolist()
            gate[a : a + size], bias[a : a + size] = gate[b : b + size], bias[b : b + size]
    return gate, bias


def options(shape, scaling=2.5):
    return {"n_group": shape[1], "topk_group": shape[2], "top_k": shape[3], "scaling": scaling}


def are_decided(x, gate, bias, shape):
    """Whether unequal scores differ by more than float32 rounding."""
    choice = torch.sigmoid(x.double() @ gate.double().t()) + bias.double()
    best = choice.view(-1, shape[1], shape[0] // shape[1]).sort(dim=-1, descending=True).values
    groups = best[..., :2].sum(-1)
    return all(
        not ((gaps > 1e-13) & (gaps < 1e-6)).any()
        for gaps in (scores.sort(dim=-1).values.diff(dim=-1) for scores in (choice, groups))
    )


@many
@given(
    st.integers(0, 9),
    st.sampled_from([1, 3, 16, 65]),
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([0.0, -3.0, 3.0]),
    seeds,
)
def test_route_is_the_definition_ties_included(tokens, hidden, shape, dtype, twins, center, seed):
    x = random(seed + 2, tokens, hidden, dtype=dtype)
    gate, bias = make_router(seed, hidden, shape, twins)
    bias += center
    assume(are_decided(x, gate, bias, shape))
    ids, weights = route(x, gate, bias, **options(shape))
    expected_ids, expected = reference.route(x, gate, bias, **options(shape))
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    assert_close(weights, expected, torch.tensor(2.5))


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_logits_choose_the_lowest_experts_in_order(shape):
    ids, weights = route(
        torch.ones(3, 4), torch.zeros(shape[0], 4), torch.zeros(shape[0]), **options(shape, 1.0)
    )
    assert ids.tolist() == [list(range(shape[3]))] * 3
    assert_close(weights, torch.full((3, shape[3]), 1.0 / shape[3] if shape[3] > 1 else 0.5))


def test_slots_are_ordered_by_the_biased_score_and_weighed_without_the_bias():
    gate = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
    bias = torch.tensor([0.0, 1.0, 0.0, 2.0])
    ids, weights = route(
        torch.ones(1, 1), gate, bias, top_k=3, n_group=1, topk_group=1, scaling=1.0
    )
    assert ids.tolist() == [[3, 1, 0]]
    p = torch.sigmoid(torch.tensor([-1.0, 1.0, 2.0]))
    assert_close(weights[0], p / p.sum())


def test_one_expert_per_token_is_not_normalised():
    gate = torch.tensor([[0.5], [-0.5]])
    _, weights = route(
        torch.ones(1, 1), gate, torch.zeros(2), top_k=1, n_group=1, topk_group=1, scaling=2.5
    )
    assert_close(weights[0], torch.sigmoid(torch.tensor([0.5])) * 2.5)


def test_a_group_counts_by_its_two_best():
    # group 0 has the best expert, group 1 the two best together
    bias = torch.tensor([0.9, 0.0, 0.6, 0.6])
    ids, _ = route(
        torch.ones(1, 1), torch.zeros(4, 1), bias, top_k=2, n_group=2, topk_group=1, scaling=1.0
    )
    assert ids.tolist() == [[2, 3]]


def test_a_masked_group_stays_out_when_all_scores_are_negative():
    # masked with 0 instead of -inf, the experts of group 0 would win
    bias = torch.tensor([-9.0, -9.0, -9.0, -3.0, -4.0, -5.0])
    ids, _ = route(
        torch.ones(1, 1), torch.zeros(6, 1), bias, top_k=3, n_group=2, topk_group=1, scaling=1.0
    )
    assert ids.tolist() == [[3, 4, 5]]


def test_underflown_scores_give_zero_weights():
    gate = torch.full((4, 1), -200.0)
    ids, weights = route(
        torch.ones(1, 1), gate, torch.zeros(4), top_k=2, n_group=1, topk_group=1, scaling=2.5
    )
    assert ids.tolist() == [[0, 1]]
    assert torch.equal(weights, torch.zeros(1, 2))


def test_saturated_scores_tie_and_the_lower_expert_wins():
    gate = torch.tensor([[20.0], [40.0], [30.0]])
    ids, _ = route(
        torch.ones(1, 1), gate, torch.zeros(3), top_k=2, n_group=1, topk_group=1, scaling=1.0
    )
    assert ids.tolist() == [[0, 1]]


@many
@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), seeds)
def test_forced_experts_get_the_weights_of_their_scores(shape, dtype, seed):
    x, (gate, bias) = random(seed, 5, 16, dtype=dtype), make_router(seed, 16, shape, False)
    generator = torch.Generator().manual_seed(seed)
    forced = torch.rand(5, shape[0], generator=generator).argsort(dim=-1)[:, : shape[3]]
    ids, weights = route(x, gate, bias, forced_ids=forced, **options(shape))
    assert torch.equal(ids, forced)
    _, expected = reference.route(x, gate, bias, forced_ids=forced, **options(shape))
    assert_close(weights, expected, torch.tensor(2.5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_routing_replay_of_the_own_choice_has_the_same_bits(shape, dtype):
    x, (gate, bias) = random(0, 9, 33, dtype=dtype), make_router(1, 33, shape, True)
    ids, weights = route(x, gate, bias, **options(shape))
    again = route(x, gate, bias, forced_ids=ids, **options(shape))
    assert_same_bits(again[1], weights)


def test_router_logits_are_not_rounded_to_bf16():
    # 1 + 2^-12 is no bf16: rounded, both logits are 1 and expert 0 wins
    gate = torch.tensor([[1.0], [1.0 + 2.0**-12]])
    ids, _ = route(
        torch.ones(1, 1, dtype=torch.bfloat16), gate, torch.zeros(2),
        top_k=1, n_group=1, topk_group=1, scaling=1.0,
    )  # fmt: skip
    assert ids.tolist() == [[1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_the_same_bits(dtype):
    x, (gate, bias) = random(0, 9, 33, dtype=dtype), make_router(1, 33, SHAPES[-1], False)
    ids, weights = route(x, gate, bias, **options(SHAPES[-1]))
    for other in (strided(x), misaligned(x)):
        again = route(other, gate, bias, **options(SHAPES[-1]))
        assert torch.equal(again[0], ids)
        assert_same_bits(again[1], weights)
