"""A training run as processes: ranks agree, a killed run is the unkilled one to the bit, and what
comes out is a checkpoint that the engine runs and its reference confirms."""

import json
import re
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from everstep.clients.llm import LLM
from everstep.engine.errors import CheckpointError, ConfigError
from everstep.engine.proofs.verify import verify
from everstep.engine.rollout import SamplingParams
from everstep.trainer_bridge.fsdp_trainer import train
from everstep.trainer_bridge.losses.losses import LossInputs, make_loss
from everstep.trainer_bridge.trainer.checkpointing import STABLE, Checkpoints
from everstep.trainer_bridge.trainer.config import read_config
from everstep.trainer_bridge.trainer.export import export
from everstep.trainer_bridge.trainer.optimiser import whole_of
from everstep.trainer_bridge.trainer.packing import TrainSequence, pack
from everstep.trainer_bridge.trainer.sharding import join_world
from everstep.trainer_bridge.trainer.trainable import open_trainable
from everstep.trainer_bridge.trainer.trainer import Trainer
from everstep.trainer_bridge.trajectories.samples import Group, Sample, sample_of

from ..engine.ring_draws import Draw as Drawn
from ..engine.ring_draws import base_config, write_checkpoint
from .loss_reference import Token, objective
from .training_runs import VOCAB, free_port, make_run, reports, start, write_config


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the processes have: torch's bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def finished(folder):
    """A whole run in this process: its output folder."""
    said = []
    train(read_config(write_config(folder, "whole")), said.append)
    assert said[-1] == f"6 iterations; the model is in {folder / 'whole' / 'final'}"
    return folder / "whole"


def untimed(report):
    return {name: report[name] for name in report if name not in ("seconds", "spent", "time_s")}


def weights(output):
    return load_file(output / "final" / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_killed_run_goes_on_to_the_same_bits(folder, finished):
    config = write_config(folder, "killed", numerics={"recompute": True})
    output = folder / "killed"
    process = start(config)
    try:
        deadline = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists() or len(reports(output)) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    stable = Checkpoints(output / "checkpoints", keep=2).stable()
    assert not (output / "final").exists()
    assert stable
    # what a kill in the middle of a checkpoint leaves
    shutil.copytree(stable[-1], output / "checkpoints" / "00000009")
    (output / "checkpoints" / "00000009" / STABLE).unlink()
    said = []
    train(read_config(config), said.append)
    assert said[0].startswith(f"goes on from {stable[-1]}: ")
    assert_same_weights(weights(output), weights(finished))
    assert list(map(untimed, reports(output))) == list(map(untimed, reports(finished)))


def test_an_interrupted_run_says_where_it_goes_on(folder):
    # who runs the tests may have made its children deaf to Ctrl-C
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        process = start(write_config(folder, "stopped", source={"epochs": 10_000}))
    finally:
        signal.signal(signal.SIGINT, before)
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=60)
    assert first.split()[0] == "1"
    assert process.returncode == 130, err
    assert re.fullmatch(
        r"interrupted after \d+ iterations; the same command goes on after \d+",
        said.splitlines()[-1],
    )
    assert "Traceback" not in err


def test_two_ranks_train_what_one_does(folder, finished):
    config, port = write_config(folder, "two"), free_port()
    ranks = [start(config, rank=rank, size=2, port=port) for rank in range(2)]
    for process in ranks:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    for ours, alone in zip(reports(folder / "two"), reports(finished), strict=True):
        for name in ("version", "samples", "tokens", "rows", "trained_groups", "reward", "lr"):
            assert ours[name] == alone[name], name
        assert ours["loss"] == pytest.approx(alone["loss"], abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=2e-4)
        assert ours["metrics"]["kl_k3"] == pytest.approx(alone["metrics"]["kl_k3"], rel=1e-4)
    one, other = weights(folder / "two"), weights(finished)
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() < 2e-3, name
    # the first rank's rewards are those of both
    source = {"epochs": 1, "rescore": True}
    reward = {"name": "regex", "regex": {"pattern": "[02468]$"}}
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for place, line in enumerate(lines):
        line["text"] = f"n{place}"
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source["path"] = str(folder / "texts.jsonl")
    config, port = write_config(folder, "scored", source=source, reward=reward), free_port()
    ranks = [start(config, rank=rank, size=2, port=port) for rank in range(2)]
    for rank, process in enumerate(ranks):
        said, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert ("30 responses were scored by [reward] regex" in said) == (rank == 0)
    assert [report["reward"] for report in reports(folder / "scored")] == [0.5] * 3
    # one rank takes up what two have left
    said = []
    train(read_config(write_config(folder, "two", source={"epochs": 3})), said.append)
    assert said[0].endswith("00000006: 6 iterations were trained")
    assert said[1] == "settings changed: source.epochs was 2 and is 3"
    assert [report["version"] for report in reports(folder / "two")] == list(range(1, 10))


