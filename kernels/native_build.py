"""Compiles `kernels/cpu` for one level. Standard library alone: setup.py runs this file too.

A library is named after everything that decides its machine code, so that one built from other
sources or by another compiler is never taken for it.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
PREBUILT = SOURCES / "lib"

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"]
# level → flags, best first; a machine of another kind has the portable level alone
_X86_LEVELS = {
    "amx": [*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    "avx512": _AVX512,
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}
# no -ffast-math, and no contraction: bits are what the sources say
COMMON = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]


class BuildError(RuntimeError):
    """No compiler, or it refused; the message holds its last lines."""


def levels_of_this_kind() -> dict[str, list[str]]:
    """Level → compiler flags for this kind of machine (not: what this very machine can run)."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return _X86_LEVELS
    return {"portable": []}


def find_compiler() -> str | None:
    """$CXX if it is set, else the first C++ compiler on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def source_files() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def source_hash() -> str:
    """Of every source and header, and of the flags."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((COMMON, levels_of_this_kind())).encode())
    return digest.hexdigest()[:16]


def library_name(level: str) -> str:
    return f"everstep-{level}-{source_hash()}.so"


def compiler_version(compiler: str) -> str:
    done = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    return f"{compiler} {done.stdout}"


def cached_library(cache: Path, level: str, compiler: str) -> Path:
    """Where the library of this level lies once built by that compiler."""
    text = source_hash() + compiler_version(compiler)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return cache / "kernels" / key / library_name(level)


def build(level: str, target: Path, compiler: str, *, extra: Sequence[str] = ()) -> None:
    """Compile all sources for `level` into `target`, which appears whole or not at all.

    extra  further flags, for tests

    Processes that build the same target at once do not disturb each other: each works in a
    folder of its own, and the last rename wins. Raises BuildError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = [*COMMON, *levels_of_this_kind()[level], *extra]
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as name:
        folder = Path(name)
        whole = _compile(compiler, flags, folder)
        whole.replace(target)


def _compile(compiler: str, flags: Sequence[str], folder: Path) -> Path:
    jobs = []
    for source in source_files():
        command = [compiler, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        jobs.append(command)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_run, jobs))
    objects = [str(folder / f"{source.stem}.o") for source in source_files()]
    whole = folder / "whole.so"
    _run([compiler, *flags, "-shared", *objects, "-o", str(whole)])
    return whole


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from error
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise BuildError(f"{' '.join(command[:1])} ended with {done.returncode}: {tail}")
