"""Packed linear layers of the C++ library against the definition, at every level (../levels.py)."""

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import Weight, reference
from everstep.kernels.packed import (
    FP8_BLOCK,
    FP8_CHANNEL,
    PackedWeight,
    declare,
    pack,
    pack_gate_up,
    packed_gate_up,
    packed_linear,
    packed_linear_float,
)

from ..levels import NATIVE, SUFFIX, open_level
from ..tolerances import TINY, assert_close
from .draws import (
    DTYPES,
    NAN,
    assert_same_bits,
    dtypes,
    few,
    make_weight,
    many,
    misaligned,
    random,
    seeds,
    sizes,
    strided,
    threads,
)

FORMATS = ("plain", "bias", "block", "channel")
FP8 = ("block", "channel")


@pytest.fixture(params=NATIVE, scope="module")
def library(request):
    return open_level(request.param)


def terms_of(x, weight):
    """(M, N): size of the products that an output sums."""
    total = x.double().abs() @ reference.expand(weight).double().abs().t()
    return total if weight.bias is None else total + weight.bias.double().abs()


def unpadded(x):
    """The same rows at the very end of their memory, NaN before them: reading on is seen."""
    storage = torch.full((x.numel() + 64,), NAN, dtype=x.dtype)
    moved = storage[64:].view(x.shape)
    moved.copy_(x)
    return moved


@many
@given(st.integers(0, 140), sizes, sizes, dtypes, st.sampled_from(FORMATS), seeds)
def test_a_packed_linear_is_the_definition_in_every_format(library, rows, n, k, dtype, kind, seed):
    x, weight = random(seed, rows, k, dtype=dtype), make_weight(kind, n, k, dtype, seed)
    packed, terms = pack(weight, library), terms_of(x, weight)
    assert_close(packed_linear(unpadded(x), packed), reference.linear(x, weight), terms)
    wide = packed_linear_float(x, packed)
    assert_close(wide, reference.product(x, weight).float(), terms)
    assert_same_bits(wide.to(dtype), packed_linear(x, packed))


@few
@given(st.integers(0, 70), sizes, sizes, dtypes, st.sampled_from(("plain", "block")), seeds)
def test_gate_up_has_the_bits_of_its_parts(library, rows, n, k, dtype, kind, seed):
    x = random(seed, rows, k, dtype=dtype, scale=2.0)
    gate, up = make_weight(kind, n, k, dtype, seed), make_weight(kind, n, k, dtype, seed + 7)
    fused = packed_gate_up(x, pack_gate_up(gate, up, library))
    apart = [packed_linear(x, pack(w, library)) for w in (gate, up)]
    assert_close(fused, reference.swiglu(*apart), apart[0].double().abs() * apart[1].double().abs())


def test_gate_up_rounds_silu_before_the_product(library):
    gate, up = (make_weight("plain", 64, 96, torch.bfloat16, seed) for seed in (0, 1))
    x = random(2, 40, 96, dtype=torch.bfloat16, scale=2.0)
    a, b = (packed_linear(x, pack(w, library)) for w in (gate, up))
    fused = packed_gate_up(x, pack_gate_up(gate, up, library))
    wide = a.double()
    once = (wide / (1 + torch.exp(-wide)) * b.double()).bfloat16()
    # a cast left out would differ in a quarter of the elements
    assert (fused != reference.swiglu(a, b)).double().mean() < 0.01
    assert (fused != once).double().mean() > 0.1


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_how_many_are_beside_it(library, kind, dtype):
    x, packed = random(5, 129, 67, dtype=dtype), pack(make_weight(kind, 51, 67, dtype), library)
    with threads(1):
        whole = packed_linear(x, packed)
        for rows in range(1, 130):
            assert_same_bits(packed_linear(x[:rows], packed), whole[:rows])


@few
@given(sizes, sizes, dtypes, st.sampled_from(FORMATS), seeds)
def test_a_row_does_not_see_its_place_nor_the_threads(library, n, k, dtype, kind, seed):
    x, packed = random(seed, 129, k, dtype=dtype), pack(make_weight(kind, n, k, dtype), library)
    with threads(1):
        whole = packed_linear(x, packed)
    order = torch.randperm(129, generator=torch.Generator().manual_seed(seed))
    for count in (1, 2, 3):
        with threads(count):
            assert_same_bits(packed_linear(x[order], packed), whole[order])
            assert_same_bits(packed_linear(x[7:8], packed), whole[7:8])
            assert_same_bits(packed_linear(x[64:81], packed), whole[64:81])


