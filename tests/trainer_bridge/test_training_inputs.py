"""What a trainer is given, settings and lines of trajectories: taken rightly, or refused in a line."""

import json
import re

import numpy as np
import pytest

from everstep import cli
from everstep.engine.errors import ConfigError
from everstep.engine.rollout import Rollout, SamplingParams, Segment
from everstep.engine.trajectory import pack, seal
from everstep.trainer_bridge.trainer.config import OptimConfig, read_config
from everstep.trainer_bridge.trainer.trainable import trainable_config
from everstep.trainer_bridge.trajectories.files import TrajectoryFiles

from .training_runs import make_run, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def test_the_learning_rate_warms_up_holds_and_falls():
    config = OptimConfig(lr=1.0, warmup_steps=4, decay_after=6, decay_steps=4, final_share=0.2)
    rates = [config.rate(step) for step in range(12)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"lrr": 1}}, "unknown setting optim.lrr .*; did you mean optim.lr"),
        ({"optim": {"lr": -1}}, "optim.lr must be a number of at least 0, got -1"),
        ({"numerics": {"kernels": "fast"}}, "numerics.kernels must be plain or exact, got 'fast'"),
        ({"loss": {"name": "pop"}}, "loss.name must be none, tis, mis, icepop, kpop or ipo"),
        ({"model": ""}, "model must be set"),
        (
            {"numerics": {"kernels": "exact", "device": "cuda"}},
            "numerics.kernels = 'exact' runs on",
        ),
        ({"objective": "sft", "batch": {"updates": 2}}, "batch.updates is for objective = 'rl'"),
    ],
)
def test_a_wrong_setting_is_said_in_one_line(folder, sections, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(write_config(folder, "wrong", **sections))
    assert "\n" not in str(caught.value)


GOOD = {"prompt_ids": [1, 2], "output_ids": [3, 4], "lp_sampled": [-1, -2], "reward": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": "high"}, "Expected `float | null`, got `str`"),
        ({"lp_sampled": [-1]}, "lp_sampled has 1 values for 2 tokens"),
        ({"output_ids": [3, 64]}, "an id is not below vocab_size 64"),
        ({"prompt_ids": []}, "Expected `array` of length >= 1"),
        ({"versions": [[0, 1]]}, "versions has 1 values for 2 tokens"),
        ({"lp_raw": [-1, -2], "lp_temp": [-1, -3]}, "temperature was not 1"),
        ({"temperature": 0}, "Expected `float` > 0.0"),
        ({"flags": [1, 5]}, "lp_temp is missing: flags say that sampling cut the support"),
        ({"flags": [1, 5], "kept_ids": [[3]]}, "kept_ids has 1 values for 2 tokens"),
        ({"flags": [1, 5], "kept_ids": [[], [64]]}, "kept_ids: an id is not below vocab_size 64"),
        ({"lp_raw": [-1]}, "lp_raw has 1 values for 2 tokens"),
    ],
)
def test_a_bad_line_is_named(folder, tmp_path, change, message):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n")
    config = read_config(write_config(folder, "lines", source={"path": str(file)}))
    with pytest.raises(ConfigError, match=f"lines.jsonl:3: .*{re.escape(message)}"):
        TrajectoryFiles.read(config, trainable_config(folder / "model"))


def test_a_response_without_a_reward_teaches_nothing_and_all_without_one_are_refused(
    folder, tmp_path
):
    file = tmp_path / "lines.jsonl"
    config = read_config(write_config(folder, "lines", source={"path": str(file)}))
    ring = trainable_config(folder / "model")
    rewards = [1, None, 0]
    lines = [json.dumps(GOOD | {"group_id": "a", "reward": reward}) for reward in rewards]
    file.write_text("\n".join(lines))
    [group] = TrajectoryFiles.read(config, ring).groups
    assert [sample.advantage for sample in group.samples] == pytest.approx([1, 0, -1], abs=1e-5)
    file.write_text(lines[1])
    with pytest.raises(ConfigError, match=r"reward is missing on every line of .*lines\.jsonl"):
        TrajectoryFiles.read(config, ring)


def test_what_was_forced_or_cut_is_scored_as_it_was_sampled(folder, tmp_path):
    line = GOOD | {"output_ids": [3, 4, 5], "lp_sampled": [-1, -2, 0], "flags": [1, 5, 2]}
    file = tmp_path / "lines.jsonl"
    file.write_text(
        json.dumps(line | {"lp_temp": [-1.5, -2.5, -9], "group_id": "a"})
        + "\n"
        + json.dumps(line | {"kept_ids": [[], [4, 9], []], "reward": 0, "group_id": "a"})
    )
    config = read_config(write_config(folder, "lines", source={"path": str(file)}))
    [group] = TrajectoryFiles.read(config, trainable_config(folder / "model")).groups
    uncut, kept = group.samples
    assert uncut.scored(uncut.lp_infer).tolist() == [-1.5, -2.5]
    assert uncut.sequence.kept is None
    assert kept.scored(kept.lp_infer).tolist() == [-1, -2]
    assert kept.sequence.kept == [[], [4, 9], []]
    assert (kept.num_tokens, kept.advantage) == (2, pytest.approx(-1, abs=1e-5))


def test_sealed_trajectories_bring_their_routes(folder, tmp_path):
    rollout = Rollout(
        id="r",
        group_id="g",
        prompt_ids=[1, 2, 3],
        sampling=SamplingParams(temperature=0.5),
        seed=1,
        max_tokens=2,
        output_ids=[4, 5],
        lp_sampled=[-1.0, -2.0],
        lp_temp=[-1.0, -2.0],
        kept_mass=[1.0, 1.0],
        flags=[1, 1],
        versions=[0, 0],
        segments=[Segment(start=0, version=0, digest="", numerics="", core="")],
        metadata={"reward": 0.5},
        routing_ids=bytearray(range(8)),
        routing_weights=bytearray(np.arange(8, dtype=np.float32).tobytes()),
    )
    (tmp_path / "a.evst").write_bytes(seal(pack(rollout)))
    settings = {"source": {"path": str(tmp_path)}, "routing_replay": "weights"}
    config = read_config(write_config(folder, "sealed", **settings))
    [group] = TrajectoryFiles.read(config, trainable_config(folder / "model")).groups
    [sample] = group.samples
    assert (sample.reward, sample.sequence.temperature) == (0.5, 0.5)
    assert sample.sequence.routing_ids.reshape(-1).tolist() == list(range(8))
    assert sample.sequence.routing_weights.shape == (4, 1, 2)
    (tmp_path / "b.evst").write_bytes(b"EVST and no more")
    with pytest.raises(ConfigError, match=r"b\.evst: .*cut after 16 bytes"):
        TrajectoryFiles.read(config, trainable_config(folder / "model"))


def test_one_setting_is_changed_on_the_command_line(folder, capsys):
    file = write_config(folder, "said")
    assert cli.run(["train", str(file), "--set", "loss.name=pop"]) == 2
    assert "loss.name must be none, tis" in capsys.readouterr().err
    assert cli.run(["train", str(file), "--set", "lr"]) == 2
    assert "--set lr: accepted: NAME=VALUE" in capsys.readouterr().err
