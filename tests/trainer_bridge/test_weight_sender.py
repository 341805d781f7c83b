"""Versions written by sharded trainers: the same bytes as a whole export, whatever the world."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from everstep.engine.checkpoint import Checkpoint
from everstep.engine.errors import CheckpointError
from everstep.engine.make_checkpoint import make_checkpoint
from everstep.engine.manifest import read_manifest
from everstep.engine.stored_format import StoredFormat
from everstep.trainer_bridge import weight_folder
from everstep.trainer_bridge.export import export
from everstep.trainer_bridge.sharding import World, join_world, shard
from everstep.trainer_bridge.trainable import TrainableRing, trainable_config
from everstep.trainer_bridge.weight_sender import WeightSender

from .training_runs import free_port


def ring_of(source: Path, world: World) -> TrainableRing:
    ring = TrainableRing(trainable_config(source), device="meta")
    shard(ring, world, torch.float32)
    ring.load(source)
    return ring


def publish(rank: int, world: int, port: int, source: Path, root: Path) -> None:
    """Two versions, the second with other weights; and the second as an export."""
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
        stored = StoredFormat(ring.config, torch.bfloat16)
        sender = WeightSender(
            ring, joined, source=source, root=root, stored=stored, lineage="a", keep=2
        )
        first = sender.publish(1)
        with torch.no_grad():
            for _, tensor in ring.tensors():
                tensor.mul_(1.01)
        second = sender.publish(2)
        assert first.digest != second.digest
        export(ring, source, root / "exported", torch.bfloat16, joined)
        if joined.is_first:
            (root / "explained").write_text(sender.layout.explain())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_versions_are_those_of_an_export(world: int, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", format="f32")
    root = tmp_path / "versions"
    root.mkdir()
    arguments = (world, free_port(), source, root)
    # forked: torch is loaded once
    mp.start_processes(publish, arguments, nprocs=world, start_method="fork")  # type: ignore[no-untyped-call]
    versions = [Checkpoint.open(root / name) for name in ("v1", "v2", "exported")]
    first, second, exported = versions
    manifests = [read_manifest(root / name) for name in ("v1", "v2")]
    assert manifests[0] is not None
    assert manifests[1] is not None
    assert first.content_digest() == manifests[0].digest == manifests[1].parent
    assert second.content_digest() == manifests[1].digest == exported.content_digest()
    assert [m.version for m in manifests if m] == [1, 2]
    assert not list(root.glob(".partial-*"))
    text = (root / "explained").read_text()
    assert text.count("rank ") == world
    total = sum(
        torch.Size(e.shape).numel() * (4 if e.dtype == "F32" else 2)
        for e in second.entries.values()
    )
    assert text.startswith(f"{total} bytes in all")


def test_old_versions_go_and_a_full_disk_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "source", format="f32")
    root = tmp_path / "versions"
    root.mkdir()
    with join_world("cpu") as world:
        ring = ring_of(source, world)
        stored = StoredFormat(ring.config, torch.float32)
        sender = WeightSender(ring, world, source=source, root=root, stored=stored, lineage="a")
        for version in range(1, 5):
            (root / f".partial-v{version}").mkdir()
            assert Path(sender.publish(version).path).is_dir()
        assert sorted(p.name for p in root.iterdir()) == ["v3", "v4"]
        usage = shutil.disk_usage(root)._replace(free=1000)
        monkeypatch.setattr(weight_folder.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match=r"a version takes .* GB, 0\.00 GB are free"):
            sender.publish(5)
        assert (root / "v4").is_dir()