@pytest.mark.parametrize("kind", ["plain", "block"])
@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_threads_do_not_move_a_bit_of_a_large_product(library, kind, count):
    x = random(1, 200, 320, dtype=torch.bfloat16)
    gate, up = (make_weight(kind, 100, 320, torch.bfloat16, seed) for seed in (0, 1))
    packed, pair = pack(gate, library), pack_gate_up(gate, up, library)
    with threads(1):
        expected = packed_linear(x, packed), packed_gate_up(x, pair)
    with threads(count):
        assert_same_bits(packed_linear(x, packed), expected[0])
        assert_same_bits(packed_gate_up(x, pair), expected[1])


@many
@given(st.integers(1, 40), sizes, sizes, dtypes, st.sampled_from(FP8), seeds)
def test_fp8_has_the_bits_of_its_expanded_weight(library, rows, n, k, dtype, kind, seed):
    x, weight = random(seed, rows, k, dtype=dtype), make_weight(kind, n, k, dtype, seed)
    expanded = Weight(weight.expanded(), dtype)
    expected = packed_linear_float(x, pack(expanded, library))
    assert_same_bits(packed_linear_float(x, pack(weight, library)), expected)


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize(
    "scale", [1.0, -0.7, 2.0**-40, 0.3e-5, 7.77e5, 1e25, 3e33, 1.1e-31, 3e-37, 1e-41, 0.0]
)
def test_every_fp8_code_is_decoded(library, kind, scale):
    codes = torch.arange(256).to(torch.uint8)
    codes = codes.where(codes & 0x7F != 0x7F, 0).view(torch.float8_e4m3fn)
    data = codes.repeat(16, 1)
    shape = (1, 2) if kind == "block" else (16, 1)
    weight = Weight(data, torch.bfloat16, kind, torch.full(shape, scale))
    expanded = weight.expanded()
    # one input at a time: the output is the weight itself, but that products of bf16 pairs take a
    # subnormal for zero, be it decoded or packed
    eye = torch.eye(256).bfloat16()
    for rows in (slice(0, 256), slice(3, 4), slice(250, 256)):
        out = packed_linear(eye[rows], pack(weight, library))
        plain = packed_linear(eye[rows], pack(Weight(expanded, torch.bfloat16), library))
        assert torch.equal(out, plain)
        is_same = (out == expanded.t()[rows]) | (expanded.t()[rows].abs() < TINY)
        assert is_same.all()


