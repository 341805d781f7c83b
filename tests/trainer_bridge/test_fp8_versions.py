"""Versions in FP8 by sharded trainers: byte for byte the offline quantiser's of a whole export."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.engine.checkpoint.checkpoint import Checkpoint, dequantize
from everstep.engine.checkpoint.fp8_policy import Fp8Format, has_power_of_two_scales
from everstep.engine.checkpoint.json_keys import read_json
from everstep.engine.checkpoint.make_checkpoint import SHAPES, make_checkpoint
from everstep.engine.checkpoint.manifest import read_manifest
from everstep.engine.checkpoint.quantize import quantize_checkpoint
from everstep.engine.checkpoint.stored_format import StoredFormat
from everstep.engine.errors import CheckpointError
from everstep.trainer_bridge.trainer.export import export
from everstep.trainer_bridge.trainer.optimiser import local_of
from everstep.trainer_bridge.trainer.sharding import World, join_world, shard
from everstep.trainer_bridge.trainer.trainable import TrainableRing, trainable_config
from everstep.trainer_bridge.weights.sender import WeightSender
from everstep.trainer_bridge.weights.targets import Here

from ..fp8_reference import block_reference
from .memory import memory_folder
from .weight_runs import start_ranks

# two ranks cut 260 rows at 130, three at 87 and 174; 136 columns leave blocks of 8
RAGGED = replace(
    SHAPES["tiny"],
    hidden_size=136,
    intermediate_size=260,
    moe_intermediate_size=150,
    num_hidden_layers=2,
    num_experts=4,
    n_group=2,
    topk_group=1,
)
ZEROS = "model.layers.1.mlp.experts.2.up_proj.weight"
TINY_VALUES = "model.layers.1.mlp.experts.3.down_proj.weight"
FORMATS: tuple[Fp8Format, ...] = ("fp8-experts", "fp8-block")


def publish(rank: int, world: int, port: int, source: Path, root: Path, dtype: torch.dtype) -> None:
    """Three versions in each format, the last of other weights, over the first one's pages; those
    weights are exported too."""
    import os

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with join_world("cpu") as joined:
        ring = ring_of(source, joined)
        senders = [sender_of(ring, joined, source, root / fp8, dtype, fp8) for fp8 in FORMATS]
        for sender, number in [(sender, number) for sender in senders for number in (1, 2)]:
            sender.publish(number)
        before_last = [(root / fp8 / ".spare-v1" / "model.safetensors").stat() for fp8 in FORMATS]
        with torch.no_grad():
            for name, tensor in ring.tensors():
                factor = {ZEROS: 0.0, TINY_VALUES: 1e-7}.get(name, 1.37)
                tensor.mul_(factor)
        for sender in senders:
            offsets = [o for piece in sender.layout.pieces() for o, *_ in piece.places]
            assert offsets == sorted(offsets)
            sender.publish(3)
        last = [(root / fp8 / "v3" / "model.safetensors").stat() for fp8 in FORMATS]
        assert [one.st_ino for one in last] == [one.st_ino for one in before_last]
        export(ring, source, root / "exported", dtype, joined)
        before = {name: local_of(tensor).clone() for name, tensor in ring.tensors()}
        with torch.no_grad(), senders[0].layout.as_stored():
            export(ring, source, root / "as-stored", torch.float32, joined)
        assert all(torch.equal(before[name], local_of(tensor)) for name, tensor in ring.tensors())
        if joined.is_first:
            (root / "explained").write_text(senders[1].layout.explain())


def ring_of(source: Path, world: World) -> TrainableRing:
    ring = TrainableRing(trainable_config(source), device="meta")
    shard(ring, world, torch.float32)
    ring.load(source)
    return ring


def sender_of(
    ring: TrainableRing, world: World, source: Path, root: Path, dtype: torch.dtype, fp8: Fp8Format
) -> WeightSender:
    stored = StoredFormat(ring.config, dtype, fp8)
    return WeightSender(
        ring, world, Here(world, root, 1), source=source, stored=stored, lineage="a"
    )


@pytest.fixture
def root() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.mark.parametrize(
    ("world", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (3, torch.bfloat16)]
)
def test_a_version_has_the_bytes_of_the_offline_quantiser(
    world: int, dtype: torch.dtype, tmp_path: Path, root: Path
) -> None:
    # MTP layers are not trained, and config.json must not count them
    source = make_checkpoint(tmp_path / "source", shape=RAGGED, format="f32", mtp=1)
    start_ranks(publish, world, source, root, dtype)
    for fp8 in FORMATS:
        offline = quantize_checkpoint(root / "exported", tmp_path / f"offline-{fp8}", fp8)
        expected, found = Checkpoint.open(offline), Checkpoint.open(root / fp8 / "v3")
        assert found.config == expected.config
        assert read_json(found.folder / "config.json") == read_json(offline / "config.json")
        assert found.names == expected.names
        for name in found.names:
            assert same_bytes(found.tensor(name), expected.tensor(name)), name
        assert file_of(found.folder) == file_of(offline)
        manifest = read_manifest(found.folder)
        assert manifest is not None
        assert (manifest.weights, manifest.digest) == ("block", expected.content_digest())
        assert manifest.digest != manifest.parent
    served, scored = (Checkpoint.open(root / name) for name in ("fp8-experts/v3", "as-stored"))
    for name in (name for name in served.names if ".experts." in name and "scale" not in name):
        meant = dequantize(served.linear(name.removesuffix(".weight")))
        assert torch.equal(scored.tensor(name), meant)
    said = (root / "explained").read_text()
    assert ("blocks of 128×128 are cut by shards" in said) == (world > 1)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def file_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("format", ["bf16", "f32"])
def test_the_offline_quantiser_is_the_definition_in_float64(format: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", shape=RAGGED, format=format, mtp=1)  # type: ignore[arg-type]
    plain = Checkpoint.open(source)
    for fp8 in FORMATS:
        quantised = Checkpoint.open(quantize_checkpoint(source, tmp_path / fp8, fp8))
        assert quantised.config.num_nextn_predict_layers == 1
        codes = {n for n in quantised.names if quantised.tensor(n).dtype == torch.float8_e4m3fn}
        routed = {n for n in plain.names if ".mlp.experts." in n}
        assert routed == codes if fp8 == "fp8-experts" else routed < codes
        for name in plain.names:
            values = plain.tensor(name)
            if name not in codes:
                assert same_bytes(quantised.tensor(name), values)
                continue
            q, scale = block_reference(
                values.double().numpy(), power_of_two=has_power_of_two_scales(name)
            )
            assert np.array_equal(quantised.tensor(name).double().numpy(), q)
            assert np.array_equal(quantised.tensor(name + "_scale_inv").double().numpy(), scale)


def test_a_checkpoint_is_made_as_it_is_quantised(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", mtp=1)
    for fp8 in FORMATS:
        made = Checkpoint.open(make_checkpoint(tmp_path / f"made-{fp8}", format=fp8, mtp=1))
        found = Checkpoint.open(quantize_checkpoint(source, tmp_path / fp8, fp8))
        assert found.content_digest() == made.content_digest()
        assert found.config == made.config


def test_what_cannot_be_quantised_is_said_in_one_line(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", format="fp8-block")
    with pytest.raises(CheckpointError, match="is FP8 already; accepted: a bfloat16 or float32"):
        quantize_checkpoint(source, tmp_path / "again")
