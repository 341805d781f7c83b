"""A step as one C++ call against the forward pass operation by operation: equal to the bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everstep import kernels
from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.ring_config import context_length
from everstep.engine.config import ModelConfig
from everstep.engine.core.plan import Row
from everstep.engine.model.model import KVStore
from everstep.engine.model.rotary import rotary_tables
from everstep.engine.model.step import ForwardPass, batch_of
from everstep.engine.model.weights import load_weights
from everstep.engine.rollout import SamplingParams
from everstep.kernels import native

from ..levels import NATIVE, quick, use_level
from .ring_draws import Draw as Drawn
from .ring_draws import base_config, ring_checkpoints, write_checkpoint

BLOCK = 4
NUM_BLOCKS = 40
FORMATS = ("none", "none", "block", "channel")


@pytest.fixture(params=quick(NATIVE), scope="module")
def level(request):
    with use_level(request.param):
        yield request.param


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Weights of a draw, in its dtype or another one."""

    def run(draw, dtype="auto"):
        folder = write_checkpoint(tmp_path_factory.mktemp("draw"), draw)
        config = ModelConfig(path=str(folder), dtype=dtype)
        return load_weights(Checkpoint.open(folder), config, on_progress=lambda *_: None)

    return run


def make_row(ids, start, table, *, samples=True, **sampling):
    all_ids = [0] * start + list(ids) + [0] * (not samples)
    return Row(
        rollout_id="r",
        all_ids=all_ids,
        num_missing=len(all_ids) - start,
        num_tokens=len(ids),
        block_table=table,
        num_prompt=len(all_ids),
        sampling=SamplingParams(**sampling),
        seed=0,
        banned_ids=[],
    )


def make_pass(weights, *, tables="float32", native=True):
    """A forward pass over caches full of NaN."""
    store = KVStore.empty(weights.config, NUM_BLOCKS * BLOCK, weights.dtype)
    for tensor in (*store.keys, *store.values):
        tensor.fill_(float("nan"))
    dtype = weights.dtype if tables == "model" else torch.float32
    rotary = rotary_tables(weights.config, context_length(weights.config), dtype)
    made = ForwardPass(weights, store, rotary, BLOCK)
    assert made.native is not None
    if not native:
        made.native = None
    return made


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same(one, other):
    assert one.shape == other.shape
    assert torch.equal(bits(one), bits(other))


def assert_same_step(whole, parts, rows, *, wants_routes=True):
    with torch.inference_mode():
        got = whole.run(rows, wants_routes=wants_routes)
        expected = parts.run(rows, wants_routes=wants_routes)
    assert_same(got.hidden, expected.hidden)
    assert_same(got.logits, expected.logits)
    assert (got.bad_tokens, got.bad_logits) == (expected.bad_tokens, expected.bad_logits)
    for one, other in zip(got.routes or (), expected.routes or (), strict=False):
        assert_same(one, other)
    for which in ("keys", "values"):
        both = zip(getattr(whole._store, which), getattr(parts._store, which), strict=True)
        for one, other in both:
            assert_same(one, other)
    return got


