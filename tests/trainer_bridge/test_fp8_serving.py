"""Versions in FP8 from a bf16 trainer into a running W8A8 engine: what serves, what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.fp8_policy import Fp8Format
from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.engine.checkpoint.manifest import combine_digests, read_manifest, write_manifest
from everstep.engine.checkpoint.manifest_maker import manifest_of
from everstep.engine.checkpoint.quantize import quantize_checkpoint
from everstep.engine.checkpoint.stored_format import StoredFormat
from everstep.engine.config import ModelConfig
from everstep.engine.messages import Add, Refused, StageReport
from everstep.engine.model.canaries import BOUNDS, LEAST_DRIFT
from everstep.engine.rollout import SamplingParams
from everstep.trainer_bridge.trainer.canaries import make_canaries
from everstep.trainer_bridge.trainer.sharding import join_world, shard
from everstep.trainer_bridge.trainer.trainable import TrainableRing, trainable_config
from everstep.trainer_bridge.weights.sender import WeightSender
from everstep.trainer_bridge.weights.targets import Here

from ..engine.flips import FlippingCore, weights_of

Tensors = dict[str, torch.Tensor]
W8A8 = ModelConfig(numerics="w8a8")
EXPERT = "model.layers.2.mlp.experts.{}.{}_proj.weight"
SCALE = EXPERT.format(3, "down") + "_scale_inv"
TEXTS = [([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8] * 2, 4), ([2, 7, 1, 8, 2, 8, 1, 8, 2, 8] * 2, 4)]


FORMATS: tuple[Fp8Format, ...] = ("fp8-experts", "fp8-block")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """By format: what the engine was started with, and version 1 of its trainer."""
    return {fp8: published(tmp_path_factory.mktemp(fp8), fp8) for fp8 in FORMATS}


@pytest.fixture(params=FORMATS)
def folders(request: pytest.FixtureRequest, made: dict[str, list[Path]]) -> list[Path]:
    return made[request.param]


def published(root: Path, fp8: Fp8Format) -> list[Path]:
    source = make_checkpoint(root / "source")
    with join_world("cpu") as world:
        ring = TrainableRing(trainable_config(source), device="meta")
        shard(ring, world, torch.bfloat16)
        ring.load(source)
        with torch.no_grad():
            for _, tensor in ring.tensors():
                tensor.mul_(1.01)
        stored = StoredFormat(ring.config, torch.bfloat16, fp8)
        sender = WeightSender(
            ring, world, Here(world, root), source=source, stored=stored, lineage="a"
        )
        version = sender.publish(1, make_canaries(ring, world, TEXTS, sender.layout))
    return [quantize_checkpoint(source, root / "served", fp8), Path(version.path)]


def core_of(folders: list[Path]) -> FlippingCore:
    return FlippingCore(folders, config=W8A8)


def test_a_running_engine_takes_it_and_a_new_one_starts_from_it(folders: list[Path]) -> None:
    core = core_of(folders)
    report = core.stage(1)
    assert isinstance(report, StageReport), report
    # FP8 on one side alone: near, and not equal
    assert 0 < report.mean_delta < report.mean_bound == 0.7
    assert report.canary_tokens == sum(len(ids) - prompt for ids, prompt in TEXTS)
    core.flip(1, "keep")
    add = Add(
        rollout_id="a", prompt_ids=[5, 6, 7], sampling=SamplingParams(), seed=3, max_tokens=12
    )
    core.add(add)
    core.finish()
    alone = FlippingCore([folders[1]], config=W8A8)
    alone.add(add)
    alone.finish()
    assert core.rollouts["a"].lp == alone.rollouts["a"].lp
    assert weights_of(folders[1], model=W8A8).formats == "block-w8a8-group"


def swap_gate_and_up(tensors: Tensors) -> None:
    """In every expert of a layer, codes and scales."""
    for expert in range(8):
        for suffix in ("", "_scale_inv"):
            gate, up = (EXPERT.format(expert, which) + suffix for which in ("gate", "up"))
            tensors[gate], tensors[up] = tensors[up], tensors[gate]


def forget_scales(tensors: Tensors) -> None:
    """As by a writer that takes codes for values."""
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            tensor.fill_(1.0)


def drop_scale(tensors: Tensors) -> None:
    del tensors[SCALE]


def spoiled(folders: list[Path], tmp_path: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of version 1 whose tensors were changed after its manifest was written."""
    copy = tmp_path / "spoiled"
    shutil.copytree(folders[1], copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize("change", [swap_gate_and_up, forget_scales])
def test_other_bytes_are_refused_by_their_digest(folders, tmp_path, change) -> None:
    found = core_of(folders).stage(1, spoiled(folders, tmp_path, change))
    assert isinstance(found, Refused)
    assert "its bytes are not those that were published" in found.message


def test_a_dropped_scale_is_named(folders, tmp_path) -> None:
    found = core_of(folders).stage(1, spoiled(folders, tmp_path, drop_scale))
    assert isinstance(found, Refused)
    assert f"missing {SCALE}" in found.message


def refusal_by_canaries(folders: list[Path], bad: Path) -> Refused:
    """The digests are of the wrong weights, as by a sender that spoiled them before it took them."""
    meant = read_manifest(bad)
    assert meant is not None
    write_manifest(bad, manifest_of(Checkpoint.open(bad), version=1, canaries=meant.canaries))
    found = core_of(folders).stage(1, bad)
    assert isinstance(found, Refused), found
    assert "canaries: logprobs differ from the trainer's" in found.message
    return found


def test_scales_that_were_forgotten_are_refused_by_the_canaries(folders, tmp_path) -> None:
    found = refusal_by_canaries(folders, spoiled(folders, tmp_path, forget_scales))
    assert found.layer == (1 if is_experts(folders) else 0)


def test_gate_and_up_of_a_layer_exchanged_are_refused_by_the_canaries(made, tmp_path) -> None:
    """With FP8 in every layer these random weights move as far by FP8 as by the exchange."""
    folders = made["fp8-experts"]
    found = refusal_by_canaries(folders, spoiled(folders, tmp_path, swap_gate_and_up))
    assert found.layer == 2
    # by what FP8 does to the trainer's own fingerprints, and not by the worst of all models
    bound = float(found.message.rpartition("(bound ")[2].rstrip(")"))
    assert LEAST_DRIFT <= bound < BOUNDS[torch.bfloat16, "w8a8"].fingerprint / 2


def is_experts(folders: list[Path]) -> bool:
    return "model.layers.0.mlp.up_proj.weight_scale_inv" not in Checkpoint.open(folders[0]).names


def test_what_fp8_does_is_told_for_each_layer(folders: list[Path]) -> None:
    manifest = read_manifest(folders[1])
    assert manifest is not None
    for canary in manifest.canaries:
        assert canary.drift is not None
        assert len(canary.drift) == 4
        # the first layer is dense
        assert (canary.drift[0] == 0) == is_experts(folders)
        assert all(0 < drift < 0.5 for drift in canary.drift[1:])


def test_the_manifest_lists_codes_and_scales(folders: list[Path]) -> None:
    manifest = read_manifest(folders[1])
    assert manifest is not None
    assert manifest.weights == "block"
    codes = {name for name, record in manifest.tensors.items() if record.dtype == "F8_E4M3"}
    assert {f"{name}_scale_inv" for name in codes} < manifest.tensors.keys()
    digests = {name: record.digest for name, record in manifest.tensors.items()}
    assert combine_digests(digests) == manifest.digest
