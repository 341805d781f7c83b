"""The trainable model against the float64 reference, values and gradients, over drawn checkpoints.

In float64 both compute the definition without rounding, so they agree to 1e-9 of the largest
logit. The gradient is compared with central differences of the reference, which has none of its
own: the whole chain from a stored tensor to a logprob is checked, not autograd against itself.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from everstep.clients.llm import LLM
from everstep.engine.errors import CheckpointError
from everstep.engine.proofs.reference import Reference
from everstep.engine.proofs.verify import log_softmax
from everstep.engine.rollout import SamplingParams
from everstep.trainer_bridge.trainer import target_logprobs
from everstep.trainer_bridge.trainer.packing import KeptIds, TrainSequence, pack, split
from everstep.trainer_bridge.trainer.trainable import open_trainable, trainable_config

from ..engine.ring_draws import Draw as Drawn
from ..engine.ring_draws import base_config, ring_checkpoints, write_checkpoint

examples = settings(max_examples=8, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Writes a draw into a new folder."""
    return lambda draw: write_checkpoint(tmp_path_factory.mktemp("draw"), draw)


def sequences_of(draw, count=3):
    """A few prompts with responses, of different lengths, from a draw's own tokens."""
    random = np.random.default_rng(draw.seed)
    vocab = draw.config["vocab_size"]
    lengths = [2, *random.integers(2, 24, count - 1)]
    return [
        TrainSequence(
            ids=random.integers(0, vocab, length),
            num_prompt=int(random.integers(1, length)),
            temperature=float(random.choice([1.0, 0.7, 1.5])),
        )
        for length in lengths
    ]


def reference_lps(reference, sequence, routes=None):
    """Logprobs of the response by the reference, and the routes (L, n − 1, K)."""
    out = reference.forward([int(i) for i in sequence.ids[:-1]], routes=routes)
    lp = log_softmax(out.logits / sequence.temperature)
    targets = sequence.ids[sequence.num_prompt :]
    rows = np.arange(sequence.num_prompt - 1, len(sequence.ids) - 1)
    return lp[rows, targets], out


@given(draw=ring_checkpoints())
@examples
def test_float64_scores_are_those_of_the_reference(store, draw):
    folder = store(draw)
    reference = Reference(folder, rope_tables="float32")
    ring = open_trainable(folder, dtype=torch.float64)
    sequences = sequences_of(draw)
    batch = pack(sequences)
    scores = ring(batch)
    expected, first = [], 0
    for sequence in sequences:
        lp, out = reference_lps(reference, sequence)
        expected.append(lp)
        own = scores.routing_ids[:, first : first + sequence.num_rows].numpy()
        if (out.slots <= 1e-9).any():
            return  # a tie may go either way, and from there on two models are compared
        np.testing.assert_array_equal(own, out.routing_ids.reshape(own.shape))
        first += sequence.num_rows
    np.testing.assert_allclose(scores.lp.detach().numpy(), np.concatenate(expected), atol=1e-9)


@given(draw=ring_checkpoints(dtypes=("float32",)), seed=st.integers(0, 2**20))
@examples
def test_gradients_are_the_reference_s_finite_differences(store, draw, seed):
    folder = store(draw)
    random = np.random.default_rng(seed)
    reference = Reference(folder, rope_tables="float32")
    sequences = []
    for sequence in sequences_of(draw):
        _, out = reference_lps(reference, sequence)
        # the choice of experts has no derivative: it is replayed on both sides
        sequences.append(replace(sequence, routing_ids=out.routing_ids.transpose(1, 0, 2)))
    ring = open_trainable(folder, dtype=torch.float64)
    scores = ring(pack(sequences))
    by_token = random.normal(size=len(scores.lp))
    (scores.lp * torch.from_numpy(by_token)).sum().backward()
    step, slope = 1e-6, 0.0
    # the reference reads files: this folder is written for it with each side of the step
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    whole = stored | {name: tensor.detach() for name, tensor in ring.tensors()}
    way = {
        name: torch.from_numpy(random.normal(size=tuple(p.shape)) * 0.1)
        for name, p in ring.named_parameters()
    }
    for name, parameter in ring.named_parameters():
        assert parameter.grad is not None, name
        slope += float((parameter.grad * way[name]).sum())
    sides = []
    for sign in (1, -1):
        moved = {n: (t + sign * step * way.get(n, 0.0)).contiguous() for n, t in whole.items()}
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        save_file(moved, folder / "model.safetensors")
        side = Reference(folder, rope_tables="float32")
        lps = [
            reference_lps(side, s, np.ascontiguousarray(s.routing_ids.transpose(1, 0, 2)))[0]
            for s in sequences
        ]
        sides.append(float(np.concatenate(lps) @ by_token))
    measured = (sides[0] - sides[1]) / (2 * step)
    assert slope == pytest.approx(measured, rel=2e-5, abs=2e-5)


