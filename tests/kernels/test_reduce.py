"""The trees: every term once, in an order that the length alone fixes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels.reduce import pairwise_sum, tree_sum

from ..tolerances import assert_close
from .draws import assert_same_bits, few, folded, many, poisoned, random, seeds, strided  # noqa: F401


def neighbours(values):
    values = list(values)
    while len(values) > 1:
        values = [values[i] + values[i + 1] for i in range(0, len(values), 2)]
    return values[0]


@many
@given(st.integers(1, 300), seeds)
def test_tree_sum_folds_the_upper_half_onto_the_lower(n, seed):
    x = random(seed, 3, n)
    assert_same_bits(tree_sum(x), torch.stack([folded(row) for row in x]))
    assert_close(tree_sum(x), x.double().sum(-1).float(), x.double().abs().sum(-1))


@few
@given(st.integers(0, 8), seeds)
def test_pairwise_sum_adds_neighbours(exponent, seed):
    x = random(seed, 3, 2**exponent)
    assert_same_bits(pairwise_sum(x), torch.stack([neighbours(row) for row in x]))


@few
@given(st.integers(0, 6), st.integers(0, 4), seeds)
def test_zeros_appended_do_not_change_a_pairwise_sum(exponent, more, seed):
    x = random(seed, 3, 2**exponent)
    padded = torch.nn.functional.pad(x, (0, 2 ** (exponent + more) - 2**exponent))
    assert_same_bits(pairwise_sum(padded), pairwise_sum(x))


@pytest.mark.parametrize("n", [3, 6, 63])
def test_pairwise_sum_refuses_a_length_that_is_no_power_of_two(n):
    with pytest.raises(ValueError, match=str(n)):
        pairwise_sum(torch.zeros(2, n))


@few
@given(st.integers(1, 130), seeds)
def test_sums_leave_their_input_alone_and_take_any_strides(n, seed):
    x = random(seed, 4, n)
    before = x.clone()
    expected = tree_sum(x)
    assert_same_bits(x, before)
    assert_same_bits(tree_sum(strided(x)), expected)
    assert_same_bits(tree_sum(x.t().contiguous().t()), expected)
    assert_same_bits(tree_sum(x.unsqueeze(1).expand(4, 3, n)), expected.unsqueeze(1).expand(4, 3))