def test_a_report_says_what_was_trained_and_where_the_time_went(folder, finished):
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rewards = np.array([line["reward"] for line in lines[:12]])
    first, *_, last = reports(finished)
    assert (first["groups"], first["samples"], last["groups"]) == (4, 12, 2)
    assert first["length_max"] == max(len(line["output_ids"]) for line in lines[:12])
    assert first["reward"] == pytest.approx(rewards.mean())
    assert first["reward_std"] == pytest.approx(rewards.std())
    # a checkpoint after every second iteration is on the account of the next
    parts = [
        {"wait", "score", "train", "publish"} | ({"save"} if n in (2, 4) else set())
        for n in range(6)
    ]
    assert [set(report["spent"]) for report in reports(finished)] == parts
    for report in (first, last):
        assert report["spent"]["score"] + report["spent"]["train"] == pytest.approx(
            report["seconds"]
        )
    assert sorted(reports(finished), key=lambda report: report["time_s"]) == reports(finished)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": "sft"}, 'objective was "rl" in .*00000006, and is "sft": another objective'),
        ({"batch": {"groups": 5}}, "batch.groups was 4 in .*, and is 5: iterations over files"),
        ({"source": {"shuffle": 1}}, "source.shuffle was null in .*, and is 1: iterations over"),
    ],
)
def test_what_may_not_change_in_a_run_is_refused(folder, finished, sections, message):
    shutil.copytree(finished, folder / "changed", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=message):
        train(read_config(write_config(folder, "changed", **sections)), lambda line: None)


def test_the_export_is_what_the_engine_runs(finished):
    report = verify(finished / "final", dtype="float32", num_tokens=12)
    assert report.passed, report.failures
    ring = open_trainable(finished / "final")
    assert torch.isfinite(ring(pack([TrainSequence(np.arange(9), 2)])).lp).all()


def test_a_sharded_update_is_that_of_torch_s_own_optimiser(folder):
    """One update, written down once more: no ranks, no microbatches, torch.optim over one graph."""
    config = read_config(write_config(folder, "unused", batch={"groups": 2, "max_rows": 10}))
    groups = drawn_groups()
    with join_world("cpu") as world:
        trainer = Trainer(config, world, folder / "model")
        report = trainer.step(groups)
        trained = {
            name: whole_of(t.detach()).clone() for name, t in trainer.ring.named_parameters()
        }
    ring = open_trainable(folder / "model")
    adam = torch.optim.AdamW(ring.parameters(), lr=1e-2, weight_decay=0.01)
    samples = [s for group in groups for s in group.samples]
    batch = pack([s.sequence for s in samples])
    output = make_loss(config.loss)(
        LossInputs(
            lp_new=ring(batch).lp[None],
            lp_infer=torch.from_numpy(np.concatenate([s.lp_infer for s in samples]))[None],
            advantages=torch.tensor(
                [s.advantage for s in samples for _ in range(s.num_tokens)], dtype=torch.float32
            )[None],
            mask=torch.ones(1, len(batch.wanted), dtype=torch.bool),
            sequence_ids=batch.responses[0][None],
        )
    )
    output.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(ring.parameters(), 1.0)
    adam.step()
    assert report.grad_norm[0] == pytest.approx(float(norm), rel=1e-5)
    assert report.loss == pytest.approx(float(output.loss.detach()), abs=1e-6)
    for name, parameter in ring.named_parameters():
        # an update is about lr; where a gradient is nearly 0 its sign is rounding
        assert (parameter - trained[name]).abs().mean() < 2e-5, name


