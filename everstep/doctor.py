"""What this machine has, what was picked and why, what is missing, and every setting's origin."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .engine.config import EngineConfig, ModelConfig
from .offline import show_table
from .progress import Stages, duration

if TYPE_CHECKING:
    from .engine.messages import Ready
    from .flags import Settings

# what pyproject.toml names; tests/test_packaging.py compares
PACKAGES = ["torch", "numpy", "msgspec", "pyzmq", "apsw", "tokenizers", "jinja2", "gguf"]
PACKAGES += ["huggingface_hub", "starlette", "python-multipart", "uvicorn", "uvloop", "httpx"]
PACKAGES += ["prometheus-client", "typer", "rich"]
# extra → module and distribution that it installs, and what for
EXTRAS = {
    "gpu": ("transformer_engine", "transformer-engine", "FP8 products of a trainer"),
    "train": ("math_verify", "math-verify", "the numeric reward"),
    "parquet": ("pyarrow", "pyarrow", "rollouts as Parquet"),
    "bench": ("matplotlib", "matplotlib", "plots"),
}

Row = tuple[str, str]


def report(settings: "Settings") -> None:
    """Print everything."""
    _section("Versions", _versions())
    _section("Machine", _machine())
    _section("Folders and limits", _limits())
    _section("Extras", _extras())
    with Stages() as stages:
        ready = _start(settings.config.engine, stages)
    _section("Engine", _engine(ready, settings.config.engine.model))
    _section("Kernels", list(ready.kernels.items()))
    _write("Settings")
    show_table(settings.lines(), header=("setting", "value", "from"), to_stdout=True)


def determinism(model: ModelConfig) -> bool:
    """Print the comparison; True if no bit differs."""
    from .engine.proofs.determinism import check

    with Stages() as stages:
        found = check(model.path, dtype=model.dtype, on_progress=stages)
    for line in found.lines():
        _write(line)
    return found.is_exact


def _section(title: str, rows: list[Row]) -> None:
    _write(title)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        _write(f"  {name:<{width}}  {value}")
    _write("")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


def _versions() -> list[Row]:
    rows = [("everstep", __version__), ("python", platform.python_version())]
    return rows + [(name, _version(name) or "missing") for name in PACKAGES]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> list[Row]:
    from .engine.core.core import num_free_cores

    return [
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("processor", _processor()),
        ("cores", f"{num_free_cores()} usable of {os.cpu_count()}"),
        ("memory", _memory()),
    ]


def _proc_lines(path: str) -> dict[str, str]:
    """`key: value` lines of a file that only Linux has."""
    try:
        with open(path) as lines:
            pairs = (line.split(":", 1) for line in lines if ":" in line)
            return {key.strip(): value.strip() for key, value in pairs}
    except OSError:
        return {}


def _processor() -> str:
    facts = _proc_lines("/proc/cpuinfo")
    flags = facts.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    return f"{facts.get('model name', platform.processor())} ({', '.join(f for f in wanted if f in flags)})"


def _memory() -> str:
    facts = _proc_lines("/proc/meminfo")
    if not facts:
        return "unknown"
    free, total = (int(facts[key].split()[0]) / 2**20 for key in ("MemAvailable", "MemTotal"))
    return f"{free:.1f} GiB free of {total:.1f}"


def _limits() -> list[Row]:
    import resource

    from .engine.checkpoint.hub import cache_folder

    cache = cache_folder()
    parent = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = "  (few: a server holds one for each connection; ulimit -n 65536)" if soft < 4096 else ""
    writable = "" if os.access(parent, os.W_OK) else "  NOT writable: EVERSTEP_CACHE names another"
    free = shutil.disk_usage(parent).free / 2**30
    return [
        *_left_runs(),
        ("cache", f"{cache}, {free:.1f} GiB free{writable}"),
        ("cached models", ", ".join(_cached(cache)) or "none"),
        ("open files", f"{soft} (at most {hard}){few}"),
    ]


def _left_runs() -> list[Row]:
    """Folders of runs in shared memory: some are left by runs that were killed."""
    from .trainer_bridge.run.folders import runs_there, sizes_of

    rows = []
    for folder in runs_there():
        sizes = sizes_of(folder)
        age = duration(max(0.0, time.time() - folder.stat().st_mtime))
        count = sum(name.startswith("v") for name in sizes)
        versions = f"{count} version{'s' * (count != 1)}"
        if count < len(sizes):
            versions += f", {len(sizes) - count} left over"
        size = f"{sum(sizes.values()) / 1e6:.1f} MB"
        rows.append(("run's weights", f"{folder}: {versions}, {size}, written {age} ago"))
    return rows


def _cached(cache: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(path.parent.name for path in cache.glob("*/config.json"))
    return []


def _extras() -> list[Row]:
    rows = []
    for extra, (module, distribution, purpose) in EXTRAS.items():
        state = f"{distribution} {_version(distribution) or 'installed'}"
        if importlib.util.find_spec(module) is None:
            state = f"missing {distribution}: pip install 'everstep[{extra}]'"
        rows.append((extra, f"{purpose}: {state}"))
    return rows


@contextlib.contextmanager
def _folder(model: ModelConfig, stages: Stages) -> Iterator[str]:
    """The model that was named; without one, a tiny one that goes away again."""
    if model.path != ModelConfig().path:
        yield model.path
        return
    from .engine.checkpoint.make_checkpoint import make_checkpoint

    with tempfile.TemporaryDirectory(prefix="everstep-") as scratch:
        folder = Path(scratch, "tiny")
        make_checkpoint(folder, shape="tiny", on_progress=stages)
        yield str(folder)


def _start(config: EngineConfig, stages: Stages) -> "Ready":
    """Start an engine and end it: what it says of itself is the truth."""
    import msgspec

    from .clients.llm import LLM

    with _folder(config.model, stages) as folder:
        model = msgspec.structs.replace(config.model, path=folder)
        engine = msgspec.structs.replace(config, model=model)
        with LLM(config=engine, on_progress=stages) as llm:
            return llm.info


def _engine(ready: "Ready", model: ModelConfig) -> list[Row]:
    is_tiny = model.path == ModelConfig().path
    shown = "a tiny one, made for this report; name a MODEL for another" if is_tiny else model.path
    return [
        ("model", shown),
        ("numerics", ready.numerics),
        ("weights", f"version {ready.version}@{ready.digest[:8]}"),
        ("context", f"{ready.max_model_len} tokens"),
        ("KV", f"{ready.num_blocks} blocks of {ready.block_size} tokens"),
        ("at once", f"{ready.max_num_seqs} rollouts"),
    ]
