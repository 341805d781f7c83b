"""FP8 (e4m3fn) quantisers and their inverses, in plain torch (MODEL.md §2.3).

Only elementwise operations and amax, so that the bits of a row (or of a block) depend on that row
(or block) alone, on every device. Legend: M tokens, K inputs, out × in a weight as stored.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
E4M3_MAX = 448.0


def quantize_block(weight: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Cut a weight into 128×128 blocks with one scale each (format A).

    weight   (out, in)                      any float type, finite; edge blocks may be smaller
    returns  qdata (out, in) float8_e4m3fn; scale (ceil(out/128), ceil(in/128)) float32,
             with weight ≈ qdata · scale

    The three steps below in one, for whoever holds the weight whole.
    """
    scale = block_scale(block_amax(weight), power_of_two=power_of_two)
    return block_codes(weight, scale), scale


def block_amax(weight: Tensor, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """Largest absolute value of each 128×128 block, as far as this part of a weight holds it.

    weight   (rows, columns) from row and column `offset` of the whole on, any float type, not empty
    returns  float32, one value for each block of the whole that the part touches

    Exact: the largest of several parts' values is that of the block.
    """
    lead, columns = offset[1] % BLOCK, weight.shape[1]
    tops = [weight[band].float().abs().amax(dim=0) for band in _bands(weight, offset[0])]
    padded = pad(torch.stack(tops), (lead, -(lead + columns) % BLOCK))
    return padded.view(len(tops), -1, BLOCK).amax(dim=2)


def block_scale(amax: Tensor, *, power_of_two: bool) -> Tensor:
    """The scales of blocks with these largest values: s = max(amax, 1e-4)/448 in float32.

    With `power_of_two` s becomes the next power of two (never below 1e-10), which the published
    writer does for `attention.dense` and for the routed experts' gate and up projections.
    """
    scale = amax.clamp_min(1e-4) / E4M3_MAX
    return _next_power_of_two(scale.clamp_min(1e-10)) if power_of_two else scale


def block_codes(weight: Tensor, scale: Tensor, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """e4m3(weight / its block's scale), of the same part of a weight as in `block_amax`.

    scale  one for each block of the whole that the part touches
    """
    lead, columns = offset[1] % BLOCK, weight.shape[1]
    codes = torch.empty_like(
        weight, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format
    )
    for row, band in enumerate(_bands(weight, offset[0])):
        across = scale[row].repeat_interleave(BLOCK)[lead : lead + columns]
        codes[band] = (weight[band].float() / across).to(torch.float8_e4m3fn)
    return codes


def quantize_channel(
    weight: Tensor, *, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """One scale per output row (format B, strategy channel).

    weight       (out, in) any float type, finite
    scale_dtype  the type that the scale will be stored in; it is rounded to it before it divides
    returns      qdata (out, in) float8_e4m3fn, scale (out, 1) float32; a zero row has scale 1
    """
    wide = weight.float()
    scale = _row_scale(wide).to(scale_dtype).float()
    return _to_e4m3(wide / scale), scale


def quantize_activations_group(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise tokens in groups of 128 along K; the last group may be shorter.

    x        (M, K) any float type
    returns  q (M, K) float8_e4m3fn, s (M, ceil(K/128)) float32 = max(amax, 1e-10)/448
    """
    rows, columns = x.shape
    # the count is spelled out: -1 is ambiguous where there are no rows
    groups = pad(x.float(), (0, -columns % BLOCK)).view(rows, -(-columns // BLOCK), BLOCK)
    scale = groups.abs().amax(dim=2).clamp_min(1e-10) / E4M3_MAX
    q = _to_e4m3(groups / scale[:, :, None])
    return q.flatten(1)[:, :columns].contiguous(), scale


def quantize_activations_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each token with one scale.

    x        (M, K) any float type
    returns  q (M, K) float8_e4m3fn, s (M, 1) float32 = amax/448; a zero row gets s = 1, q = 0
    """
    wide = x.float()
    scale = _row_scale(wide)
    return _to_e4m3(wide / scale), scale


def dequantize_block(
    qdata: Tensor, scale: Tensor, dtype: torch.dtype, offset: tuple[int, int] = (0, 0)
) -> Tensor:
    """float(qdata) · its block's scale, computed in float32 and rounded once to `dtype`.

    qdata  (out, in) float8_e4m3fn;  scale (ceil(out/128), ceil(in/128)), any float type; or a part
           of the whole from `offset` on, and the scales of the blocks that it touches

    Raises ValueError if the scale's shape does not fit.
    """
    (rows, columns), leads = qdata.shape, [start % BLOCK for start in offset]
    expected = (-(-(leads[0] + rows) // BLOCK), -(-(leads[1] + columns) // BLOCK))
    if tuple(scale.shape) != expected:
        raise ValueError(f"block scale has shape {tuple(scale.shape)}, expected {expected}")
    wide = qdata.float()
    for row, band in enumerate(_bands(qdata, offset[0])):
        # one band of 128 rows at a time: no expanded copy of the scales
        wide[band] *= scale[row].float().repeat_interleave(BLOCK)[leads[1] : leads[1] + columns]
    return wide.to(dtype)


def dequantize_channel(qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float(qdata) · its row's scale, computed in float32 and rounded once to `dtype`.

    qdata  (out, in) float8_e4m3fn;  scale (out, 1), any float type

    Raises ValueError if the scale's shape does not fit.
    """
    if tuple(scale.shape) != (qdata.shape[0], 1):
        raise ValueError(
            f"channel scale has shape {tuple(scale.shape)}, expected {(qdata.shape[0], 1)}"
        )
    return (qdata.float() * scale.float()).to(dtype)


def _bands(weight: Tensor, first: int) -> Iterator[slice]:
    """Its rows by rows of blocks, where its first row is row `first` of the whole. One at a time: a
    copy in float32 is never of the whole."""
    start, end = 0, BLOCK - first % BLOCK
    while start < weight.shape[0]:
        yield slice(start, end)
        start, end = end, end + BLOCK


def _row_scale(wide: Tensor) -> Tensor:
    scale = wide.abs().amax(dim=1, keepdim=True) / E4M3_MAX
    return torch.where(scale == 0, 1.0, scale)


def _to_e4m3(x: Tensor) -> Tensor:
    # the conversion itself turns what is beyond the range into NaN
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _next_power_of_two(x: Tensor) -> Tensor:
    # frexp and not log2: exact on every device, also one ulp beside a power of two
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())
