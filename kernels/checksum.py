"""CRC-32: zlib's, many times as fast where the processor has carry-less products (cpu/crc32.cpp)."""

import ctypes
import functools
import zlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import native

_LEAST, _STEP = 64, 16
_FLOATS = 64
_MODULUS = 0xEDB88320  # the polynomial without x^32, its lowest bit that of x^31
_ONE = 1 << 31
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


def crc32_bf16(values: Tensor, crc: int, to: Bytes) -> int:
    """The same of float32 `values`, flat and contiguous, rounded to bf16, whose bytes `to` gets, in one
    pass where this machine can; of NaN none but a NaN is promised."""
    whole = values.numel() - values.numel() % _FLOATS
    library = _library()
    if library is not None and whole:
        found = library.everstep_crc32_bf16(values.data_ptr(), whole, crc, to.ctypes.data)
        if found >= 0:
            crc, values, to = found, values[whole:], to[2 * whole :]
    if not to.size:
        return crc
    torch.from_numpy(to).view(torch.bfloat16).copy_(values)
    return crc32(to, crc)


def joined(first: int, second: int, size: int) -> int:
    """CRC-32 of two parts one after the other: of each alone, and the second's bytes.

    As zlib's crc32_combine: what comes before is multiplied by x^(8·size).
    """
    return _product(first, _power(size)) ^ second


@functools.lru_cache(64)
def _power(size: int) -> int:
    """x^(8·size) modulo the polynomial."""
    found, factor = _ONE, _ONE >> 8
    while size:
        if size & 1:
            found = _product(found, factor)
        factor = _product(factor, factor)
        size >>= 1
    return found


def _product(one: int, other: int) -> int:
    """Modulo the polynomial; the highest bit is that of x^0."""
    found = 0
    while one:
        if one & _ONE:
            found ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ _MODULUS * (other & 1)
    return found


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, where it can do it here."""
    library = native.library()
    if library is None:
        return None
    place, crc = ctypes.c_void_p, ctypes.c_uint32
    library.everstep_crc32.argtypes = [place, ctypes.c_int64, crc, place]
    library.everstep_crc32_bf16.argtypes = [place, ctypes.c_int64, crc, place]
    for function in (library.everstep_crc32, library.everstep_crc32_bf16):
        function.restype = ctypes.c_int64
    probe = np.zeros(_LEAST, np.uint8)
    found = library.everstep_crc32(probe.ctypes.data, _LEAST, 0, None)
    return library if found >= 0 else None