# -- what a pass may not depend on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small float32 MoE."""
    draw = Drawn(config=base_config(vocab_size=90), seed=5)
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "m", draw)


def some_sequences(count=6, seed=0, **more):
    random = np.random.default_rng(seed)
    return [
        TrainSequence(
            ids=random.integers(0, 90, length), num_prompt=int(random.integers(1, length)), **more
        )
        for length in random.integers(2, 60, count)
    ]


def gradients(ring, batches):
    """Of the sum of all logprobs, weighted by their place."""
    ring.zero_grad()
    for batch in batches:
        scores = ring(batch)
        (scores.lp * torch.linspace(-1, 1, len(scores.lp)).to(scores.lp)).sum().backward()
    return {name: p.grad.clone() for name, p in ring.named_parameters()}


def test_packing_does_not_change_logprobs(folder):
    ring = open_trainable(folder)
    sequences = some_sequences()
    alone = torch.cat([ring(pack([s])).lp for s in sequences])
    together = ring(pack(sequences)).lp
    torch.testing.assert_close(together, alone, atol=3e-6, rtol=0)


def test_the_head_in_pieces_is_the_whole_head(folder, monkeypatch):
    ring = open_trainable(folder, dtype=torch.float64)
    kept = [[0, 1, 2, 40], [], *[[3, 5]] * 100]
    sequences = []
    for s in some_sequences(temperature=0.8):
        own = [list(ids) for ids in kept[: s.num_response]]
        for token, ids in zip(s.ids[s.num_prompt :], own, strict=True):
            if ids:
                ids.append(int(token))
        sequences.append(replace(s, kept=own))
    batch = pack(sequences)
    whole, entropy = ring(batch).lp, ring(batch).entropy
    before = gradients(ring, [batch])
    monkeypatch.setattr(target_logprobs, "_CHUNK_ELEMENTS", 90 * 7)
    pieces = ring(batch)
    torch.testing.assert_close(pieces.lp, whole, atol=1e-13, rtol=0)
    torch.testing.assert_close(pieces.entropy, entropy, atol=1e-13, rtol=0)
    torch.testing.assert_close(gradients(ring, [batch]), before, atol=1e-12, rtol=1e-12)


def test_kept_ids_renormalise_logprobs_and_their_gradient():
    random = np.random.default_rng(3)
    hidden = torch.from_numpy(random.normal(size=(4, 5))).requires_grad_()
    weight = torch.from_numpy(random.normal(size=(11, 5))).requires_grad_()
    targets = torch.tensor([3, 0, 10, 6])
    temperatures = torch.tensor([1.0, 0.5, 2.0, 1.0])
    lists = [[3, 4], [], [1, 10, 2], [6]]
    kept = KeptIds(torch.tensor([0, 2, 2, 5, 6]), torch.tensor([3, 4, 1, 10, 2, 6]))
    lp, _ = target_logprobs.target_logprobs(
        hidden, weight, targets, temperatures, kept, target_logprobs.PlainHead()
    )
    logits = hidden @ weight.t() / temperatures.double()[:, None]
    rows = []
    for row, ids, target in zip(logits, lists, targets, strict=True):
        support = ids or list(range(11))
        rows.append(row[target] - torch.logsumexp(row[support], 0))
    torch.testing.assert_close(lp, torch.stack(rows), atol=1e-12, rtol=0)
    scale = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    got = torch.autograd.grad((lp * scale).sum(), (hidden, weight))
    expected = torch.autograd.grad((torch.stack(rows) * scale).sum(), (hidden, weight))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("numerics", ["plain", "exact"])
