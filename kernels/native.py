"""Finds, compiles if need be, and loads the C++ library of `kernels/cpu`; chooses its level.

    amx > avx512 > avx2 > portable > torch

The best level that this machine has is taken; EVERSTEP_KERNELS names a lower one. The library
comes with the package (wheels), or is compiled at first use into the user's cache; where neither
can be, the level is `torch`: everything works, slowly, and one warning says so.
"""

import ctypes
import functools
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from . import native_build
from .native_build import BuildError

LEVELS = ("amx", "avx512", "avx2", "portable", "torch")
# flags of /proc/cpuinfo that a level's machine code needs
NEEDS = {
    "amx": {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set[str](),
    "torch": set[str](),
}
NEEDS["amx"] |= NEEDS["avx512"]
_log = logging.getLogger("everstep")


@dataclass(frozen=True)
class Level:
    """What the kernels run on: the name goes into every rollout's numerics id.

    reason  why this one, for people
    path    the library's file, None for torch
    """

    name: str
    reason: str
    path: Path | None


@functools.cache
def level() -> Level:
    """The level of this process: chosen once, compiled if need be.

    Raises ValueError if EVERSTEP_KERNELS names none, or one that the machine lacks.
    """
    return choose(os.environ.get("EVERSTEP_KERNELS", ""), machine_flags())


def library() -> ctypes.CDLL | None:
    """The loaded library of `level()`, None for torch."""
    path = level().path
    return None if path is None else open_library(path)


def choose(wanted: str, flags: frozenset[str]) -> Level:
    """The level for a machine with these flags; wanted: its name, or empty for the best."""
    if wanted and wanted not in LEVELS:
        raise ValueError(f"EVERSTEP_KERNELS={wanted}: expected one of {', '.join(LEVELS)}")
    able = runnable(flags)
    if wanted and wanted not in able:
        missing = ", ".join(sorted(NEEDS[wanted] - flags)) or "a machine of another kind"
        raise ValueError(
            f"EVERSTEP_KERNELS={wanted}: this machine lacks {missing}; it has {', '.join(able)}"
        )
    reason = "asked for by EVERSTEP_KERNELS" if wanted else "the best that this machine has"
    first = ""
    for name in [wanted] if wanted else able:
        if name == "torch":
            break
        try:
            path = find_library(name)
            open_library(path)
        except (BuildError, OSError) as error:
            # an old compiler may not know the best level: the next one then
            first = first or f"{name}: {error}".splitlines()[0]
        else:
            return Level(name, f"{reason}, but {first}" if first else reason, path)
    if not first:
        return Level("torch", reason, None)
    _log.warning(
        "kernels: no C++ library (%s); running on torch, several times slower. "
        "Install a C++17 compiler (apt install g++, dnf install gcc-c++) and start again.",
        first,
    )
    return Level("torch", f"no C++ library: {first}", None)


def runnable(flags: frozenset[str]) -> list[str]:
    """Levels that a machine with these flags can run, best first."""
    known = [*native_build.levels_of_this_kind(), "torch"]
    return [name for name in LEVELS if name in known and flags >= NEEDS[name]]


@functools.cache
def machine_flags() -> frozenset[str]:
    """This processor's features, in the names of /proc/cpuinfo; empty where unknown."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    # not Linux: torch has asked the processor, if only for its vector width
    has_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return frozenset(NEEDS["avx2"] if has_avx2 else ())


def find_library(name: str) -> Path:
    """The library of a level: from the package, from the cache, or compiled into the cache.

    Raises BuildError.
    """
    prebuilt = native_build.PREBUILT / native_build.library_name(name)
    if prebuilt.exists():
        return prebuilt
    compiler = native_build.find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler on the path")
    path = native_build.cached_library(cache_folder(), name, compiler)
    if not path.exists():
        native_build.build(name, path, compiler)
    return path


def cache_folder() -> Path:
    """EVERSTEP_CACHE, or `everstep` in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("EVERSTEP_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "everstep"


@functools.cache
def open_library(path: Path) -> ctypes.CDLL:
    """Load a library and start it. Raises OSError."""
    library = ctypes.CDLL(str(path))
    if library.everstep_start():
        raise OSError(f"{path.name}: the system refuses the AMX unit")
    return library
