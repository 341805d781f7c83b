"""Versions written by sharded trainers: the same bytes as a whole export, whatever the world."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.engine.checkpoint.manifest import read_manifest
from everstep.engine.checkpoint.stored_format import StoredFormat
from everstep.engine.errors import CheckpointError
from everstep.trainer_bridge.trainer.export import export
from everstep.trainer_bridge.trainer.sharding import join_world
from everstep.trainer_bridge.weights import folder as weight_folder
from everstep.trainer_bridge.weights.sender import WeightSender
from everstep.trainer_bridge.weights.targets import Here

from .memory import memory_folder
from .training_runs import free_port, make_run, start, write_config
from .weight_runs import change, names_of, ring_of, start_ranks


def publish(rank: int, world: int, port: int, source: Path, root: Path) -> None:
    """Versions, each with other weights, the last over the first one's pages; it as an export too."""
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
        sender = WeightSender(
            ring,
            joined,
            Here(joined, root),
            source=source,
            stored=StoredFormat(ring.config, torch.bfloat16),
            lineage="a",
        )
        digests = set()
        for version in (1, 2, 3, 4):
            change(ring)
            digests.add(sender.publish(version).digest)
        assert len(digests) == 4
        export(ring, source, root / "exported", torch.bfloat16, joined)
        if joined.is_first:
            (root / "explained").write_text(sender.layout.explain())


@pytest.fixture
def root() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.mark.parametrize("world", [1, 2, 3])
def test_versions_are_those_of_an_export(world: int, tmp_path: Path, root: Path) -> None:
    source = make_checkpoint(tmp_path / "source", format="f32")
    start_ranks(publish, world, source, root)
    versions = [Checkpoint.open(root / name) for name in ("v3", "v4", "exported")]
    first, second, exported = versions
    manifests = [read_manifest(root / name) for name in ("v3", "v4")]
    assert manifests[0] is not None
    assert manifests[1] is not None
    assert first.content_digest() == manifests[0].digest == manifests[1].parent
    assert second.content_digest() == manifests[1].digest == exported.content_digest()
    assert [m.version for m in manifests if m] == [3, 4]
    assert names_of(root) == [".spare-v2", "v3", "v4"]
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
        target = Here(world, root)
        sender = WeightSender(ring, world, target, source=source, stored=stored, lineage="a")
        for version in range(1, 5):
            (root / f".partial-v{version}").mkdir()
            assert Path(sender.publish(version).path).is_dir()
        assert sorted(p.name for p in root.iterdir()) == ["v3", "v4"]
        usage = shutil.disk_usage(root)._replace(free=1000)
        monkeypatch.setattr(weight_folder.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match=r"a version takes .* GB, 0\.00 GB are free"):
            sender.publish(5)
        assert (root / "v4").is_dir()


@pytest.mark.parametrize("world", [1, 2])
def test_who_would_send_what_is_said_before(world: int, tmp_path: Path) -> None:
    """The flag of both commands; nothing is trained, nothing is written."""
    endpoint = "tcp://127.0.0.1:5601"
    config = write_config(make_run(tmp_path), "trained", publish={"endpoints": [endpoint]})
    if world == 1:
        command = [sys.executable, "-m", "everstep", "train", str(config), "--explain"]
        said = [subprocess.run(command, check=True, capture_output=True, text=True).stdout]
    else:
        port = free_port()
        ranks = [start(config, "--explain", rank=r, size=world, port=port) for r in range(world)]
        said = [rank.communicate(timeout=60)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world
        assert said[1] == ""
    first, second, *lines = said[0].splitlines()
    assert first == f"versions go to {endpoint}"
    total = int(second.removesuffix(" bytes in all, each written once"))
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert total == sum(4 * torch.Size(e.shape).numel() for e in checkpoint.entries.values())
    shares = [int(line.split()[2]) for line in lines if line.startswith("rank ")]
    assert len(shares) == world
    assert sum(shares) == total
    assert not (tmp_path / "trained").exists()