def drawn_groups(seed=1, count=2):
    random = np.random.default_rng(seed)
    groups = []
    for n in range(count):
        samples = []
        for m in range(3):
            ids = random.integers(0, VOCAB, random.integers(4, 12))
            size = len(ids) - 2
            lp = random.uniform(-5, -3.5, size).astype(np.float32)
            samples.append(
                Sample(TrainSequence(ids, 2), lp, np.zeros(size, dtype=np.int64), reward=float(m))
            )
        groups.append(Group.of(f"g{n}", samples))
    return groups


# -- what the loss compares with


@contextmanager
def a_trainer(folder, **sections):
    config = read_config(write_config(folder, "unused", **sections))
    with join_world("cpu") as world:
        yield Trainer(config, world, folder / "model")


def test_updates_of_one_batch_share_the_old_logprobs(folder):
    with a_trainer(folder, batch={"updates": 2}) as trainer:
        report = trainer.step(drawn_groups(count=4))
        assert len(report.grad_norm) == 2
        assert trainer.optimiser.num_updates == 2
        assert trainer.version == 1
        # the mask compares the weights before both updates with the engine
        before = report.metrics["log_ratio_abs_mean"]
    with a_trainer(folder, optim={"lr": 0.0}) as trainer:
        assert trainer.step(drawn_groups(count=4)).metrics["log_ratio_abs_mean"] == pytest.approx(
            before, abs=1e-6
        )


def test_exact_old_logprobs_are_those_of_each_token_s_version(folder):
    exact = {"numerics": {"kernels": "exact"}, "loss": {"old_policy": "exact"}}
    with a_trainer(folder, hold_versions=2, **exact) as trainer:
        groups = drawn_groups(count=2)
        sequences = [s.sequence for group in groups for s in group.samples]
        by_version = []
        for _ in range(2):
            by_version.append(trainer.score(sequences))
            trainer.step(groups)
        # the engine sampled every second token with version 1, and had the trainer's own numbers
        of_both = []
        for place, sample in enumerate(s for group in groups for s in group.samples):
            versions = np.arange(sample.num_tokens) % 2 + 1
            newer = trainer.score([sample.sequence])[0]
            lp = torch.where(torch.from_numpy(versions == 1), by_version[1][place], newer)
            of_both.append(replace(sample, versions=versions, lp_infer=lp.numpy()))
        report = trainer.step([Group.of("both", of_both)])
        assert report.metrics["log_ratio_abs_max"] == 0
        assert report.metrics["lag_max"] == 1
        assert report.metrics["proximal_fraction"] == 0


def test_a_token_whose_weights_are_gone_has_the_proximal_old_policy(folder, caplog):
    """Against the formulas in Python's floats (loss_reference.py), token by token."""
    exact = {"numerics": {"kernels": "exact"}, "loss": {"old_policy": "exact"}}
    with a_trainer(folder, hold_versions=2, **exact) as trainer:
        groups = drawn_groups(count=2)
        sequences = [s.sequence for s in groups[0].samples]
        lp = [trainer.score(sequences)]
        for _ in range(2):
            trainer.step(groups)
            lp.append(trainer.score(sequences))
        # weights 1 and 2 are held, 2 are in training; the engine is off by what some masks catch
        random, members, batch = np.random.default_rng(0), [], []
        for place, sample in enumerate(groups[0].samples):
            versions = np.arange(sample.num_tokens) % 3
            infer = np.array(
                [float(lp[v][place][t]) for t, v in enumerate(versions)]
            ) + random.choice([-2.0, -0.1, 0.1, 1.0], sample.num_tokens)
            infer = np.minimum(infer, 0).astype(np.float32)
            members.append(replace(sample, versions=versions, lp_infer=infer))
            new = lp[2][place].tolist()
            old = [float(lp[v or 2][place][t]) for t, v in enumerate(versions)]
            batch.append([Token(*one) for one in zip(new, old, infer.tolist(), strict=True)])
        group = Group.of("held", members)
        for tokens, sample in zip(batch, group.samples, strict=True):
            for token in tokens:
                token.advantage = sample.advantage
        value, _, kept = objective("icepop", batch, alpha=0.5, beta=5.0)
        report = trainer.step([group])
        again = trainer.step([group])
    assert report.loss == pytest.approx(-value, abs=2e-6)
    flat = [keep for row in kept for keep in row]
    assert 0 < report.metrics["mask_fraction"] == pytest.approx(1 - sum(flat) / len(flat))
    all_versions = np.concatenate([s.versions for s in members])
    assert report.metrics["proximal_fraction"] == pytest.approx((all_versions == 0).mean())
    assert report.metrics["proximal_fraction/lag2"] == 1
    assert report.metrics["proximal_fraction/lag1"] == 0
    # weights 1 are gone by now, and it is said once
    assert again.metrics["proximal_fraction"] == pytest.approx((all_versions < 2).mean())
    told = [record for record in caplog.records if record.message == "trainer.weights_gone"]
    assert [(r.fields["iteration"], r.fields["hold_versions"]) for r in told] == [(2, 2)]