@pytest.mark.parametrize("kind", FP8)
def test_a_nan_code_stays_a_nan_and_fp8_is_packed_as_bytes(library, kind):
    weight = make_weight(kind, 32, 64, torch.bfloat16)
    assert pack(weight, library).struct.format in (FP8_BLOCK, FP8_CHANNEL)
    weight.data.view(torch.uint8)[3, 5] = 0x7F
    out = packed_linear(torch.ones(2, 64).bfloat16(), pack(weight, library))
    assert torch.isnan(out[:, 3]).all()
    assert torch.isfinite(out[:, 4:]).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_inputs_give_the_same_bits(library, kind, dtype):
    x, weight = random(3, 37, 129, dtype=dtype), make_weight(kind, 65, 129, dtype)
    packed = pack(weight, library)
    expected = packed_linear(x, packed)
    wide = torch.full((37, 200), NAN, dtype=dtype)
    wide[:, 40:169] = x
    for same in (strided(x), misaligned(x), wide[:, 40:169]):
        assert_same_bits(packed_linear(same, packed), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_the_output_is_written(library, dtype):
    x, packed = random(3, 5, 33, dtype=dtype), pack(make_weight("plain", 37, 33, dtype), library)
    out = torch.full((7, 64), NAN, dtype=dtype)
    at = out.data_ptr() + 64 * out.element_size()
    library.everstep_linear(packed.address, x.data_ptr(), 5, 33, at, 64, 0, 2)
    assert torch.isnan(out[0]).all()
    assert torch.isnan(out[6]).all()
    assert torch.isnan(out[1:6, 37:]).all()
    assert_same_bits(out[1:6, :37].contiguous(), packed_linear(x, packed))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_of_a_packed_weight_is_written(library, kind, dtype, monkeypatch):
    weight = make_weight(kind, 37, 45, dtype)

    def filled(byte):
        monkeypatch.setattr(
            "everstep.kernels.packed.aligned_bytes",
            lambda count: torch.full((count,), byte, dtype=torch.uint8),
        )
        return pack(weight, library).tensors[0]

    assert torch.equal(filled(0x55), filled(0xAA))


def test_bf16_products_are_summed_in_float32_and_rounded_to_even(library):
    x = torch.ones(1, 257, dtype=torch.bfloat16)
    x[0, 0] = 256.0
    w = torch.ones(1, 257, dtype=torch.bfloat16)
    assert packed_linear(x, pack(Weight(w, torch.bfloat16), library)).item() == 512.0
    # 257 and 259 lie between two bf16: to even, once down and once up
    x = torch.tensor([[256.0, 1.0], [256.0, 3.0]], dtype=torch.bfloat16)
    weight = Weight(torch.ones(1, 2, dtype=torch.bfloat16), torch.bfloat16)
    assert packed_linear(x, pack(weight, library)).tolist() == [[256.0], [260.0]]


def test_infinities_and_nans_stay_in_their_row(library):
    for dtype in DTYPES:
        x, packed = (
            random(0, 20, 64, dtype=dtype),
            pack(make_weight("plain", 48, 64, dtype), library),
        )
        expected = packed_linear(x, packed)
        x[3, 7], x[11, 5] = NAN, float("inf")
        out = packed_linear(x, packed)
        assert torch.isnan(out[3]).all()
        assert not torch.isfinite(out[11]).any()
        rest = [i for i in range(20) if i not in (3, 11)]
        assert_same_bits(out[rest], expected[rest])


def test_float32_has_the_same_bits_at_every_level_with_fused_multiply_add(library):
    if library.everstep_has_fma() == 0:
        pytest.skip("this level multiplies and adds apart")
    x, w = random(0, 9, 77), random(1, 33, 77)
    total = torch.zeros(9, 33, dtype=torch.float64)
    for k in range(77):
        # the product is exact in float64; the sum rounded twice at worst, in 1 of 2^29 elements
        total = (x[:, k, None].double() * w[None, :, k].double() + total).float().double()
    assert_same_bits(packed_linear(x, pack(Weight(w, torch.float32), library)), total.float())


def test_the_exponential_is_within_two_ulp(library):
    x = torch.cat([torch.linspace(-104, 89, 200_003), random(0, 100_000) * 3, torch.zeros(5)])
    out = torch.empty_like(x)
    library.everstep_exp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.everstep_exp(x.data_ptr(), out.data_ptr(), x.numel())
    exact = torch.exp(x.double())
    # infinity counts as the next number after the largest
    expected = exact.float().clamp(max=torch.finfo(torch.float32).max)
    ulp = (torch.nextafter(expected, torch.tensor(float("inf"))).double() - expected.double()).abs()
    is_normal = (exact > torch.finfo(torch.float32).tiny) & (exact < 3.4e38)
    assert ((out.double() - exact).abs() / ulp)[is_normal].max() <= 2.0
    assert (out[exact > 3.41e38] == float("inf")).all()
    assert (out[exact < torch.finfo(torch.float32).tiny] <= torch.finfo(torch.float32).tiny).all()
    single = torch.empty_like(x)
    for at in range(333):
        library.everstep_exp(x[at:].data_ptr(), single[at:].data_ptr(), 1)
    assert_same_bits(single[:333], out[:333])


def test_what_is_no_packed_product_is_refused(library):
    packed = pack(make_weight("plain", 8, 16, torch.bfloat16), library)
    assert isinstance(packed, PackedWeight)
    with pytest.raises(ValueError, match=r"x is \(2, 15\) torch.bfloat16, expected \(M, 16\)"):
        packed_linear(torch.zeros(2, 15).bfloat16(), packed)
    with pytest.raises(ValueError, match="float32, expected"):
        packed_linear(torch.zeros(2, 16), packed)
    with pytest.raises(NotImplementedError, match="W8A8"):
        pack(make_weight("block-group", 8, 16, torch.bfloat16), library)
    with pytest.raises(ValueError, match="must be of one shape"):
        pack_gate_up(
            make_weight("plain", 8, 16, torch.bfloat16),
            make_weight("plain", 9, 16, torch.bfloat16),
            library,
        )


def test_the_library_says_its_level(library, request):
    declare(library)
    library.everstep_level.restype = ctypes.c_char_p
    name = request.node.callspec.params["library"]
    assert library.everstep_level().decode() == name.removesuffix(SUFFIX)
