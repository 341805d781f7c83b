"""CRC-32: zlib's, several times as fast where the processor has carry-less products (cpu/crc32.cpp)."""

import ctypes
import functools
import zlib

import numpy as np
import numpy.typing as npt

from . import native

_LEAST, _STEP = 64, 16


def crc32(data: npt.NDArray[np.uint8], crc: int = 0) -> int:
    """`zlib.crc32(data, crc)` of contiguous bytes; other threads run meanwhile."""
    whole = data.size - data.size % _STEP
    library = _library()
    if library is None or whole < _LEAST:
        return zlib.crc32(data.data, crc)
    return zlib.crc32(data[whole:].data, library.everstep_crc32(data.ctypes.data, whole, crc))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, where it can do it here."""
    library = native.library()
    if library is None:
        return None
    library.everstep_crc32.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32]
    library.everstep_crc32.restype = ctypes.c_int64
    probe = np.zeros(_LEAST, np.uint8)
    return library if library.everstep_crc32(probe.ctypes.data, _LEAST, 0) >= 0 else None
