"""Rotary embedding: halves paired, d_r of D dimensions, and the tables of the engine."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import reference
from everstep.kernels.rope import apply_rope

from .draws import DTYPES, assert_same_bits, dtypes, many, poisoned, random, seeds, strided  # noqa: F401


def tables(seed, tokens, half, dtype=torch.float32):
    angle = random(seed, tokens, half, scale=3.0)
    return torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)


@many
@given(
    st.integers(0, 9),
    st.integers(1, 5),
    st.sampled_from([1, 2, 5, 32]),
    st.sampled_from([0, 1, 3, 64]),
    dtypes,
    st.booleans(),
    seeds,
)
def test_rope_is_the_definition_to_the_bit(tokens, heads, half, rest, dtype, is_model_table, seed):
    x = random(seed, tokens, heads, 2 * half + rest, dtype=dtype)
    cos, sin = tables(seed + 1, tokens, half, dtype if is_model_table else torch.float32)
    assert_same_bits(apply_rope(x, cos, sin), reference.apply_rope(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dimensions_beyond_the_rotary_part_pass_unchanged(dtype):
    x = random(0, 4, 3, 12, dtype=dtype)
    out = apply_rope(x, *tables(1, 4, 3))
    assert_same_bits(out[..., 6:], x[..., 6:])
    assert (out[..., :6] != x[..., :6]).any()


def test_a_quarter_turn_moves_the_first_half_to_the_second():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]])
    out = apply_rope(x, torch.zeros(1, 2), torch.ones(1, 2))
    assert out.tolist() == [[[-3.0, -4.0, 1.0, 2.0, 5.0]]]


def test_scores_depend_on_the_distance_of_positions_only():
    q, k = random(0, 1, 1, 8).double(), random(1, 1, 1, 8).double()
    speed = torch.tensor([[1.0, 0.3, 0.1, 0.01]], dtype=torch.float64)

    def turned(x, position):
        return apply_rope(x, torch.cos(speed * position), torch.sin(speed * position))

    near = (turned(q, 7) * turned(k, 3)).sum().item()
    far = (turned(q, 1007) * turned(k, 1003)).sum().item()
    assert math.isclose(near, far, rel_tol=1e-9)


def test_float32_tables_round_a_bf16_once():
    # 1·cos − 1·sin = 2^-9 needs the digits that a bf16 table would not have
    x = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    cos, sin = torch.tensor([[0.5 + 2.0**-9]]), torch.tensor([[0.5]])
    assert apply_rope(x, cos, sin)[0, 0, 0].item() == 2.0**-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_the_same_bits(dtype):
    x, (cos, sin) = random(0, 5, 3, 10, dtype=dtype), tables(1, 5, 4)
    expected = apply_rope(x, cos, sin)
    assert_same_bits(apply_rope(strided(x), strided(cos), strided(sin)), expected)
