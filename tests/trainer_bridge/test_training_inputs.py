"""What a trainer is given, settings and lines of trajectories: taken rightly, or refused in a line."""

import json
import math
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from msgspec.structs import replace

from everstep import cli
from everstep.engine.errors import ConfigError
from everstep.engine.rollout import Rollout, SamplingParams, Segment
from everstep.engine.trajectory import pack, seal
from everstep.trainer_bridge.trainer.config import OptimConfig, read_config
from everstep.trainer_bridge.trainer.sharding import join_world
from everstep.trainer_bridge.trainer.sources import FileSource
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
    halves = OptimConfig(lr=1.0, decay_after=1, decay_steps=4, decay="cosine", final_share=0.2)
    fall = [0.2 + 0.8 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(5)]
    assert [halves.rate(step) for step in range(7)] == pytest.approx([1, *fall[1:], 0.2, 0.2])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"lrr": 1}}, "unknown setting optim.lrr .*; did you mean optim.lr"),
        (
            {"rewards": {"name": "exact"}},
            "unknown setting rewards.name .*; did you mean reward.name",
        ),
        ({"optim": {"lr": -1}}, "optim.lr must be a number of at least 0, got -1"),
        ({"numerics": {"kernels": "fast"}}, "numerics.kernels must be plain or exact, got 'fast'"),
        ({"loss": {"name": "pop"}}, "loss.name must be none, tis, mis, icepop, kpop or ipo"),
        ({"model": ""}, "model must be set"),
        (
            {"numerics": {"kernels": "exact", "device": "cuda"}},
            "numerics.kernels = 'exact' runs on",
        ),
        ({"objective": "sft", "batch": {"updates": 2}}, "batch.updates is for objective = 'rl'"),
        ({"source": {"rescore": True}}, "source.rescore needs a table .reward."),
        ({"reward": {"name": "best"}}, "reward.name must be exact, numeric, regex, function or ht"),
        ({"reward": {"name": "regex"}}, "reward.regex.pattern is empty: give a pattern"),
        ({"objective": "sft", "reward": {"name": "exact"}}, "reward is for objective = 'rl'; sft"),
        (
            {"source": {"path": "", "endpoint": "tcp://127.0.0.1:9"}, "reward": {"name": "exact"}},
            "reward is for source.path .files.; what an engine deals",
        ),
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
        ({"reward": 1e31}, "reward must be finite and at most 1e+30, got 1e+31"),
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
    with pytest.raises(
        ConfigError, match=r"reward is missing on every line of .*lines\.jsonl, and"
    ):
        TrajectoryFiles.read(config, ring)


def test_a_shuffled_epoch_has_every_group_once_in_an_order_of_its_own(folder):
    ring = trainable_config(folder / "model")

    def epochs(**source):
        config = read_config(write_config(folder, "order", source={"epochs": 3} | source))
        files, found = TrajectoryFiles.read(config, ring), []
        while groups := files.batch(len(found), 4, config.source):
            found.append([group.id for group in groups])
        # ten groups, in batches of four
        assert [len(ids) for ids in found] == [4, 4, 2] * 3
        return [[name for ids in found[n : n + 3] for name in ids] for n in (0, 3, 6)]

    plain = epochs()
    assert plain == [[f"g{n}" for n in range(10)]] * 3
    shuffled = epochs(shuffle=1)
    assert shuffled == epochs(shuffle=1) != epochs(shuffle=2)
    assert [sorted(epoch) for epoch in shuffled] == plain
    assert len({tuple(epoch) for epoch in shuffled} | {tuple(plain[0])}) == 4


def test_a_response_of_no_tokens_is_in_its_group(folder, tmp_path):
    file = tmp_path / "lines.jsonl"
    nothing = GOOD | {"output_ids": [], "lp_sampled": [], "reward": 0}
    file.write_text("\n".join(json.dumps(one | {"group_id": "a"}) for one in (GOOD, nothing)))
    config = read_config(write_config(folder, "lines", source={"path": str(file)}))
    [group] = TrajectoryFiles.read(config, trainable_config(folder / "model")).groups
    assert (len(group.samples), group.empty, group.num_responses) == (1, (0.0,), 2)
    assert group.samples[0].advantage == pytest.approx(1, abs=1e-5)
    sft = read_config(write_config(folder, "sft", objective="sft", source={"path": str(file)}))
    with pytest.raises(ConfigError, match=r"lines\.jsonl:2: output_ids: .* one token at least"):
        TrajectoryFiles.read(sft, trainable_config(folder / "model"))


# -- a reward of the trainer's own

WORDS = GOOD | {"text": "a", "metadata": {"answer": "a"}, "group_id": "g"}
UNSCORED = {key: value for key, value in WORDS.items() if key != "reward"}


def scored(folder, tmp_path, lines, **sections):
    """The rewards that the groups of these lines have, and what was said."""
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    source = {"path": str(file)} | sections.pop("source", {})
    sections = {"reward": {"name": "exact"}, "source": source} | sections
    config, said = read_config(write_config(folder, "scored", **sections)), []
    with join_world("cpu") as world:
        files = FileSource(config, world, trainable_config(folder / "model"), said.append)
        groups = files.share(0)
    return [group.rewards for group in groups], said


