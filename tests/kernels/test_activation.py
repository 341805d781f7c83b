"""SwiGLU with the published casts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import reference
from everstep.kernels.activation import sigmoid, swiglu

from ..tolerances import assert_close
from .draws import (
    DTYPES,
    assert_same_bits,
    dtypes,
    few,
    many,
    random,
    seeds,
    sizes,
    strided,
)

EDGES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    20.0,
    -20.0,
    80.0,
    -80.0,
    100.0,
    -100.0,
    1e4,
    -1e4,
    1e-30,
    -1e-30,
    1e30,
    -1e30,
]


@many
@given(st.integers(0, 20), sizes, dtypes, st.sampled_from([0.1, 1.0, 10.0]), seeds)
def test_swiglu_is_the_definition(rows, n, dtype, scale, seed):
    gate, up = (random(seed + i, rows, n, dtype=dtype, scale=scale) for i in range(2))
    assert_close(swiglu(gate, up), reference.swiglu(gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_rounds_silu_before_it_multiplies(dtype):
    # enough elements for a cast in another place to show as more unequal ones than allowed
    gate, up = random(1, 50, 400, dtype=dtype), random(2, 50, 400, dtype=dtype)
    assert_close(swiglu(gate, up), reference.swiglu(gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_finite_at_the_edges(dtype):
    gate = torch.tensor([EDGES], dtype=dtype)
    up = torch.ones_like(gate)
    assert_close(swiglu(gate, up), reference.swiglu(gate, up), gate.double().abs())


@few
@given(sizes, seeds)
def test_sigmoid_is_the_definition(n, seed):
    x = torch.cat([random(seed, n, scale=5.0), torch.tensor(EDGES)])
    assert_close(sigmoid(x), reference.sigmoid(x), torch.zeros(()))
    assert sigmoid(torch.zeros(1)).item() == 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_the_same_bits(dtype):
    gate, up = random(1, 9, 65, dtype=dtype), random(2, 9, 65, dtype=dtype)
    assert_same_bits(swiglu(strided(gate), strided(up)), swiglu(gate, up))
