"""Linear layers of the C++ library: weights packed once, products row-invariant at every level.

The layouts are drawn in cpu/gemm.h, the order of the sums at the top of cpu/gemm.cpp. Legend:
M rows, N outputs, K inputs, T bf16 or float32.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from . import native
from .gemm import Weight
from .pieces import Pieces, at_once, drain

LANES = 16
# of columns beyond K, and of an AMX tile
K_MULTIPLE = 32
BLOCK = 128
# codes are read as float16, which has them at 1/256 of their value
CODE_SCALE = 256.0
FLOAT32, BF16, FP8_BLOCK, FP8_CHANNEL = range(4)
ROUNDED, FLOAT = 0, 1
_BYTES = {FLOAT32: 4, BF16: 2, FP8_BLOCK: 1, FP8_CHANNEL: 1}


class _Packed(ctypes.Structure):
    """The struct `Packed` of cpu/gemm.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("is_pair", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class PackedWeight:
    """One linear layer, or the gate and up of an MLP, in the library's order.

    n        outputs; of a pair: the width of the MLP
    k        inputs
    dtype    T, of the inputs and outputs
    address  of the C struct; valid as long as this object lives
    """

    n: int
    k: int
    dtype: torch.dtype
    address: int
    library: ctypes.CDLL
    struct: _Packed
    tensors: tuple[torch.Tensor | None, ...]

    @property
    def num_bytes(self) -> int:
        """What one pass over the weight reads."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)

    def columns(self, first: int, last: int) -> "PackedWeight":
        """Outputs [first, last) alone, over the same memory and with the same bits; both are
        multiples of 16, but for last = n."""
        tiles = -(-self.n // LANES)
        starts = [
            None if t is None else t.data_ptr() + first // LANES * (t.nbytes // tiles)
            for t in self.tensors
        ]
        struct = _Packed(*starts, last - first, self.k, self.struct.format, self.struct.is_pair)
        return replace(self, n=last - first, address=ctypes.addressof(struct), struct=struct)


def pack(weight: Weight, library: ctypes.CDLL | None = None) -> PackedWeight:
    """A copy of `weight` in the library's order.

    library  None: that of `native.level()`

    FP8 stays FP8 where T is bf16 (the codes are expanded in registers, with the bits of
    `weight.expanded()`); float32 models, codes that are NaN and scales beyond 2**±100 are
    expanded here. Activations are not quantised: W8A8 has another product.
    Raises NotImplementedError for W8A8, and where the level is torch.
    """
    return drain(packing((weight,), library))


def pack_gate_up(gate: Weight, up: Weight, library: ctypes.CDLL | None = None) -> PackedWeight:
    """Two weights of one shape, type and format for `packed_gate_up`.

    Raises ValueError if they differ in those; NotImplementedError as `pack`.
    """
    return drain(packing((gate, up), library))


def packed_linear(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """T(x Wᵀ + b): float32 sums, rounded once.

    x        (M, K) T, M >= 0; elements of a row side by side
    returns  (M, N) T; a row's bits depend on that row and W alone
    """
    return _linear(x, packed, ROUNDED)


def packed_linear_float(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """x Wᵀ + b before it is rounded to T.

    x        (M, K) T, M >= 0; elements of a row side by side
    returns  (M, N) float32
    """
    return _linear(x, packed, FLOAT)


def packed_gate_up(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """T(T(silu(T(x Gᵀ))) · T(x Uᵀ)) in one product (MODEL.md §3.1).

    x        (M, K) T;  packed: of `pack_gate_up`
    returns  (M, I) T
    """
    assert packed.struct.is_pair
    return _linear(x, packed, ROUNDED)


def _linear(x: torch.Tensor, packed: PackedWeight, output: int) -> torch.Tensor:
    rows, columns = x.shape
    if columns != packed.k or x.dtype != packed.dtype:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}, expected (M, {packed.k}) {packed.dtype}"
        )
    if x.stride(1) != 1 and columns > 1:
        x = x.contiguous()
    out = torch.empty(rows, packed.n, dtype=packed.dtype if output == ROUNDED else torch.float32)
    packed.library.everstep_linear(
        packed.address,
        x.data_ptr(),
        rows,
        x.stride(0),
        out.data_ptr(),
        packed.n,
        output,
        torch.get_num_threads(),
    )
    return out


def packing(
    weights: tuple[Weight, ...],
    library: ctypes.CDLL | None = None,
    *,
    expands: bool = False,
) -> Pieces[PackedWeight]:
    """`pack` of one weight, `pack_gate_up` of two, in pieces; the first raises what those raise.

    expands  FP8 codes are not kept, whatever T is
    """
    library = library or native.library()
    if library is None:
        raise NotImplementedError("packed weights need the C++ library; this level is torch")
    if any(w.activations != "none" and w.scale is not None for w in weights):
        raise NotImplementedError("W8A8 weights have a product of their own")
    if len({(w.data.shape, w.dtype, "" if expands else w.kind) for w in weights}) > 1:
        gate, up = weights
        raise ValueError(
            f"gate {tuple(gate.data.shape)} {gate.kind} and up {tuple(up.data.shape)} {up.kind} "
            "must be of one shape, type and format"
        )
    declare(library)
    first = weights[0]
    n, k = first.data.shape
    chosen = yield from _choosing(weights, expands=expands)
    tiles, width = -(-n // LANES), k if chosen == FLOAT32 else -(-k // K_MULTIPLE) * K_MULTIPLE
    tile_bytes = width * LANES * _BYTES[chosen]
    data = aligned_bytes(len(weights) * tiles * tile_bytes)
    for i, weight in enumerate(weights):
        keeps = chosen in (FP8_BLOCK, FP8_CHANNEL)
        # of a dequantised row there is a float32 copy on the way
        for rows in _bands(weight, k * (1 if keeps else 4)):
            part = weight.rows(rows)
            stored = (part.data if keeps else part.expanded()).contiguous()
            library.everstep_pack(
                chosen,
                stored.data_ptr(),
                stored.shape[0],
                k,
                k,
                data.data_ptr() + len(weights) * (rows.start // LANES) * tile_bytes,
                len(weights),
                i,
                torch.get_num_threads(),
            )
            yield
    scale = None
    if chosen in (FP8_BLOCK, FP8_CHANNEL):
        scale = _interleave([_tile_scales(w, chosen, tiles) for w in weights])
    bias = None
    if any(w.bias is not None for w in weights):
        bias = _interleave([_tile_bias(w, tiles) for w in weights])
    struct = _Packed(
        data.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        n,
        k,
        chosen,
        len(weights) == 2,
    )
    address = ctypes.addressof(struct)
    return PackedWeight(n, k, first.dtype, address, library, struct, (data, scale, bias))


def _bands(weight: Weight, row_bytes: int) -> Iterator[slice]:
    """Rows of a piece each: whole tiles, and whole blocks of scales."""
    n = weight.data.shape[0]
    count = at_once(n, row_bytes, multiple=BLOCK if weight.kind == "block" else LANES)
    for start in range(0, n, count):
        yield slice(start, min(start + count, n))


def _choosing(weights: tuple[Weight, ...], *, expands: bool) -> Pieces[int]:
    """The format that these are packed in."""
    first = weights[0]
    if first.dtype == torch.float32:
        return FLOAT32
    if first.dtype != torch.bfloat16:
        raise NotImplementedError(f"no kernels for {first.dtype}; bfloat16 and float32 have them")
    if expands or any(weight.scale is None for weight in weights):
        return BF16
    for weight in weights:
        for rows in _bands(weight, weight.data.shape[1]):
            if not _is_plain(weight.rows(rows)):
                return BF16
            yield
    return FP8_BLOCK if first.kind == "block" else FP8_CHANNEL


def _is_plain(weight: Weight) -> bool:
    """True iff codes and scales are such as the decoder in the product handles."""
    assert weight.scale is not None
    codes = weight.data.view(torch.uint8) & 0x7F
    scale = weight.scale.float().abs()
    # no product is a subnormal, which AVX-512 would take for zero before it rounds it to bf16
    is_usual = (scale == 0) | ((scale >= 2.0**-100) & (scale < 2.0**100))
    return bool((codes != 0x7F).all()) and bool(is_usual.all())


def _tile_scales(weight: Weight, chosen: int, tiles: int) -> torch.Tensor:
    """(tiles, ceil(K/128)) for block, (tiles, 16) for channel."""
    assert weight.scale is not None
    scale = weight.scale.float() * CODE_SCALE
    if chosen == FP8_BLOCK:
        return scale.repeat_interleave(BLOCK // LANES, dim=0)[:tiles]
    padded = torch.zeros(tiles * LANES)
    padded[: scale.shape[0]] = scale[:, 0]
    return padded.view(tiles, LANES)


def _tile_bias(weight: Weight, tiles: int) -> torch.Tensor:
    padded = torch.zeros(tiles * LANES)
    if weight.bias is not None:
        padded[: weight.bias.shape[0]] = weight.bias.float()
    return padded.view(tiles, LANES)


def _interleave(parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of the parts in turn."""
    return torch.stack(parts, dim=1).contiguous()


def aligned_bytes(count: int) -> torch.Tensor:
    """(count,) uint8 whose address is a multiple of 64."""
    raw = torch.empty(count + 64, dtype=torch.uint8)
    offset = -raw.data_ptr() % 64
    return raw[offset : offset + count]


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the types, once per library: integers would else be cut to 32 bits."""
    if getattr(library, "is_declared", False):
        return
    i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    linear = library.everstep_linear
    linear.argtypes, linear.restype = [pointer, pointer, i64, i64, pointer, i64, i32, i32], None
    packing = library.everstep_pack
    packing.argtypes = [i32, pointer, i64, i64, i64, pointer, i32, i32, i32]
    packing.restype = None
    library.is_declared = True  # type: ignore[attr-defined]
