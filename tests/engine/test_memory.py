"""How much memory there is: of the machine, and of the control groups that a process is in."""

import platform

import msgspec
import pytest

from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.make_checkpoint import make_checkpoint, resize
from everstep.engine.config import EngineConfig, KVConfig, ModelConfig
from everstep.engine.core import core
from everstep.engine.core.memory import free_bytes, most_bytes
from everstep.engine.errors import EngineUnavailable
from everstep.engine.model.weights import WeightReader, load_weights

MIB = 1 << 20
linux = pytest.mark.skipif(platform.system() != "Linux", reason="the files are Linux's")


def machine(root, *, available=1000, swap=0, group="0::/\n"):
    """A root with the files of a machine that has so many MiB."""
    (root / "proc/self").mkdir(parents=True)
    lines = f"MemTotal: 1 kB\nMemAvailable: {available * 1024} kB\nSwapFree: {swap * 1024} kB\n"
    (root / "proc/meminfo").write_text(lines)
    (root / "proc/self/cgroup").write_text(group)
    return root


def group_v2(folder, limit, used, files=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files}\nactive_file {files}\n")


@linux
def test_without_limits_the_machine_s_word_counts(tmp_path):
    root = machine(tmp_path, available=700, swap=50)
    assert free_bytes(root) == 700 * MIB
    assert most_bytes(root) == 750 * MIB


@linux
def test_a_container_has_what_its_group_leaves(tmp_path):
    """Its own group is the root of what it sees; pages of files count as free."""
    root = machine(tmp_path, swap=50)
    group_v2(root / "sys/fs/cgroup", 300 * MIB, 120 * MIB, files=10 * MIB)
    assert free_bytes(root) == 200 * MIB
    assert most_bytes(root) == 250 * MIB


@linux
def test_the_narrowest_group_above_a_process_counts(tmp_path):
    root = machine(tmp_path, group="0::/system.slice/everstep.service\n")
    group_v2(root / "sys/fs/cgroup/system.slice/everstep.service", "max", 10 * MIB)
    group_v2(root / "sys/fs/cgroup/system.slice", 500 * MIB, 100 * MIB)
    assert free_bytes(root) == 400 * MIB


@linux
def test_groups_of_the_first_version(tmp_path):
    root = machine(tmp_path, group="5:cpu:/x\n4:memory:/job\n0::/\n")
    folder = root / "sys/fs/cgroup/memory/job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{300 * MIB}")
    (folder / "memory.usage_in_bytes").write_text(f"{400 * MIB}")
    (folder / "memory.stat").write_text(f"total_inactive_file {150 * MIB}\ninactive_file 1\n")
    assert free_bytes(root) == 50 * MIB


# -- against what is loaded


@pytest.mark.parametrize("format", ["bf16", "f32", "fp8-block", "fp8-channel"])
@pytest.mark.parametrize("settings", [{}, {"dequantize": "load"}, {"dtype": "float32"}])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_what_weights_take_is_known_before_they_are_read(tmp_path, format, settings, tied):
    sizes = ["hidden_size=128", "moe_intermediate_size=64", f"tie_word_embeddings={tied}"]
    folder = make_checkpoint(tmp_path / "m", shape=resize("tiny", sizes), format=format, mtp=1)
    config = msgspec.convert(settings, ModelConfig)
    told = WeightReader(Checkpoint.open(folder), config).num_bytes
    weights = load_weights(Checkpoint.open(folder), config, on_progress=lambda *_: None)
    taken = sum(p.nbytes if hasattr(p, "nbytes") else p.num_bytes for p in weights.parts)
    assert told == pytest.approx(taken, rel=0.05)


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(tiny_checkpoint, monkeypatch):
    """Else the system kills the core in the middle, and the front starts it again."""
    monkeypatch.setattr(core, "most_bytes", lambda: 100_000)
    with pytest.raises(EngineUnavailable, match=r"take 0\.\d GB of memory, 0\.0 GB are free"):
        core.build(EngineConfig(model=ModelConfig(path=str(tiny_checkpoint))), lambda _: None)


def test_kv_takes_its_share_of_what_the_weights_leave(tiny_checkpoint, monkeypatch):
    ring = Checkpoint.open(tiny_checkpoint).config
    monkeypatch.setattr(core, "free_bytes", lambda: 1000 * MIB)
    config = EngineConfig(kv=KVConfig(block_size=16))
    token_bytes = 2 * ring.num_hidden_layers * ring.num_key_value_heads * ring.head_dim * 2
    kv = core.resolve_kv(config, ring, 2, weight_bytes=900 * MIB)
    assert kv.num_blocks == int(100 * MIB * core.KV_SHARE) // (token_bytes * 16)
