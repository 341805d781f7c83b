"""RMSNorm with the published casts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import reference
from everstep.kernels.norm import rms_norm

from ..tolerances import assert_close
from .draws import (
    DTYPES,
    assert_same_bits,
    dtypes,
    few,
    folded,
    many,
    random,
    seeds,
    sizes,
    strided,
)


@many
@given(
    st.sampled_from([(0,), (1,), (7,), (3, 2)]),
    sizes,
    dtypes,
    st.sampled_from([1e-6, 1e-5, 0.5]),
    st.sampled_from([1e-3, 1.0, 100.0]),
    seeds,
)
def test_rms_norm_is_the_definition(rows, n, dtype, eps, scale, seed):
    x, weight = random(seed, *rows, n, dtype=dtype, scale=scale), random(seed + 1, n, dtype=dtype)
    assert_close(rms_norm(x, weight, eps), reference.rms_norm(x, weight, eps))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_before_it_multiplies_by_the_weight(dtype):
    x, weight = random(1, 100, 257, dtype=dtype), random(2, 257, dtype=dtype)
    assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@few
@given(sizes, seeds)
def test_the_mean_is_summed_in_the_order_of_the_tree(n, seed):
    x = random(seed, 3, n)
    mean = torch.stack([folded(row) for row in x * x]) / n
    expected = x * torch.rsqrt(mean + 1e-6).unsqueeze(-1)
    assert_same_bits(rms_norm(x, torch.ones(n), 1e-6), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_row_stays_zero(dtype):
    out = rms_norm(torch.zeros(2, 9, dtype=dtype), torch.ones(9, dtype=dtype), 1e-6)
    assert torch.equal(out, torch.zeros(2, 9, dtype=dtype))


def test_eps_is_added_to_the_mean_and_not_to_the_sum():
    out = rms_norm(torch.ones(1, 4), torch.ones(4), 3.0)
    assert torch.equal(out, torch.full((1, 4), 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_the_same_bits(dtype):
    x, weight = random(1, 9, 3, 65, dtype=dtype), random(2, 65, dtype=dtype)
    assert_same_bits(rms_norm(strided(x), strided(weight), 1e-6), rms_norm(x, weight, 1e-6))
    # a head's slice of fused q, k, v
    fused = random(3, 9, 5 * 65, dtype=dtype)
    heads = fused[:, 65 : 4 * 65].view(9, 3, 65)
    assert_same_bits(rms_norm(heads, weight, 1e-6), rms_norm(heads.contiguous(), weight, 1e-6))
