"""Linear layers of every format against the definition, and the probes that guard their bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import Weight, gemm, reference
from everstep.kernels.gemm import explain, linear, matmul_rows

from ..tolerances import assert_close
from .draws import (
    DTYPES,
    FORMATS,
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


def terms_of(x, weight):
    """(M, N): size of the products that an output sums."""
    total = x.double().abs() @ reference.expand(weight).double().abs().t()
    return total if weight.bias is None else total + weight.bias.double().abs()


@many
@given(st.integers(0, 40), sizes, sizes, dtypes, st.sampled_from(FORMATS), seeds)
def test_linear_is_the_definition_in_every_format(rows, n, k, dtype, kind, seed):
    x, weight = random(seed, rows, k, dtype=dtype), make_weight(kind, n, k, dtype, seed)
    assert_close(linear(x, weight), reference.linear(x, weight), terms_of(x, weight))


@few
@given(sizes, sizes, sizes, dtypes, seeds)
def test_matmul_rows_is_the_product(rows, n, k, dtype, seed):
    x, w = random(seed, rows, k, dtype=dtype), random(seed + 1, n, k, dtype=dtype)
    expected = (x.double() @ w.double().t()).to(dtype)
    assert_close(matmul_rows(x, w), expected, x.double().abs() @ w.double().abs().t())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(kind, dtype):
    out = linear(torch.zeros(0, 130, dtype=dtype), make_weight(kind, 7, 130, dtype))
    assert out.shape == (0, 7)
    assert out.dtype == dtype


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_inputs_give_the_same_bits(kind, dtype):
    x, weight = random(3, 37, 129, dtype=dtype), make_weight(kind, 65, 129, dtype)
    expected = linear(x, weight)
    assert_same_bits(linear(strided(x), weight), expected)
    assert_same_bits(linear(misaligned(x), weight), expected)
    moved = Weight(
        misaligned(weight.data), dtype, weight.kind, weight.scale, weight.bias, weight.activations
    )
    assert_same_bits(linear(x, moved), expected)


@few
@given(sizes, sizes, dtypes, st.sampled_from(["block", "channel"]), seeds)
def test_weight_only_fp8_has_the_bits_of_its_expanded_weight(n, k, dtype, kind, seed):
    x, weight = random(seed, 5, k, dtype=dtype), make_weight(kind, n, k, dtype, seed)
    assert_same_bits(linear(x, weight), linear(x, Weight(weight.expanded(), dtype)))
    assert_same_bits(weight.expanded(), reference.expand(weight))


def test_a_bias_is_added_before_the_sum_is_rounded():
    # 256 + 1 is not a bf16 (it rounds to 256); 256 + 1 + 1 is
    x = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    ones = torch.ones(1, 2, dtype=torch.bfloat16)
    weight = Weight(ones, torch.bfloat16, bias=torch.ones(1, dtype=torch.bfloat16))
    assert linear(x, weight).item() == 258.0


def test_bf16_products_are_summed_in_float32():
    # each 1 is lost beside 256 if the running sum is a bf16
    x = torch.ones(1, 257, dtype=torch.bfloat16)
    x[0, 0] = 256.0
    w = torch.ones(1, 257, dtype=torch.bfloat16)
    assert matmul_rows(x, w).item() == 512.0


def test_a_zero_row_stays_zero_under_fp8_activations():
    for kind in ("block-group", "channel-token", "channel-group", "block-token"):
        x = random(0, 3, 130, dtype=torch.bfloat16)
        x[1] = 0.0
        out = linear(x, make_weight(kind, 9, 130, torch.bfloat16))
        assert torch.equal(out[1], torch.zeros(9, dtype=torch.bfloat16))
        assert torch.isfinite(out).all()


def test_a_large_group_does_not_coarsen_the_groups_beside_it():
    x = torch.zeros(1, 256)
    x[0, 0], x[0, 200] = 1e4, 1e-3
    codes = torch.zeros(1, 256).to(torch.float8_e4m3fn)
    codes[0, 200] = 1.0
    weight = Weight(codes, torch.float32, "block", torch.ones(1, 2), activations="group")
    assert linear(x, weight).item() == pytest.approx(1e-3, rel=1e-6)


# -- the probes


@pytest.fixture
def noisy_product(monkeypatch):
    """Replace the product by one whose error depends on where a row stands."""

    def install(noise):
        def product(x, w, out):
            torch.mm(x, w.t(), out=out)
            out.mul_(1.0 + noise(x).unsqueeze(1))

        monkeypatch.setattr(gemm, "_product", product)

    return install


def places(x):
    return torch.arange(x.shape[0]) * 1e-5


@pytest.mark.parametrize(
    ("noise", "tiles"),
    [
        (lambda x: torch.zeros(x.shape[0]), (256, 64, 16)),
        (places, (1,)),
        (lambda x: (torch.arange(x.shape[0]) == 15) * 1e-5, (1,)),
        (lambda x: x.abs().amax().expand(x.shape[0]) * 1e-5, (1,)),
        (lambda x: (x[0:1] != 0).any().expand(x.shape[0]) * 1e-5, (1,)),
        (lambda x: torch.full((x.shape[0],), (x.shape[0] > 16) * 1e-5), (16,)),
        (lambda x: torch.full((x.shape[0],), (x.shape[0] > 64) * 1e-5), (64, 16)),
        (lambda x: torch.full((x.shape[0],), (x.shape[0] == 64) * 1e-5), (256, 16)),
        (lambda x: places(x) * (x.shape[0] > 64), (64, 16)),
    ],
    ids=[
        "none",
        "place",
        "last place",
        "neighbours",
        "first row",
        "wide",
        "widest",
        "middle",
        "place in the widest",
    ],
)
def test_probe_refuses_tiles_whose_bits_depend_on_place(noisy_product, noise, tiles):
    noisy_product(noise)
    # one product per output: nothing beneath the noise depends on the library
    assert gemm.probe(random(0, 24, 1)) == tiles


def test_a_refused_tile_is_not_used(monkeypatch):
    monkeypatch.setattr(gemm, "PLAN", gemm.TilePlan())
    seen = []

    def product(x, w, out):
        seen.append(x.shape[0])
        torch.mm(x, w.t(), out=out)
        out.mul_(1.0 + places(x).unsqueeze(1))

    monkeypatch.setattr(gemm, "_product", product)
    x, w = random(0, 37, 24), random(1, 5, 24)
    whole = matmul_rows(x, w)
    seen.clear()
    assert_same_bits(torch.cat([matmul_rows(row, w) for row in x.split(1)]), whole)
    assert set(seen) == {1}


def test_where_two_threads_give_other_bits_one_multiplies(monkeypatch, noisy_product):
    """A small step runs on one thread, a large one on all: a row must not see in which it was."""
    monkeypatch.setattr(gemm, "PLAN", gemm.TilePlan())
    noisy_product(lambda x: torch.full((x.shape[0],), 1e-3 * (torch.get_num_threads() > 1)))
    x, w = random(0, 37, 24), random(1, 5, 24)
    with threads(1):
        expected = matmul_rows(x, w)
    with threads(2):
        assert_same_bits(matmul_rows(x, w), expected)
        assert torch.get_num_threads() == 2
    assert "rows by one thread: 1 shapes" in explain()["linear"]


def test_where_two_threads_give_other_bits_one_multiplies_items(monkeypatch, noisy_items):
    monkeypatch.setattr(gemm, "ITEMS", gemm.ItemPlan())
    noisy_items(lambda a: 1e-3 * (torch.get_num_threads() > 1))
    a, b = random(0, 5, 16, 8), random(1, 5, 12, 8)
    with threads(1):
        expected = gemm.matmul_items(a, b)
    with threads(2):
        assert_same_bits(gemm.matmul_items(a, b), expected)


def test_items_that_only_two_threads_get_wrong_are_multiplied_by_one(monkeypatch, noisy_items):
    """One thread takes the library's product, and two may not take another."""
    monkeypatch.setattr(gemm, "ITEMS", gemm.ItemPlan())
    noisy_items(
        lambda a: torch.arange(a.shape[0]).view(-1, 1, 1) * 1e-3 * (torch.get_num_threads() > 1)
    )
    a, b = random(0, 5, 16, 8), random(1, 5, 12, 8)
    with threads(1):
        expected = gemm.matmul_items(a, b)
    with threads(2):
        assert_same_bits(gemm.matmul_items(a, b), expected)


