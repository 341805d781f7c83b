"""The levels that tests run at: those of this machine and, emulated, those that it lacks.

`avx512-emulated` and `amx-emulated` are the sources of kernels/cpu as they are, compiled for AVX2
over tests/emulation: AVX-512's intrinsics in plain C++, and a handler that does what an AMX
instruction would have done where the processor refuses it. On a processor with AVX-512 only the
second is emulated.
"""

import contextlib
import ctypes
import hashlib
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep import kernels
from everstep.kernels import native, native_build

HEADERS = Path(__file__).parent / "emulation"
SUFFIX = "-emulated"


def _emulated() -> dict[str, tuple[str, list[str]]]:
    """Name → the level whose flags it is compiled with, and the headers put before its sources."""
    able = native.runnable(native.machine_flags())
    is_linux = sys.platform == "linux" and platform.machine() == "x86_64"
    if not is_linux or "avx2" not in able or native_build.find_compiler() is None:
        return {}
    if "amx" in able:
        return {}
    if "avx512" in able:
        return {"amx-emulated": ("avx512", ["tiles.h"])}
    return {
        "amx-emulated": ("avx2", ["avx512.h", "tiles.h"]),
        "avx512-emulated": ("avx2", ["avx512.h"]),
    }


EMULATED = _emulated()
REAL = native.runnable(native.machine_flags())
# with a C++ library, best first
NATIVE = [*EMULATED, *(name for name in REAL if name != "torch")]
LEVELS = [*NATIVE, "torch"]


def quick(levels: list[str]) -> list[object]:
    """As parameters: `avx512-emulated` is slow where it runs the code of `amx-emulated`, which
    differs from it in the products of kernels/cpu/gemm.cpp alone."""
    slow = {"avx512-emulated"}
    return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in levels]


def open_level(name: str) -> ctypes.CDLL:
    """The library of one of NATIVE, compiled if need be. Raises BuildError."""
    if name not in EMULATED:
        return native.open_library(native.find_library(name))
    base, headers = EMULATED[name]
    path = emulated_path(name)
    if not path.exists():
        # their speed does not matter, the compiler's does
        native_build.build(base, path, _compiler(), extra=["-O1", *include(headers)])
    return native.open_library(path)


def emulated_path(name: str) -> Path:
    """In the cache; named after all that decides what is compiled."""
    base, headers = EMULATED[name]
    beside = native_build.cached_library(native.cache_folder(), base, _compiler())
    digest = hashlib.sha256(b"".join((HEADERS / header).read_bytes() for header in headers))
    return beside.with_name(f"{name}-{digest.hexdigest()[:16]}.so")


def include(headers: list[str]) -> list[str]:
    """Flags that put them before every source."""
    return [flag for header in headers for flag in ("-include", str(HEADERS / header))]


def _compiler() -> str:
    compiler = native_build.find_compiler()
    assert compiler is not None
    return compiler


@contextlib.contextmanager
def use_level(name: str) -> Iterator[None]:
    """`kernels.use_level`, for the emulated levels too."""
    library = open_level(name) if name in EMULATED else None
    with kernels.use_level(name.removesuffix(SUFFIX), library):
        yield