def test_recomputed_layers_have_the_same_bits(folder, numerics):
    batch = pack(some_sequences())
    kept = gradients(open_trainable(folder, numerics=numerics), [batch])
    ring = open_trainable(folder, numerics=numerics, recompute_layers=True)
    for name, grad in gradients(ring, [batch]).items():
        assert torch.equal(grad, kept[name]), name


@pytest.mark.parametrize("numerics", ["plain", "exact"])
def test_experts_that_nobody_chose_have_a_gradient_of_zero(folder, numerics):
    # ranks must agree on which gradients there are
    ring = open_trainable(folder, numerics=numerics)
    sequence = replace(some_sequences(1)[0], num_prompt=1)
    chosen = np.tile(np.array([2, 7]), (sequence.num_rows, 1, 1))
    grads = gradients(ring, [pack([replace(sequence, routing_ids=chosen)])])
    for name, grad in grads.items():
        if ".experts." in name:
            is_chosen = ".experts.2." in name or ".experts.7." in name
            assert bool(grad.any()) == is_chosen, name


def test_replayed_weights_are_the_value_and_the_gate_keeps_its_gradient(folder):
    ring = open_trainable(folder, dtype=torch.float64)
    sequence = replace(some_sequences(1, seed=4)[0], num_prompt=1)
    own = ring(pack([sequence]))
    ids = own.routing_ids.transpose(0, 1).numpy()
    halves = np.full(ids.shape, 1.25, dtype=np.float32)
    forced = replace(sequence, routing_ids=ids, routing_weights=halves)
    scores = ring(pack([forced]))
    assert not torch.equal(scores.lp, own.lp)
    scores.lp.sum().backward()
    assert ring.get_parameter("model.layers.1.mlp.gate.weight").grad.any()
    again = replace(forced, routing_weights=halves * 2)
    assert not torch.equal(ring(pack([again])).lp, scores.lp)


# -- the engine's bits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=DTYPES)
def rollouts(request, tmp_path_factory):
    """(folder, dtype, what the engine sampled from it in steps of its own)."""
    dtype = request.param
    draw = Drawn(config=base_config(vocab_size=90, torch_dtype=dtype, num_hidden_layers=3), seed=8)
    draw = replace(draw, dtype=dtype)
    folder = write_checkpoint(tmp_path_factory.mktemp("moe") / dtype, draw)
    prompts = [[5, 6, 7], list(range(1, 40)), [9] * 17, [3]]
    more = {"max_tokens": 30, "record": ("routing", "kept_ids"), "ignore_eos": True}
    sampling = [
        SamplingParams(**more),
        SamplingParams(temperature=0.6, **more),
        SamplingParams(top_p=0.9, temperature=1.3, **more),
        SamplingParams(top_k=20, **more),
    ]
    with LLM(str(folder), skip_tokenizer_init=True, seed=3, max_num_seqs=3) as llm:
        return folder, dtype, llm.generate(prompts, sampling, samples=2)


def sequence_of(rollout, *, routing=False, weights=False):
    ids = np.array([*rollout.prompt_ids, *rollout.output_ids])
    shape = (len(ids) - 1, -1, 2)
    routing_ids = np.frombuffer(rollout.routing_ids, np.uint8).reshape(shape).astype(np.int64)
    recorded = np.frombuffer(rollout.routing_weights, np.float32).reshape(shape)
    return TrainSequence(
        ids=ids,
        num_prompt=len(rollout.prompt_ids),
        temperature=rollout.sampling.temperature,
        kept=rollout.kept_ids,
        routing_ids=routing_ids if routing else None,
        routing_weights=recorded.copy() if weights else None,
    )


