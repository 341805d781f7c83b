"""Torch's library is mapped before torch is imported, and the import finds it there."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def said(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_the_library_is_mapped_without_the_module() -> None:
    code = """
import os, sys
from pathlib import Path
os.environ.pop("OMP_WAIT_POLICY", None)
from everstep.engine.preload import preload_torch
thread = preload_torch()
assert preload_torch() is thread
thread.join()
maps = Path("/proc/self/maps").read_text()
print("libtorch_cpu.so" in maps, "torch" in sys.modules, os.environ["OMP_WAIT_POLICY"])
import torch
print(torch.ones(3).sum().item())
"""
    assert said(code).splitlines() == ["True False PASSIVE", "3.0"]


def test_nothing_is_begun_where_torch_is_there() -> None:
    code = "import torch; from everstep.engine.preload import preload_torch; print(preload_torch())"
    assert said(code) == "None"
