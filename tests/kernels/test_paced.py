"""Products in pieces have the bits that they have in one, at every level; weights packed in pieces
are those packed at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep import kernels
from everstep.kernels import paced, pieces
from everstep.kernels.pieces import at_once, drain

from ..levels import LEVELS, use_level
from .draws import assert_same_bits, dtypes, few, make_weight, random, seeds
from .test_dispatch import FORMATS, bank_of
from .test_experts import make_experts, make_routes


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So small that every product is cut as finely as it can be."""
    monkeypatch.setattr(paced, "PIECE_PRODUCTS", 1 << 10)
    monkeypatch.setattr(paced, "PIECE_WEIGHT_BYTES", 1 << 10)
    monkeypatch.setattr(paced, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(paced, "_COLUMNS", 16)


def count_and_drain(work):
    """(pieces, result)."""
    count = 1
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return count, stop.value
        count += 1


@pytest.mark.parametrize("name", LEVELS)
@few
@given(
    st.integers(1, 9),
    st.sampled_from([(16, 16), (33, 17), (128, 40), (130, 65), (300, 129)]),
    dtypes,
    st.sampled_from(FORMATS),
    seeds,
)
def test_a_product_by_columns_is_the_product(name, rows, sizes, dtype, kind, seed):
    n, k = sizes
    x = random(seed, rows, k, dtype=dtype)
    weight, other = (make_weight(kind, n, k, dtype, seed=seed + i) for i in range(2))
    with use_level(name):
        linear = kernels.prepare(weight)
        count, found = count_and_drain(kernels.linear_in_pieces(x, linear))
        assert_same_bits(found, kernels.linear(x, linear))
        pair = kernels.prepare_gate_up(weight, other)
        assert_same_bits(drain(kernels.gate_up_in_pieces(x, pair)), kernels.gate_up(x, pair))
        head = kernels.prepare_head(random(seed, n, k, dtype=dtype))
        logits = drain(kernels.project_in_pieces(x, head))
        assert_same_bits(logits, kernels.project(x, head))
    if isinstance(linear, kernels.PackedWeight):
        assert count >= -(-n // 16)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("kind", FORMATS)
def test_experts_row_by_row_are_the_experts(name, kind):
    x, routes = random(1, 9, 96, dtype=torch.bfloat16), make_routes(9, 6, 3)
    with use_level(name):
        bank = bank_of(make_experts(kind, 6, 96, 48, torch.bfloat16))
        count, found = count_and_drain(kernels.experts_in_pieces(x, *routes, bank))
        assert_same_bits(found, kernels.experts(x, *routes, bank))
    assert count >= 9


@pytest.mark.parametrize("name", LEVELS)
def test_logprobs_row_by_row_are_those_of_all_rows(name):
    logits = random(1, 7, 300)
    targets = torch.arange(7) * 11
    with use_level(name):
        found = drain(kernels.log_softmax_in_pieces(logits, targets))
        whole = kernels.log_softmax(logits).gather(1, targets.unsqueeze(1))[:, 0]
    assert_same_bits(found, whole)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 200))
def test_a_piece_is_within_its_bound_or_is_the_least_there_is(total, cost, bound, multiple):
    count = at_once(total, cost, bound, multiple=multiple)
    assert count >= 1
    assert count * cost <= bound or count == multiple
    assert count % multiple == 0 or count == max(total, 1)


@pytest.mark.parametrize("name", LEVELS)
@few
@given(
    st.sampled_from([(16, 16), (33, 17), (130, 65), (300, 129), (512, 40)]),
    dtypes,
    st.sampled_from(FORMATS),
    st.booleans(),
    seeds,
)
def test_weights_prepared_in_small_pieces_are_those_prepared_at_once(
    name, sizes, dtype, kind, expands, seed
):
    n, k = sizes
    weight = make_weight(kind, n, k, dtype, seed=seed)
    x = random(seed, 3, k, dtype=dtype)
    # a checkpoint may be stored in another type than it is run in
    wide = kernels.Weight(random(seed, n, k), dtype)
    with use_level(name), pytest.MonkeyPatch.context() as patch:
        whole, rounded = (
            kernels.prepare(weight),
            kernels.prepare(kernels.Weight(wide.data.to(dtype), dtype)),
        )
        patch.setattr(pieces.at_once, "__kwdefaults__", {"multiple": 1})
        patch.setattr(pieces.at_once, "__defaults__", (64,))
        expands = expands and weight.activations == "none"
        count, small = count_and_drain(kernels.preparing(weight, expands=expands))
        assert count >= n // 128
        assert_same_bits(kernels.linear(x, small), kernels.linear(x, whole))
        assert_same_bits(
            kernels.linear(x, drain(kernels.preparing(wide))), kernels.linear(x, rounded)
        )
