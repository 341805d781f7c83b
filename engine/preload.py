"""Torch's library is mapped on a thread of its own, while Python loads other things.

Importing torch takes 1.4 s of a processor, and a sixth of that is the dynamic linker at work on one
library of 430 MB. Python's own import holds the interpreter meanwhile; a call of `dlopen` through
ctypes does not, so another core does this part.
"""

import ctypes
import functools
import importlib.util
import os
import sys
import threading
from pathlib import Path

from .config import PATIENCE


@functools.cache
def preload_torch() -> threading.Thread | None:
    """Begin, once per process; the later `import torch` finds the library mapped, or waits for it.

    None where there is nothing to do: torch is imported, is a build for GPUs, or keeps its library
    elsewhere. A library that cannot be loaded is left for the import to complain of.
    """
    library = None if "torch" in sys.modules else _library()
    if library is None:
        return None
    # OpenMP's runtime comes with it, and reads this when it is loaded
    os.environ.update(PATIENCE | dict(os.environ))
    thread = threading.Thread(target=_map, args=(library,), name="preload-torch", daemon=True)
    thread.start()
    return thread


def _library() -> Path | None:
    if sys.platform != "linux":
        return None
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    # a build for GPUs finds CUDA's libraries in an order of its own, which is not ours to disturb
    is_ours = (folder / "libtorch_cpu.so").is_file() and not (folder / "libtorch_cuda.so").exists()
    return folder / "libtorch_cpu.so" if is_ours else None


def _map(library: Path) -> None:
    # not ctypes.CDLL(library), which holds the interpreter; a call of a C function does not
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.restype, dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    dlopen(os.fsencode(library), os.RTLD_NOW | os.RTLD_LOCAL)