def test_lines_without_a_reward_are_scored_and_others_keep_theirs(folder, tmp_path):
    lines = [
        WORDS | {"reward": 0.25},
        UNSCORED,
        UNSCORED | {"text": "b", "finish_reason": "length"},
        UNSCORED | {"output_ids": [], "lp_sampled": [], "text": "a "},
    ]
    rewards, said = scored(folder, tmp_path, lines)
    assert rewards == [[0.25, 1.0, 0.0, 1.0]]
    assert said == ["3 responses were scored by [reward] exact"]
    rewards, said = scored(folder, tmp_path, lines, source={"rescore": True})
    assert rewards == [[1.0, 1.0, 0.0, 1.0]]
    assert said == ["4 responses were scored by [reward] exact"]
    # nothing is left to score, so no text is needed
    assert scored(folder, tmp_path, [GOOD, GOOD | {"prompt": ["a", "b"]}]) == (
        [[1.0], [1.0]],
        ["every line has a reward: [reward] is not used; source.rescore = true scores them"],
    )


def test_a_reward_sees_the_line(folder, tmp_path, monkeypatch):
    (tmp_path / "seeing.py").write_text(
        "def see(sample):\n"
        "    assert sample.finish_reason == 'length' and sample.num_tokens == 2, sample\n"
        "    assert sample.prompt == 'why' and sample.metadata['answer'] == sample.answer == 'a'\n"
        "    return len(sample.text)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = UNSCORED | {"finish_reason": {"type": "length"}, "text": "four", "prompt": "why"}
    reward = {"name": "function", "function": {"path": "seeing:see"}}
    assert scored(folder, tmp_path, [line], reward=reward)[0] == [[4.0]]


def test_a_sample_whose_reward_fails_costs_itself_alone(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "failing.py").write_text(
        "import os, time\n"
        "def score(sample):\n"
        "    if sample.text == 'hangs': time.sleep(600)\n"
        "    if sample.text == 'dies': os._exit(3)\n"
        "    return float(sample.text)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = [UNSCORED | {"text": text} for text in ("0.5", "hangs", "dies", "nothing", "2")]
    reward = {"name": "function", "function": {"path": "failing:score"}, "deadline_s": 1.0}
    rewards, said = scored(folder, tmp_path, lines, reward=reward | {"on_failure": "drop"})
    assert rewards == [[0.5, None, None, None, 2.0]]
    assert said == ["5 responses were scored by [reward] function, which failed for 3"]
    failed = [r.fields["why"] for r in caplog.records if r.message == "trainer.reward_failed"]
    assert re.search(r"took more than 1 s for it; rollout .*lines\.jsonl:2 gets no rew", failed[0])
    assert "exit code 3" in failed[1]
    assert "ValueError" in failed[2]


def test_a_reward_that_cannot_be_used_ends_the_start_in_one_line(folder, tmp_path):
    reward = {"name": "function", "function": {"path": "no_such:score"}}
    with pytest.raises(ConfigError, match="reward no_such:score cannot be imported") as caught:
        scored(folder, tmp_path, [UNSCORED], reward=reward)
    assert "\n" not in str(caught.value)
    without = {key: value for key, value in UNSCORED.items() if key != "text"}
    with pytest.raises(ConfigError, match=r"lines\.jsonl:1: .*`text`: \[reward\] scores this"):
        scored(folder, tmp_path, [without])


def test_files_without_rewards_end_a_run_that_has_no_reward(folder, tmp_path, capsys):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(UNSCORED))
    config = write_config(folder, "neither", source={"path": str(file)})
    assert cli.run(["train", str(config)]) == 2
    said = capsys.readouterr().err.strip()
    assert re.fullmatch(r"error: reward is missing on every line of .*\[reward\].*", said), said


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


def test_rows_of_parquet_are_what_the_lines_are(folder, tmp_path):
    """As `everstep rollout` writes both; tests/cli/test_rollout_command.py compares them."""
    ring = trainable_config(folder / "model")
    lines = [
        WORDS | {"versions": [[0, 1], [3, 1]], "kept_ids": [[], [4, 9]], "flags": [1, 5]},
        UNSCORED | {"temperature": 0.5, "lp_sampled": [-0.1, float(np.float32(-0.7))]},
    ]
    with (tmp_path / "a.jsonl").open("wb") as file:
        rows = []
        for line in lines:
            made = json.loads(json.dumps(line)) | {"not": "looked at"}
            file.write(json.dumps(made).encode() + b"\n")
            runs = [{"version": v, "count": n} for v, n in made.get("versions", [])]
            rows.append(made | {"versions": runs, "metadata": json.dumps(made["metadata"])})
    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = []
    for name in ("a.jsonl", "a.parquet"):
        source, reward = {"path": str(tmp_path / name)}, {"name": "exact"}
        config = read_config(write_config(folder, "rows", source=source, reward=reward))
        seen = []

        def score(samples, seen=seen):
            seen += [replace(sample, id="") for sample in samples]
            return [0.0] * len(samples)

        [group] = TrajectoryFiles.read(config, ring, score).groups
        assert len(seen) == 1
        found.append((group.rewards, seen, [vars(s.sequence) | vars(s) for s in group.samples]))
    (one, other), columns = found, ("ids", "lp_infer", "versions", "kept", "temperature")
    assert one[:2] == other[:2]
    for mine, theirs in zip(one[2], other[2], strict=True):
        for name in columns:
            assert (
                np.array_equal(mine[name], theirs[name])
                if name != "kept"
                else (mine[name] == theirs[name])
            ), name
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"a\.parquet is no Parquet file: ") as caught:
        TrajectoryFiles.read(config, ring)
    assert "\n" not in str(caught.value)


def test_one_setting_is_changed_on_the_command_line(folder, capsys):
    file = write_config(folder, "said")
    assert cli.run(["train", str(file), "--set", "loss.name=pop"]) == 2
    assert "loss.name must be none, tis" in capsys.readouterr().err
    assert cli.run(["train", str(file), "--set", "lr"]) == 2
    assert "--set lr: accepted: NAME=VALUE" in capsys.readouterr().err
