"""Where the C++ library comes from: the package, the cache, a compiler, or nowhere."""

import os
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from everstep.kernels import native, native_build

ROOT = Path(__file__).resolve().parents[2]
X86 = native.NEEDS
needs_compiler = pytest.mark.skipif(
    native_build.find_compiler() is None, reason="no C++ compiler on this machine"
)
SMALL = """
extern "C" __attribute__((visibility("default"))) int everstep_start() { return 0; }
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Sources that compile in a moment, an empty cache, no prebuilt libraries."""
    sources = tmp_path / "cpu"
    sources.mkdir()
    (sources / "small.cpp").write_text(SMALL)
    monkeypatch.setattr(native_build, "SOURCES", sources)
    monkeypatch.setattr(native_build, "PREBUILT", sources / "lib")
    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def make_compiler(small, refused, log=None):
    """A compiler that refuses a flag, and notes each call."""
    path = small / "bin" / "c++"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {log or "/dev/null"}\n'
        f'case " $* " in *" {refused} "*) echo "error: unknown {refused}" >&2; exit 1;; esac\n'
        f'exec {native_build.find_compiler()} "$@"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_the_library_is_compiled_once_into_the_cache(small, monkeypatch):
    log = small / "calls"
    monkeypatch.setenv("CXX", make_compiler(small, "-nothing", log))
    first = native.find_library("portable")
    assert first.is_relative_to(small / "cache" / "kernels")
    compiled = log.read_text().count(" -c ")
    assert native.find_library("portable") == first
    assert log.read_text().count(" -c ") == compiled == 1
    # nothing half-made is left behind
    assert [p.name for p in first.parent.iterdir()] == [first.name]
    assert native.open_library(first).everstep_start() == 0


@needs_compiler
def test_other_sources_are_another_library(small):
    before = native.find_library("portable")
    (native_build.SOURCES / "small.cpp").write_text(SMALL + "int another;\n")
    assert native.find_library("portable") != before


@needs_compiler
def test_a_library_in_the_package_is_taken_before_a_compiler(small, monkeypatch):
    built = native.find_library("portable")
    native_build.PREBUILT.mkdir()
    prebuilt = native_build.PREBUILT / native_build.library_name("portable")
    shutil.copy(built, prebuilt)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert native.choose("portable", frozenset()).path == prebuilt
    # sources that changed since make it a stranger
    (native_build.SOURCES / "small.cpp").write_text(SMALL + "int another;\n")
    with pytest.raises(native_build.BuildError, match="no C\\+\\+ compiler on the path"):
        native.find_library("portable")