@st.composite
def schedules(draw, limit, vocab):
    """Steps of rows: some rollouts, each in chunks from position 0, blocks in any order."""
    count = draw(st.integers(1, 4))
    blocks = draw(st.permutations(range(1, NUM_BLOCKS)))
    per = (NUM_BLOCKS - 1) // count
    lengths = [min(limit, per * BLOCK, draw(st.integers(1, 30))) for _ in range(count)]
    done, steps = [0] * count, []
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        rows = []
        for i, length in enumerate(lengths):
            n = min(length - done[i], draw(st.sampled_from([0, 1, 1, 5, 40])))
            if n:
                ids = draw(st.lists(st.integers(0, vocab - 1), min_size=n, max_size=n))
                table = list(blocks[i * per : i * per + -(-length // BLOCK)])
                rows.append(make_row(ids, done[i], table, samples=draw(st.booleans())))
                done[i] += n
        if rows:
            steps.append(rows)
    return steps


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    draw=ring_checkpoints(formats=FORMATS),
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    tables=st.sampled_from(["float32", "float32", "model"]),
    threads=st.sampled_from([1, 3]),
    data=st.data(),
)
def test_one_call_has_the_bits_of_its_operations(level, load, draw, dtype, tables, threads, data):
    weights = load(draw, dtype)
    whole, parts = (make_pass(weights, tables=tables, native=n) for n in (True, False))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        limit = min(60, context_length(weights.config))
        for rows in data.draw(schedules(limit, weights.config.vocab_size)):
            assert_same_step(whole, parts, rows, wants_routes=data.draw(st.booleans()))
    finally:
        torch.set_num_threads(before)


def test_real_widths_and_many_rows_have_the_bits_of_their_operations(level, load):
    """Wide enough for every share of work to be cut among threads."""
    config = base_config(
        hidden_size=320,
        intermediate_size=512,
        moe_intermediate_size=256,
        head_dim=64,
        vocab_size=1111,
        first_k_dense_replace=1,
        num_hidden_layers=3,
    )
    weights = load(Drawn(config=config, dtype="bfloat16"))
    whole, parts = (make_pass(weights, native=n) for n in (True, False))
    rows = [
        make_row([(7 * i + j) % 1111 for j in range(60)], 0, list(range(1 + 15 * i, 16 + 15 * i)))
        for i in range(2)
    ]
    assert_same_step(whole, parts, rows)
    rows = [make_row([i], 60, [*range(1 + 15 * i, 16 + 15 * i), 31 + i]) for i in range(2)]
    assert_same_step(whole, parts, rows)


# -- values that are not finite


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_told_apart(level, load, dtype, value):
    weights = load(Drawn(config=base_config(), dtype="bfloat16"), dtype)
    embedding = weights.embedding.clone()
    embedding[7, 31] = value
    weights = replace(weights, embedding=embedding)
    whole, parts = (make_pass(weights, native=n) for n in (True, False))
    rows = [make_row([1, 2], 0, [1]), make_row([7], 0, [2]), make_row([3, 4], 0, [3])]
    got = assert_same_step(whole, parts, rows)
    assert (got.bad_tokens, got.bad_logits) == ([2], [1])
    assert whole.first_bad_layer(rows) == {2: 0}
    assert_same_step(whole, parts, [make_row([5], 2, [1])])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_beyond_float32_are_told_apart_from_hidden_states(level, load, dtype):
    weights = load(Drawn(config=base_config(), dtype="bfloat16"), dtype)
    head = kernels.prepare_head(torch.full((64, 32), 1e38, dtype=weights.dtype))
    weights = replace(weights, head=head, norm=weights.norm * 100)
    whole, parts = (make_pass(weights, native=n) for n in (True, False))
    got = assert_same_step(whole, parts, [make_row([1, 2], 0, [1]), make_row([9], 0, [2])])
    assert got.bad_tokens == []
    assert got.bad_logits == [0, 1]


# -- what does not fit


@pytest.fixture
def whole(level, load):
    return make_pass(load(Drawn(config=base_config())))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (make_row([64], 0, [1]), "outside the vocabulary"),
        (make_row([-1], 0, [1]), "outside the vocabulary"),
        (make_row([1] * 5, 0, [1]), "covers too little"),
        (make_row([1], 4, [1]), "covers too little"),
        (make_row([1], 0, [NUM_BLOCKS]), "does not have"),
        (make_row([1], 0, [-1]), "does not have"),
        (make_row([1], 512, list(range(1, 130))), "beyond the rotary tables"),
        (make_row([1], -1, [1]), "beyond the rotary tables"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_before_anything_is_written(whole, row, says):
    good = make_row([1, 2], 0, [2])
    with pytest.raises(ValueError, match=says):
        whole.run([good, row], wants_routes=False)
    for tensor in (*whole._store.keys, *whole._store.values):
        assert tensor.isnan().all()


def test_a_batch_with_gaps_is_refused(whole):
    batch = batch_of([make_row([1, 2], 0, [2]), make_row([3], 0, [3])], wants_routes=False)
    for spans, wanted in (
        (batch.spans + [[0, 1]] * 5, batch.wanted),
        (batch.spans, batch.wanted + 1),
    ):
        with pytest.raises(ValueError, match="not packed"):
            whole.native.run(replace(batch, spans=spans, wanted=wanted), threads=1)


def test_another_layout_of_the_structs_is_refused(whole):
    whole.native._model.step_bytes += 8
    with pytest.raises(ValueError, match="another version"):
        whole.run([make_row([1], 0, [1])], wants_routes=False)


# -- who takes the one call


def test_what_the_library_does_not_cover_goes_operation_by_operation(load):
    draw = Drawn(config=base_config(), dtype="bfloat16", fp8="block")
    by_torch = None
    with kernels.use_level("torch"):
        by_torch = load(draw)
        assert make_pass_or_none(by_torch) is None
    name = native.runnable(native.machine_flags())[0]
    if name == "torch":
        pytest.skip("no library on this machine")
    with kernels.use_level(name):
        # weights of one level under another
        assert make_pass_or_none(by_torch) is None
        packed = load(draw)
        assert make_pass_or_none(packed) is not None
    with kernels.use_level("portable"):
        is_other = native.find_library("portable") != native.find_library(name)
        assert (make_pass_or_none(packed) is None) == is_other


def make_pass_or_none(weights):
    store = KVStore.empty(weights.config, 2 * BLOCK, weights.dtype)
    return ForwardPass(weights, store, rotary_tables(weights.config, 8), BLOCK).native
