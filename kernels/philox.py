"""Philox4x32-10: random words as a pure function of key and counter.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; test vectors
of the Random123 distribution are in tests/kernels/test_philox.py.
"""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(counter: Words, key: Words) -> Words:
    """Ten rounds.

    counter  (B, 4) uint64 holding 32-bit words
    key      (B, 2) likewise
    returns  (B, 4) likewise
    """
    c0, c1, c2, c3 = (counter[:, i].copy() for i in range(4))
    k0, k1 = key[:, 0].copy(), key[:, 1].copy()
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> _WORD) ^ c1 ^ k0,
            p1 & _LOW,
            (p0 >> _WORD) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def uniforms(seeds: list[int], positions: list[int]) -> npt.NDArray[np.float64]:
    """One uniform number in [0, 1) per (seed, position): key = seed, counter = position, 53 bits.

    seeds      B integers, taken modulo 2^64
    positions  B integers >= 0: the index of the output token that is drawn
    returns    (B,) float64, multiples of 2^-53
    """
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(seed)
    counter = np.stack([position & _LOW, position >> _WORD, zero, zero], axis=1)
    words = philox4x32(counter, np.stack([seed & _LOW, seed >> _WORD], axis=1))
    mantissa = ((words[:, 0] << _WORD) | words[:, 1]) >> np.uint64(11)
    return mantissa.astype(np.float64) * 2.0**-53