def test_a_response_of_no_tokens_counts_in_the_batch(folder):
    """1/G over all responses, and the baseline of all rewards (PAPER.md §1.1)."""
    [group] = drawn_groups(count=1)
    with_empty = Group.of("g", group.samples, empty=[4.0, None])
    assert with_empty.samples[0].advantage != group.samples[0].advantage
    with a_trainer(folder, optim={"lr": 0.0}) as trainer:
        new = trainer.score([s.sequence for s in group.samples])
        report = trainer.step([with_empty])
    batch = [
        [
            Token(*one, infer, advantage=sample.advantage)
            for one, infer in zip(zip(lp, lp, strict=True), sample.lp_infer.tolist(), strict=True)
        ]
        for lp, sample in zip(map(torch.Tensor.tolist, new), with_empty.samples, strict=True)
    ]
    value, _, _ = objective("icepop", [*batch, [], []], alpha=0.5, beta=5.0)
    assert report.loss == pytest.approx(-value, abs=2e-6)
    assert report.samples == 5
    assert report.reward == pytest.approx((0 + 1 + 2 + 4) / 4)


def test_the_reference_of_a_kl_penalty_stays_the_first_weights(folder):
    with a_trainer(folder, loss={"kl": {"coef": 0.1}}) as trainer:
        groups = drawn_groups(count=2)
        assert trainer.step(groups).metrics["kl_reference"] == pytest.approx(0, abs=1e-9)
        assert trainer.step(groups).metrics["kl_reference"] > 1e-6


def test_groups_that_teach_nothing_cost_nothing_and_count(folder):
    groups = drawn_groups(count=2)
    flat = [replace(s, reward=1.0) for s in groups[1].samples]
    with a_trainer(folder) as trainer:
        with_flat = trainer.step([groups[0], Group.of("flat", flat)])
    with a_trainer(folder) as trainer:
        alone = trainer.step(groups[:1])
    assert with_flat.rows == alone.rows
    assert with_flat.samples == 2 * alone.samples
    assert with_flat.trained_groups == 1
    # half of the sequences that the mean is over have no loss
    assert with_flat.grad_norm[0] == pytest.approx(alone.grad_norm[0] / 2, rel=1e-5)


def test_a_batch_of_nothing_makes_a_version_and_changes_no_weight(folder):
    with a_trainer(folder) as trainer:
        before = {name: whole_of(t.detach()).clone() for name, t in trainer.ring.named_parameters()}
        assert trainer.step([]).version == 1
        for name, parameter in trainer.ring.named_parameters():
            assert torch.equal(whole_of(parameter), before[name])


def test_supervised_warm_up_learns_its_lines(folder):
    random = np.random.default_rng(0)
    texts = [random.integers(0, VOCAB, 9) for _ in range(4)]
    nothing = np.zeros(6, dtype=np.float32), np.zeros(6, dtype=np.int64)
    groups = [
        Group.of(str(n), [Sample(TrainSequence(t, 3), *nothing)]) for n, t in enumerate(texts)
    ]
    with a_trainer(folder, objective="sft") as trainer:
        losses = [trainer.step(groups).loss for _ in range(12)]
        scored = trainer.score([TrainSequence(text, 3) for text in texts])
    assert losses[0] > 2
    assert losses[-1] < 0.3
    assert float(torch.cat(scored).mean()) > -0.3


