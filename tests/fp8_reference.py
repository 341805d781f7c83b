"""FP8 by its definition (MODEL.md §2.3), in float64: where the definition rounds to float32 it is
rounded here, and nowhere else."""

import numpy as np

# every finite e4m3fn value ≥ 0 by its code, from the definition: 4 exponent bits of bias 7, 3 mantissa
_CODES = np.array(
    [
        (m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16)
        for m in range(8)
    ]
)[:127]


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to the even code, saturating at 448; float64 in and out."""
    size = np.minimum(np.abs(x), 448.0)
    high = np.clip(np.searchsorted(_CODES, size), 0, 126)
    low = np.maximum(high - 1, 0)
    up, down = _CODES[high] - size, size - _CODES[low]
    code = np.where(up < down, high, np.where(down < up, low, np.where(high % 2 == 0, high, low)))
    code = np.where(_CODES[high] == size, high, code)
    return np.copysign(_CODES[code], x)


def f32(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float32)


def rounded(x: float) -> float:
    """To float32; of a quotient of two float32 this is their float32 quotient."""
    return float(np.float32(x))


def block_reference(weight: np.ndarray, *, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """(values, scales) in float64 of a weight (out, in), block by block."""
    wide = np.asarray(weight, dtype=np.float64)
    rows, columns = wide.shape
    q = np.zeros(wide.shape)
    scale = np.zeros((-(-rows // 128), -(-columns // 128)))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            where = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            s = rounded(max(np.abs(wide[where]).max(), rounded(1e-4)) / 448)
            if power_of_two:
                s = 2.0 ** np.ceil(np.log2(max(s, rounded(1e-10))))
            scale[i, j] = s
            q[where] = to_e4m3(f32(wide[where] / s).astype(np.float64))
    return q, scale
