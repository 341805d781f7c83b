"""everstep replay of rollouts that lived through changes of the weights, by a real engine."""

import asyncio
import shutil
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from everstep.cli import run
from everstep.engine.config import EngineConfig, KVConfig, ModelConfig
from everstep.engine.manager.intake import Submission
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import KVPolicy
from everstep.engine.native import ThreadBackend
from everstep.engine.rollout import Rollout, SamplingParams
from everstep.engine.trajectory import pack, seal
from tests.engine.flips import make_versions

POLICIES = get_args(KVPolicy)
PROMPT = [5, 6, 7, 8, 250, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]
# everything that can be recorded, and a plain one whose draws depend on what it has drawn
SAMPLINGS = [
    SamplingParams(
        max_tokens=22,
        ignore_eos=True,
        top_p=0.9,
        record=("lp_raw", "entropy", "kept_ids", "routing"),
        top_logprobs=3,
        prompt_logprobs=2,
    ),
    SamplingParams(max_tokens=22, presence_penalty=0.5, ignore_eos=True),
]
POOL = "replayed"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("versions")
    make_versions(root, 3)
    return root


def lived(root: Path, sampling: SamplingParams, *steps: tuple[int, int, KVPolicy]) -> Rollout:
    """A rollout under version 0 at first; of each step: tokens, then to which version, and how."""

    async def body():
        model = ModelConfig(path=str(root / "v0"), max_model_len=128)
        config = EngineConfig(model=model, kv=KVConfig(num_blocks=64), num_threads=1)
        manager = RolloutManager(ThreadBackend(config), None, model_path=str(root / "v0"))
        await manager.start()
        try:
            ask = Submission(prompt_ids=PROMPT, sampling=sampling, pool=POOL)
            budget = await manager.budgets.open(POOL, steps[0][0])
            [rollout] = manager.submit(ask)
            for number, (_, version, kv) in enumerate(steps):
                await manager.budgets.wait(budget.id)
                # by name: numbers may go back here
                await manager.versions.roll_back(version, path=str(root / f"v{version}"), kv=kv)
                left = steps[number + 1][0] if number + 1 < len(steps) else sampling.max_tokens
                budget = await manager.budgets.open(POOL, left)
            return await manager.wait(rollout.id)
        finally:
            await manager.close()

    return asyncio.run(asyncio.wait_for(body(), 60))


@pytest.fixture
def replay(tmp_path, capsys):
    """Replay a rollout from a file; returns (exit code, lines of standard output, standard error)."""

    def call(rollout: Rollout, *words: object):
        file = tmp_path / "rollout"
        file.write_bytes(seal(pack(rollout)))
        code = run(["replay", str(file), "--num-threads", "1", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    return call


@pytest.mark.parametrize("second", POLICIES)
@pytest.mark.parametrize("first", POLICIES)
def test_a_rollout_of_three_versions_replays_to_the_bit(root, replay, first, second) -> None:
    sampling = SAMPLINGS[POLICIES.index(second) % 2]
    rollout = lived(root, sampling, (5, 1, first), (6, 2, second))
    assert [s.start for s in rollout.segments] == [0, 5, 11]
    code, out, err = replay(rollout, "--weights", root)
    assert (code, out[-1]) == (0, "replayed 22 of 22 tokens: identical to the bit"), (out, err)


def test_a_rollout_that_was_rolled_back_replays(root, replay) -> None:
    """The same weights twice, with others between: KV of three kinds under one digest."""
    steps = ((4, 1, "keep"), (3, 0, "recompute-prompt"), (5, 2, "keep"), (2, 0, "keep"))
    rollout = lived(root, SAMPLINGS[1], *steps)
    assert [(s.version, s.kv) for s in rollout.segments] == [
        (0, "computed"),
        (1, "keep"),
        (0, "recompute-prompt"),
        (2, "keep"),
        (0, "keep"),
    ]
    assert len({s.digest for s in rollout.segments}) == 3
    code, out, _ = replay(rollout, *(f"--weights={root / f'v{n}'}" for n in range(3)))
    assert (code, out[-1]) == (0, "replayed 22 of 22 tokens: identical to the bit")


@pytest.fixture(scope="module")
def kept(root) -> Rollout:
    return lived(root, SAMPLINGS[0], (5, 1, "keep"), (6, 2, "keep"))


def test_what_lacks_is_said_in_one_line(root, replay, kept) -> None:
    digests = [segment.digest[:12] for segment in kept.segments]
    code, out, _ = replay(kept, "--weights", root / "v0", "--weights", root / "v2")
    assert code == 0
    assert f"made by version 1 ({digests[1]}), which is not here" in out[2]
    # its own weights are here, those of the KV that it was drawn over are not
    assert f"drawn over KV of version 1 ({digests[1]}), which is not here" in out[3]
    assert out[-1] == (
        "replayed 5 of 22 tokens: identical to the bit; "
        f"the other 17 need version 1 ({digests[1]}): --weights"
    )


def test_computed_kv_needs_no_older_version(root, replay) -> None:
    rollout = lived(root, SAMPLINGS[1], (5, 1, "recompute"))
    code, out, _ = replay(rollout, "--weights", root / "v1")
    assert code == 0
    assert out[-1].startswith(
        "replayed 17 of 22 tokens: identical to the bit; the other 5 need ver"
    )


@pytest.mark.parametrize(("token", "place"), [(5, 1), (13, 2)])
def test_a_difference_behind_a_flip_is_found(root, replay, kept, token, place) -> None:
    lp = [*kept.lp_temp]
    lp[token] -= 2**-20
    code, out, _ = replay(msgspec.structs.replace(kept, lp_temp=lp), "--weights", root)
    assert code == 1
    assert f"differs at token {token}" in out[1 + place]
    assert f"first difference: token {token}, lp_temp" in out[-2]


def test_kv_of_another_policy_is_a_difference(root, replay, kept) -> None:
    """What was drawn over kept KV is not what a computed one gives."""
    first, *others = kept.segments
    forged = [msgspec.structs.replace(one, kv="recompute-prompt") for one in others]
    code, out, _ = replay(
        msgspec.structs.replace(kept, segments=[first, *forged]), "--weights", root
    )
    assert code == 1
    assert "first difference: token" in out[-2]


def test_a_folder_whose_bytes_are_others_is_refused(root, replay, kept, tmp_path) -> None:
    copy = tmp_path / "versions"
    shutil.copytree(root, copy)
    shutil.copy(copy / "v2" / "model.safetensors", copy / "v1" / "model.safetensors")
    code, _, err = replay(kept, "--weights", copy)
    assert code == 2
    assert "its bytes are not those that were published" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "said"),
    [("none", "is no folder"), ("empty", "holds no version of the weights")],
)
def test_a_root_without_versions_is_named(replay, kept, tmp_path, name, said) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = replay(kept, "--weights", tmp_path / name)
    assert code == 2
    assert f"{name} {said}" in err
    assert err.count("\n") == 1
