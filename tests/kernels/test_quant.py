"""FP8 quantisers against the definition in float64 numpy (MODEL.md §2.3)."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.kernels.quant import (
    block_amax,
    block_codes,
    block_scale,
    dequantize_block,
    dequantize_channel,
    quantize_activations_group,
    quantize_activations_token,
    quantize_block,
    quantize_channel,
)

from ..fp8_reference import block_reference, f32, to_e4m3


def random_matrix(rows: int, columns: int, seed: int, spread: float) -> torch.Tensor:
    """Values of very different sizes, with an exact zero row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = x * torch.exp(spread * torch.randn(rows, 1, generator=generator))
    x[seed % rows] = 0.0
    return x


matrices = st.builds(
    random_matrix,
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1.0, 5.0]),
)


@settings(deadline=None, max_examples=30)
@given(weight=matrices, power_of_two=st.booleans())
def test_block_quantiser_is_the_definition_to_the_bit(weight, power_of_two):
    qdata, scale = quantize_block(weight, power_of_two=power_of_two)
    q, s = block_reference(weight.numpy(), power_of_two=power_of_two)
    assert qdata.dtype == torch.float8_e4m3fn
    assert np.array_equal(scale.numpy(), s)
    assert np.array_equal(qdata.float().numpy(), f32(q))


@settings(deadline=None, max_examples=30)
@given(
    weight=matrices,
    power_of_two=st.booleans(),
    cuts=st.tuples(*[st.lists(st.integers(1, 299), max_size=3)] * 2),
)
def test_parts_of_a_weight_that_cut_blocks_give_the_codes_of_the_whole(weight, power_of_two, cuts):
    edges = [
        sorted({0, size, *(cut for cut in own if cut < size)})
        for size, own in zip(weight.shape, cuts, strict=True)
    ]
    tiles = list(itertools.product(*map(itertools.pairwise, edges)))
    qdata, whole_scale = quantize_block(weight, power_of_two=power_of_two)
    amax = torch.zeros(whole_scale.shape)
    for (top, bottom), (left, right) in tiles:
        own = block_amax(weight[top:bottom, left:right], (top, left))
        cells = np.s_[top // 128 : -(-bottom // 128), left // 128 : -(-right // 128)]
        amax[cells] = torch.maximum(amax[cells], own)
    scale = block_scale(amax, power_of_two=power_of_two)
    assert torch.equal(scale, whole_scale)
    for (top, bottom), (left, right) in tiles:
        cells = np.s_[top // 128 : -(-bottom // 128), left // 128 : -(-right // 128)]
        codes = block_codes(weight[top:bottom, left:right], scale[cells], (top, left))
        expected = qdata[top:bottom, left:right]
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
        back = dequantize_block(codes, scale[cells], torch.float32, (top, left))
        whole = dequantize_block(qdata, scale, torch.float32)
        assert torch.equal(back, whole[top:bottom, left:right])


@settings(deadline=None, max_examples=30)
@given(x=matrices)
def test_activation_groups_are_the_definition_to_the_bit(x):
    q, s = quantize_activations_group(x)
    assert s.shape == (x.shape[0], -(-x.shape[1] // 128))
    for group in range(s.shape[1]):
        part = x[:, group * 128 : (group + 1) * 128].numpy()
        expected = np.maximum(np.abs(part).max(axis=1), np.float32(1e-10)) / np.float32(448)
        assert np.array_equal(s[:, group].numpy(), expected)
        got = q[:, group * 128 : (group + 1) * 128].float().numpy()
        assert np.array_equal(got, f32(to_e4m3(f32(part / expected[:, None]))))


@settings(deadline=None, max_examples=30)
@given(x=matrices)
def test_row_scales_are_the_definition_to_the_bit(x):
    row = np.abs(x.numpy()).max(axis=1, keepdims=True) / np.float32(448)
    row = np.where(row == 0, np.float32(1), row)
    expected = f32(to_e4m3(f32(x.numpy() / row)))
    for quantise in (quantize_activations_token, quantize_channel):
        q, s = quantise(x)
        assert np.array_equal(s.numpy(), row)
        assert np.array_equal(q.float().numpy(), expected)


@pytest.mark.parametrize("quantise", [quantize_activations_group, quantize_activations_token])
def test_quantised_token_does_not_depend_on_the_batch(quantise):
    x = random_matrix(17, 300, 3, 2.0).bfloat16()
    q, s = quantise(x)
    for row in range(17):
        q_alone, s_alone = quantise(x[row : row + 1])
        assert torch.equal(q_alone.view(torch.uint8), q[row : row + 1].view(torch.uint8))
        assert torch.equal(s_alone, s[row : row + 1])


@pytest.mark.parametrize("quantise", [quantize_activations_group, quantize_activations_token])
def test_zero_tokens_quantise_to_zero_with_a_finite_scale(quantise):
    q, s = quantise(torch.zeros(2, 200))
    assert torch.equal(q.float(), torch.zeros(2, 200))
    assert torch.isfinite(s).all()
    assert (s > 0).all()


def test_power_of_two_scales_round_up_one_ulp_above_a_power():
    exact = torch.full((1, 1), 448.0)
    above = torch.full((1, 1), 448.0 * (1 + 2.0**-22))
    assert quantize_block(exact, power_of_two=True)[1].item() == 1.0
    assert quantize_block(above, power_of_two=True)[1].item() == 2.0


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (63, 640)])
def test_dequantised_weight_is_within_half_a_step(shape):
    weight = random_matrix(*shape, seed=1, spread=0.0)
    for q, s, inverse in (
        (*quantize_block(weight, power_of_two=False), dequantize_block),
        (*quantize_block(weight, power_of_two=True), dequantize_block),
        (*quantize_channel(weight), dequantize_channel),
    ):
        back = inverse(q, s, torch.float32)
        # half a step of 3 mantissa bits, or of the smallest subnormal under the largest scale
        assert torch.all((back - weight).abs() <= weight.abs() / 16 + s.max() * 2.0**-10)
        assert torch.equal(inverse(q, s, torch.bfloat16), back.bfloat16())


def test_channel_scale_is_rounded_before_it_divides():
    weight = random_matrix(9, 40, 2, 1.0)
    q, s = quantize_channel(weight, scale_dtype=torch.bfloat16)
    assert torch.equal(s, s.bfloat16().float())
    assert np.array_equal(q.float().numpy(), f32(to_e4m3(f32(weight.numpy() / s.numpy()))))


def test_scale_of_the_wrong_shape_is_refused():
    q, s = quantize_block(torch.ones(130, 10), power_of_two=False)
    with pytest.raises(ValueError, match="block scale has shape"):
        dequantize_block(q, s[:1], torch.float32)
    with pytest.raises(ValueError, match="channel scale has shape"):
        dequantize_channel(q, s, torch.float32)