@needs_compiler
def test_processes_that_compile_at_once_all_get_a_whole_library(small):
    code = (
        "import sys; from pathlib import Path; from everstep.kernels import native, native_build; "
        f"native_build.SOURCES = Path({str(native_build.SOURCES)!r}); "
        "native_build.PREBUILT = native_build.SOURCES / 'lib'; "
        "path = native.find_library('portable'); native.open_library(path); print(path)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {process.communicate()[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(paths) == 1
    assert [p.name for p in Path(paths.pop()).parent.iterdir()] != []


def test_without_a_compiler_everything_runs_on_torch_and_one_line_says_so(tmp_path):
    code = (
        "import torch; from everstep.kernels import Weight, linear, native, native_build\n"
        "from pathlib import Path; native_build.PREBUILT = Path('nowhere')\n"
        "for _ in range(2): level = native.level()\n"
        "assert (level.name, level.path, native.library()) == ('torch', None, None), level\n"
        "print(linear(torch.ones(1, 4), Weight(torch.ones(2, 4), torch.float32)).tolist())\n"
        "from everstep.kernels.packed import pack\n"
        "try: pack(Weight(torch.ones(2, 4), torch.float32))\n"
        "except NotImplementedError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "EVERSTEP_KERNELS")}
    environment |= {"PATH": str(tmp_path), "EVERSTEP_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "[[4.0, 4.0]]",
        "packed weights need the C++ library; this level is torch",
    ]
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "no C++ compiler on the path" in lines[0]
    assert "several times slower" in lines[0]
    assert "apt install g++" in lines[0]


@needs_compiler
def test_a_compiler_that_refuses_the_best_level_gives_the_next(small, monkeypatch):
    if "avx2" not in native_build.levels_of_this_kind():
        pytest.skip("this kind of machine has one level")
    monkeypatch.setenv("CXX", make_compiler(small, "-mavx512bf16"))
    # flags of a machine that has them: only small.cpp is run, and it uses none
    level = native.choose("", frozenset(X86["avx512"] | X86["avx2"]))
    assert level.name == "avx2"
    assert "avx512: " in level.reason
    assert "unknown -mavx512bf16" in level.reason


@needs_compiler
def test_sources_that_do_not_compile_leave_no_library_and_torch_runs(small, caplog):
    (native_build.SOURCES / "small.cpp").write_text("this is no C++")
    level = native.choose("portable", frozenset())
    assert (level.name, level.path) == ("torch", None)
    assert "no C++ library" in level.reason
    assert len(caplog.records) == 1
    assert not list((small / "cache").rglob("*.so"))
    assert not list((small / "cache").rglob(".build-*"))


@pytest.mark.skipif(
    "avx2" not in native_build.levels_of_this_kind(), reason="this kind of machine has one level"
)
def test_a_machine_is_given_no_level_that_it_lacks():
    everything = frozenset().union(*X86.values())
    assert native.runnable(everything) == ["amx", "avx512", "avx2", "portable", "torch"]
    assert native.runnable(frozenset(X86["avx512"] | X86["avx2"]))[0] == "avx512"
    # AVX-512 without its bf16 part, as on older servers
    assert native.runnable(everything - {"avx512_bf16"})[0] == "avx2"
    assert native.runnable(frozenset()) == ["portable", "torch"]
    with pytest.raises(ValueError, match="EVERSTEP_KERNELS=amx: this machine lacks amx_bf16"):
        native.choose("amx", frozenset(X86["avx512"] | X86["avx2"]))


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="EVERSTEP_KERNELS=fast: expected one of amx, avx512"):
        native.choose("fast", frozenset())


def test_torch_can_be_asked_for():
    level = native.choose("torch", native.machine_flags())
    assert (level.name, level.path) == ("torch", None)
    assert level.reason == "asked for by EVERSTEP_KERNELS"


@needs_compiler
@pytest.mark.parametrize("name", ["portable", "torch"])
def test_the_variable_is_read_at_start(name):
    code = "from everstep.kernels import native; print(native.level().name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"EVERSTEP_KERNELS": name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == name


@needs_compiler
@pytest.mark.parametrize("name", list(native_build.levels_of_this_kind()))
def test_every_level_of_this_kind_compiles(name):
    path = native.find_library(name)
    assert path.exists()


def test_the_sources_are_packed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["everstep.kernels"]
    packed = {p for pattern in patterns for p in (ROOT / "kernels").glob(pattern)}
    sources = {*native_build.SOURCES.glob("*.cpp"), *native_build.SOURCES.glob("*.h")}
    assert {p.resolve() for p in sources} == packed


@pytest.mark.slow
@pytest.mark.parametrize("has_compiler", [True, False])
def test_a_wheel_is_built_with_and_without_a_compiler(tmp_path, has_compiler):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build"))
    environment = os.environ | ({} if has_compiler else {"PATH": str(tmp_path), "CXX": ""})
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    libraries = [n for n in names if n.startswith("everstep/kernels/cpu/lib/")]
    assert "everstep/kernels/cpu/gemm.cpp" in names
    if has_compiler:
        assert len(libraries) == len(native_build.levels_of_this_kind())
        assert "-py3-none-" in wheel.name
        assert not wheel.name.endswith("-any.whl")
    else:
        assert libraries == []
        assert wheel.name.endswith("-py3-none-any.whl")
