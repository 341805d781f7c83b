"""What the runner records beside the tokens, against teacher forcing; and values that are not finite."""

import asyncio
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from everstep import kernels
from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.config import EngineConfig, KVConfig, ModelConfig
from everstep.engine.core.core import build
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Add, Tokens
from everstep.engine.model import teacher
from everstep.engine.model.weights import load_weights
from everstep.engine.native import ThreadBackend
from everstep.engine.proofs.determinism import Laboratory
from everstep.engine.rollout import FinishReason, Rollout, SamplingParams

PROMPT = [(11 * i * i + 5) % 250 for i in range(40)]


def generate(folder, sampling, prompts, **batch) -> list[Rollout]:
    async def body():
        config = EngineConfig(
            model=ModelConfig(path=str(folder), max_model_len=128),
            kv=KVConfig(num_blocks=40),
            num_threads=1,
        )
        manager = RolloutManager(ThreadBackend(config), None)
        await manager.start()
        try:
            found = []
            each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
            for prompt, params in zip(prompts, each, strict=True):
                found += manager.submit(Submission(prompt_ids=prompt, sampling=params))
            return [await manager.wait(r.id) for r in found]
        finally:
            await manager.close()

    return asyncio.run(body())


def log_softmax(logits):
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def recorded(tiny_checkpoint):
    sampling = SamplingParams(
        temperature=0.7,
        top_k=9,
        max_tokens=12,
        seed=4,
        ignore_eos=True,
        prompt_logprobs=3,
        top_logprobs=4,
        record=("lp_raw", "entropy", "kept_ids", "routing"),
    )
    # the second request finds its prompt in the cache, and must not look at it
    first, second = generate(tiny_checkpoint, sampling, [PROMPT, PROMPT])
    score = teacher.score(tiny_checkpoint, [*first.prompt_ids, *first.output_ids])
    return first, second, score


def test_a_prompt_in_the_cache_gives_the_same_records(recorded):
    first, second, _ = recorded
    for name in ("prompt_lp", "prompt_top", "routing_ids", "routing_weights", "output_ids", "top"):
        assert getattr(first, name) == getattr(second, name), name


def test_prompt_logprobs_are_those_of_teacher_forcing(recorded):
    rollout, _, score = recorded
    lp = log_softmax(score.logits)
    assert rollout.prompt_lp[0] is None
    expected = [lp[i, PROMPT[i + 1]] for i in range(len(PROMPT) - 1)]
    np.testing.assert_allclose(rollout.prompt_lp[1:], expected, atol=2e-6)
    for i, top in enumerate(rollout.prompt_top[1:]):
        assert [token for token, _ in top] == np.argsort(-lp[i], kind="stable")[:3].tolist()


def test_output_records_follow_from_the_logits_of_teacher_forcing(recorded):
    rollout, _, score = recorded
    start = len(PROMPT) - 1
    raw = log_softmax(score.logits[start:-1])
    tempered = log_softmax(score.logits[start:-1] / 0.7)
    for i, token in enumerate(rollout.output_ids):
        kept = np.sort(np.argsort(-tempered[i], kind="stable")[:9])
        assert rollout.kept_ids[i] == kept.tolist()
        mass = np.exp(tempered[i, kept]).sum()
        np.testing.assert_allclose(rollout.lp_raw[i], raw[i, token], atol=2e-6)
        np.testing.assert_allclose(rollout.lp_temp[i], tempered[i, token], atol=2e-6)
        np.testing.assert_allclose(rollout.kept_mass[i], mass, atol=2e-6)
        np.testing.assert_allclose(
            rollout.lp_sampled[i], tempered[i, token] - np.log(mass), atol=4e-6
        )
        entropy = -(np.exp(tempered[i]) * tempered[i]).sum()
        np.testing.assert_allclose(rollout.entropy[i], entropy, atol=1e-5)
        assert [t for t, _ in rollout.top[i]] == np.argsort(-raw[i], kind="stable")[:4].tolist()


def test_routing_covers_every_computed_position_in_slot_order(recorded):
    rollout, _, score = recorded
    shape = score.routing_ids[:-1].shape
    ids = np.frombuffer(bytes(rollout.routing_ids), np.uint8).reshape(shape)
    weights = np.frombuffer(bytes(rollout.routing_weights), np.float32).reshape(shape)
    assert np.array_equal(ids, score.routing_ids[:-1])
    assert np.array_equal(weights, score.routing_weights[:-1])


def test_generation_equals_teacher_forcing_to_the_bit(tiny_checkpoint):
    [rollout] = generate(
        tiny_checkpoint, SamplingParams(max_tokens=20, seed=1, ignore_eos=True), [PROMPT]
    )
    score = teacher.score(tiny_checkpoint, [*PROMPT, *rollout.output_ids])
    lp = kernels.log_softmax(torch.from_numpy(score.logits))[len(PROMPT) - 1 : -1]
    chosen = lp.gather(1, torch.tensor(rollout.output_ids).unsqueeze(1))[:, 0]
    assert chosen.tolist() == rollout.lp_temp


