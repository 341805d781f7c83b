"""CRC-32: zlib's, many times as fast where the processor has carry-less products (cpu/crc32.cpp)."""

import ctypes
import functools
import zlib

import numpy as np
import numpy.typing as npt

from . import native

_LEAST, _STEP = 64, 16
Bytes = npt.NDArray[np.uint8]


def crc32(data: Bytes, crc: int = 0, to: Bytes | None = None) -> int:
    """`zlib.crc32(data, crc)` of contiguous bytes; other threads run meanwhile.

    to  of the same size and elsewhere: gets the bytes in the same pass
    """
    whole = data.size - data.size % _STEP
    library = _library()
    if library is None or whole < _LEAST:
        whole = 0
    else:
        target = None if to is None else to.ctypes.data
        crc = library.everstep_crc32(data.ctypes.data, whole, crc, target)
    if whole == data.size:
        return crc
    if to is not None:
        to[whole:] = data[whole:]
    return zlib.crc32(data[whole:].data, crc)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, where it can do it here."""
    library = native.library()
    if library is None:
        return None
    place, crc = ctypes.c_void_p, ctypes.c_uint32
    library.everstep_crc32.argtypes = [place, ctypes.c_int64, crc, place]
    library.everstep_crc32.restype = ctypes.c_int64
    probe = np.zeros(_LEAST, np.uint8)
    found = library.everstep_crc32(probe.ctypes.data, _LEAST, 0, None)
    return library if found >= 0 else None