def assert_bits(ring, sequences, rollouts):
    """Every logprob of the engine, to the last bit of float32."""
    scores = ring(pack(sequences))
    sampled = [lp for rollout in rollouts for lp in rollout.lp_sampled]
    difference = (scores.lp.double() - torch.tensor(sampled, dtype=torch.float64)).abs()
    cut = torch.tensor([len(ids) > 0 for rollout in rollouts for ids in rollout.kept_ids])
    assert 0 < int(cut.sum()) < len(cut)
    assert difference[~cut].max() == 0
    # the engine keeps the mass of a cut support in float64
    assert difference[cut].max() < 1e-6
    return scores


def test_exact_logprobs_are_the_engine_s(rollouts):
    folder, dtype, sampled = rollouts
    ring = open_trainable(folder, numerics="exact", dtype=DTYPES[dtype])
    sequences = [sequence_of(rollout) for rollout in sampled]
    scores = assert_bits(ring, sequences, sampled)
    recorded = [sequence_of(rollout, routing=True).routing_ids for rollout in sampled]
    np.testing.assert_array_equal(
        scores.routing_ids.transpose(0, 1).numpy(), np.concatenate(recorded)
    )
    # whatever the packing: turned round, alone, and with routes replayed
    assert_bits(ring, sequences[::-1], sampled[::-1])
    alone = [sequence_of(r, routing=True, weights=True) for r in sampled[3:5]]
    assert_bits(ring, alone, sampled[3:5])


def test_exact_gradients_are_the_plain_ones_to_rounding(rollouts):
    folder, dtype, sampled = rollouts
    batch = pack([sequence_of(rollout, routing=True) for rollout in sampled])
    grads = {
        numerics: gradients(open_trainable(folder, numerics=numerics, dtype=DTYPES[dtype]), [batch])
        for numerics in ("plain", "exact")
    }
    share = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    for name, grad in grads["exact"].items():
        plain = grads["plain"][name]
        assert (grad - plain).float().norm() <= share * plain.float().norm(), name


def test_plain_logprobs_are_the_engine_s_to_rounding(rollouts):
    folder, dtype, sampled = rollouts
    ring = open_trainable(folder, dtype=DTYPES[dtype])
    scores = ring(pack([sequence_of(rollout, routing=True) for rollout in sampled]))
    expected = torch.tensor([lp for rollout in sampled for lp in rollout.lp_sampled])
    difference = (scores.lp - expected).abs()
    assert difference.mean() < {"float32": 1e-6, "bfloat16": 0.05}[dtype]


# -- what cannot be trained


def test_fp8_weights_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path, Drawn(config=base_config(), dtype="bfloat16", fp8="block"))
    with pytest.raises(CheckpointError, match="FP8 weights cannot be trained; accepted: a bfl"):
        trainable_config(folder)


def test_a_checkpoint_of_another_shape_is_refused(folder, tmp_path):
    other = write_checkpoint(tmp_path, Drawn(config=base_config(vocab_size=91)))
    with pytest.raises(CheckpointError, match="is not that of the model in training"):
        open_trainable(folder).load(other)


def test_a_default_router_bias_is_zero(tmp_path):
    config = base_config(vocab_size=90, moe_router_enable_expert_bias=False)
    folder = write_checkpoint(tmp_path, Drawn(config=config))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.expert_bias"]
    save_file(tensors, folder / "model.safetensors")
    assert open_trainable(folder)(pack(some_sequences(1))).lp.isfinite().all()


# -- packing


@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=60), most=st.integers(1, 64))
def test_split_loses_nothing_and_keeps_the_limit(rows, most):
    groups = split(rows, most)
    assert sorted(n for group in groups for n in group) == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or sum(rows[n] for n in group) <= most


def test_what_cannot_be_packed_is_said():
    [one, two] = some_sequences(2)
    routed = replace(one, routing_ids=np.zeros((one.num_rows, 1, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="some sequences have routing_ids and others have none"):
        pack([routed, two])
    with pytest.raises(ValueError, match="two tokens at least"):
        pack([replace(one, ids=one.ids[:1])])