@pytest.mark.parametrize("bad_layer", [None, 2])
def test_a_value_that_is_not_finite_ends_that_rollout_alone_and_names_step_and_layer(
    tiny_checkpoint, bad_layer
):
    weights = load_weights(
        Checkpoint.open(tiny_checkpoint), ModelConfig(), on_progress=lambda *_: None
    )
    good = Add(
        rollout_id="good", prompt_ids=PROMPT, sampling=SamplingParams(), seed=1, max_tokens=6
    )
    trial = Laboratory(weights, max_len=64).trial()
    trial.add(good)
    trial.run()
    expected = trial.outcomes["good"]

    poison = 199
    embedding = weights.embedding.clone()
    embedding[poison] = float("nan") if bad_layer is None else 1e-3
    broken = replace(weights, embedding=embedding)
    if bad_layer is not None:
        layer = weights.layers[bad_layer]
        norm = layer.input_norm.clone()
        norm[:] = float("inf")
        layers = list(weights.layers)
        layers[bad_layer] = replace(layer, input_norm=norm)
        broken = replace(broken, layers=tuple(layers))
    trial = Laboratory(broken, max_len=64).trial()
    ended = {}
    take = trial._take

    def spy(messages):
        take(messages)
        for message in messages:
            if isinstance(message, Tokens):
                ended.update({t.rollout_id: t.finish for t in message.each() if t.finish})

    trial._take = spy
    if bad_layer is None:
        trial.add(good)
    bad = Add(
        rollout_id="bad", prompt_ids=[1, 2, poison], sampling=SamplingParams(), seed=1, max_tokens=6
    )
    trial.add(bad)
    trial.run()
    finish = ended["bad"]
    assert finish.type == "error"
    assert (
        finish.detail == f"nonfinite: step {finish.detail.split()[2][:-1]}, layer {bad_layer or 0}"
    )
    assert trial.outcomes["bad"].ids == []
    if bad_layer is None:
        assert trial.outcomes["good"].first_difference(expected) is None
        # what the broken rollout wrote is in nobody's cache
        trial.add(replace_id(bad, "again", [1, 2, 3]))
        trial.run()
        assert ended["again"].type == "length"


def test_a_draw_beyond_float32_ends_that_rollout_alone(tiny_checkpoint):
    # a head with huge, finite logits: ÷ 0.001 leaves float32, ÷ 1 does not
    weights = load_weights(
        Checkpoint.open(tiny_checkpoint), ModelConfig(), on_progress=lambda *_: None
    )
    broken = replace(weights, norm=weights.norm * 1e36)
    trial = Laboratory(broken, max_len=64).trial()
    ended = {}
    take = trial._take

    def spy(messages):
        take(messages)
        for message in messages:
            if isinstance(message, Tokens):
                ended.update({t.rollout_id: t.finish for t in message.each() if t.finish})

    trial._take = spy
    for name, temperature in (("bad", 0.001), ("good", 1.0)):
        sampling = SamplingParams(temperature=temperature)
        trial.add(Add(rollout_id=name, prompt_ids=PROMPT, sampling=sampling, seed=1, max_tokens=6))
    trial.run()
    assert ended["good"].type == "length"
    assert ended["bad"].type == "error"
    assert ended["bad"].detail.endswith("(penalties, temperature)")


@pytest.mark.parametrize("max_tokens", [1, 6])
def test_a_row_that_cannot_be_run_ends_its_rollout_and_the_others_keep_their_bits(
    tiny_checkpoint, monkeypatch, max_tokens
):
    def draw(logits, rules, *, seeds, **columns):
        if 13 in seeds:
            raise IndexError("no such\nindex")
        return kernels.draw(logits, rules, seeds=seeds, **columns)

    monkeypatch.setattr("everstep.engine.model.drawing.draw", draw)
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=1, record=("routing",))
    prompts = [PROMPT, PROMPT[:9], PROMPT[:20]]
    seeds = [msgspec.structs.replace(params, seed=seed) for seed in (1, 13, 2)]
    first, bad, second = generate(tiny_checkpoint, seeds, prompts)
    assert bad.finish_reason == FinishReason("error", detail="internal: IndexError: no such index")
    assert bad.output_ids == []
    for rollout, sampling, prompt in (
        (first, seeds[0], prompts[0]),
        (second, seeds[2], prompts[2]),
    ):
        [alone] = generate(tiny_checkpoint, [sampling], [prompt])
        for name in ("output_ids", "lp_sampled", "prompt_lp", "routing_ids", "routing_weights"):
            assert getattr(rollout, name) == getattr(alone, name), name


def replace_id(add: Add, rollout_id: str, prompt: list[int]) -> Add:
    return Add(
        rollout_id=rollout_id,
        prompt_ids=prompt,
        sampling=add.sampling,
        seed=add.seed,
        max_tokens=add.max_tokens,
    )


def test_the_numerics_id_tells_rotary_tables_apart(tiny_checkpoint):
    ids = set()
    for rope_tables in ("float32", "model"):
        config = EngineConfig(
            model=ModelConfig(
                path=str(tiny_checkpoint),
                dtype="bfloat16",
                max_model_len=64,
                rope_tables=rope_tables,
            ),
            kv=KVConfig(num_blocks=16),
        )
        _, ready = build(config, lambda _: None)
        ids.add(ready.numerics)
    assert len(ids) == 2