@pytest.fixture
def noisy_items(monkeypatch):
    bmm = torch.bmm

    def install(noise):
        monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(a, b) * (1.0 + noise(a)))

    return install


@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize(
    "noise",
    [
        lambda a: torch.arange(a.shape[0]).view(-1, 1, 1) * 1e-5,
        lambda a: torch.arange(a.shape[1]).view(1, -1, 1) * 1e-5,
        lambda a: (torch.arange(a.shape[1]) == 0).view(1, -1, 1) * 1e-5,
        lambda a: a.shape[0] * 1e-5,
        lambda a: (a.shape[0] == 1) * 1e-5,
        lambda a: (a.shape[0] > 50) * 1e-5,
        lambda a: a.abs().amax() * 1e-5,
    ],
    ids=["item", "row", "first row", "count", "alone", "many", "neighbours"],
)
def test_probe_items_refuses_products_whose_bits_depend_on_place(noisy_items, noise, is_contiguous):
    assert gemm.probe_items(16, 8, 64, is_contiguous)
    noisy_items(noise)
    assert not gemm.probe_items(16, 8, 64, is_contiguous)


def test_a_refused_batched_product_is_not_used(monkeypatch, noisy_items):
    monkeypatch.setattr(gemm, "ITEMS", gemm.ItemPlan())
    noisy_items(lambda a: torch.arange(a.shape[0]).view(-1, 1, 1) * 1e-3)
    a, b = random(0, 5, 16, 8), random(1, 5, 12, 8)
    expected = torch.einsum("ird,ild->irl", a.double(), b.double())
    assert_close(gemm.matmul_items(a, b), expected.float(), 8.0)


def test_items_are_multiplied_in_either_layout():
    a, b = random(0, 7, 16, 20), random(1, 7, 33, 20)
    expected = torch.einsum("ird,ild->irl", a.double(), b.double()).float()
    assert_close(gemm.matmul_items(a, b), expected, 20.0)
    flipped = b.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(gemm.matmul_items(a, flipped), expected, 20.0)


def test_explain_says_what_was_refused(monkeypatch):
    monkeypatch.setattr(gemm, "PLAN", gemm.TilePlan({(torch.float32, 2, 2, 1): (1,)}))
    monkeypatch.setattr(gemm, "ITEMS", gemm.ItemPlan({(16, 8, 64, True, 1): False}))
    said = explain()
    assert "rows by 1: 1 shapes" in said["linear"]
    assert "1 by elementwise products instead" in said["attention"]