# -- the engine's bits, through masters and shards


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_s_logprobs_of_a_trained_version_are_the_trainer_s(folder, tmp_path, dtype):
    numerics = {"kernels": "exact", "dtype": dtype}
    with a_trainer(folder, numerics=numerics) as trainer:
        trainer.step(drawn_groups())
        export(trainer.ring, folder / "model", tmp_path / "v1", trainer.dtype, trainer.world)
        sampling = SamplingParams(max_tokens=20, temperature=0.9, ignore_eos=True)
        with LLM(str(tmp_path / "v1"), skip_tokenizer_init=True, seed=1) as llm:
            rollouts = llm.generate([[1, 2, 3], [60], list(range(30))], sampling, samples=2)
        samples = [sample_of(rollout, trainer.ring.config) for rollout in rollouts]
        scored = trainer.score([sample.sequence for sample in samples])
        for sample, lp in zip(samples, scored, strict=True):
            assert np.array_equal(lp.numpy(), sample.lp_infer)
        rewarded = [replace(s, reward=float(n % 2)) for n, s in enumerate(samples)]
        report = trainer.step([Group.of("all", rewarded)])
    assert report.metrics["log_ratio_abs_max"] == 0
    assert report.grad_norm[0] > 0


# -- checkpoints


def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path):
    other = make_run(tmp_path, groups=1)
    shape = base_config(vocab_size=66)
    write_checkpoint(other / "model", Drawn(config=shape))
    with a_trainer(folder) as trainer:
        saved = Checkpoints(tmp_path / "checkpoints", keep=1).save(
            trainer.checkpoint_tensors(), trainer.state(), trainer.world
        )
    with (
        a_trainer(other) as trainer,
        pytest.raises(CheckpointError, match=r"does not fit this model: .*lm_head"),
    ):
        trainer.restore(saved)


def test_settings_that_need_older_weights_may_come_later(folder, tmp_path):
    groups = drawn_groups(count=2)
    with a_trainer(folder) as trainer:
        first = trainer.score([s.sequence for group in groups for s in group.samples])
        trainer.step(groups)
        saved = Checkpoints(tmp_path / "c", keep=1).save(
            trainer.checkpoint_tensors(), trainer.state(), trainer.world
        )
        now = trainer.score([s.sequence for group in groups for s in group.samples])
    later = {"old_policy": "exact", "kl": {"coef": 0.1}}
    with a_trainer(folder, loss=later) as trainer:
        trainer.restore(saved)
        newest = [
            Group(
                group.id,
                tuple(replace(s, versions=np.ones_like(s.versions)) for s in group.samples),
            )
            for group in groups
        ]
        found = trainer.step(newest).metrics["kl_reference"]
    # of the weights that the run began with, not of those that it went on from
    ratio = torch.cat(first) - torch.cat(now)
    assert found == pytest.approx(float((ratio.exp() - 1 - ratio).mean()), rel=1e-4)


@contextmanager
def files_of_at_most(num_bytes):
    """A disk that is full, as far as this process can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# from Python 3.13 on, what torch had half written says at its end that it cannot be flushed
@pytest.mark.filterwarnings(
    "ignore:Exception ignored.*NoCloseWriter:pytest.PytestUnraisableExceptionWarning"
)
def test_a_disk_that_is_full_costs_the_new_checkpoint_alone(folder, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    with a_trainer(folder) as trainer:
        first = checkpoints.save(trainer.checkpoint_tensors(), trainer.state(), trainer.world)
        trainer.step(drawn_groups())
        with (
            files_of_at_most(20_000),
            pytest.raises(CheckpointError, match="00000001 cannot be written: File too large"),
        ):
            checkpoints.save(trainer.checkpoint_tensors(), trainer.state(), trainer.world)
        assert list((tmp_path / "c").iterdir()) == [first]
        assert trainer.restore(first).version == 0


def test_memory_that_runs_out_is_said_with_what_to_set(folder, monkeypatch):
    config = read_config(write_config(folder, "large", batch={"max_rows": 77}))
    monkeypatch.setattr(Trainer, "step", lambda *_: torch.empty(1 << 50))
    with pytest.raises(ConfigError, match=r"no memory for iteration 0: .*batch\.max_rows than 77"):
        train(config, lambda _: None)


def test_old_checkpoints_go_and_incomplete_ones_are_not_seen(folder, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.stable() == []
    with a_trainer(folder) as trainer:
        for version in range(4):
            trainer.version = version
            checkpoints.save(trainer.checkpoint_tensors(), trainer.state(), trainer.world)
        found = checkpoints.stable()
        assert [path.name for path in found] == ["00000002", "00000003"]
        (found[1] / STABLE).unlink()
        assert checkpoints.stable() == found[:1]
        with pytest.raises(CheckpointError, match="00000003 is no complete checkpoint"):
            trainer.restore(found[1])
