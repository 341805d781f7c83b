"""Matrix products whose rows do not see each other.

A library picks its inner loops by shape, so the bits of a row may change with the number of
rows beside it. Here every product is issued in tiles of a fixed number of rows, padded with
zeros; a tile size is used only after `probe` has seen on this machine, for this very matrix
shape, that a row's bits do not depend on its place in the tile, nor on the tile size chosen
(docs/explain/numerics.md). Where no tile holds, rows are multiplied one at a time. Small steps run on
one thread: where several give other bits than one does, one multiplies everything.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from .quant import (
    dequantize_block,
    dequantize_channel,
    quantize_activations_group,
    quantize_activations_token,
)
from .reduce import tree_sum
from .torch_threads import one_thread

SMALL_TILE = 16
WIDE_TILES = (256, 64)
GROUP = 128

Kind = Literal["plain", "block", "channel"]
Activations = Literal["none", "group", "token"]


@dataclass(frozen=True)
class Weight:
    """One linear layer, as it is multiplied.

    data         (N, K) T (any float type before it is prepared), or float8_e4m3fn where `scale`
                 is given
    scale        float32: (ceil(N/128), ceil(K/128)) for block, (N, 1) for channel
    bias         (N,) T or None, added to the float32 sum before it is rounded
    dtype        T: what `data` is expanded to, once rounded
    activations  group, token: W8A8 (MODEL.md §2.3); none: weight-only
    """

    data: torch.Tensor
    dtype: torch.dtype
    kind: Kind = "plain"
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    activations: Activations = "none"

    @property
    def out_features(self) -> int:
        return self.data.shape[0]

    def rows(self, rows: slice) -> "Weight":
        """Some outputs, without their bias; for block they begin at a multiple of 128."""
        scale = self.scale
        if scale is not None and self.kind == "block":
            scale = scale[rows.start // GROUP : -(-rows.stop // GROUP)]
        elif scale is not None:
            scale = scale[rows]
        return replace(self, data=self.data[rows], scale=scale, bias=None)

    def expanded(self) -> torch.Tensor:
        """(N, K) in T: dequantised and rounded once; plain weights as they are."""
        if self.scale is None:
            return self.data.to(self.dtype)
        expand = dequantize_block if self.kind == "block" else dequantize_channel
        return expand(self.data, self.scale, self.dtype)


@dataclass
class ItemPlan:
    """Whether batched products keep an item's bits, per (R, D, L, layout, threads); None: so many
    threads give other bits than one."""

    is_safe: dict[tuple[int, int, int, bool, int], bool | None] = field(default_factory=dict)

    def of(self, rows: int, inner: int, columns: int, is_contiguous: bool) -> bool | None:
        """Of a product of this shape; probed at first use."""
        shape = (rows, inner, columns, is_contiguous)
        key = (*shape, torch.get_num_threads())
        if key not in self.is_safe:
            found: bool | None = probe_items(*shape)
            if key[-1] > 1 and not _items_are_of_one_thread(found, *shape):
                found = None
            self.is_safe[key] = found
        return self.is_safe[key]


@dataclass
class TilePlan:
    """Row tiles that were seen to give equal bits, per (dtype, N, K, threads); none: so many threads
    give other bits than one."""

    tiles: dict[tuple[torch.dtype, int, int, int], tuple[int, ...]] = field(default_factory=dict)

    def of(self, w: torch.Tensor) -> tuple[int, ...]:
        """Tile sizes for this matrix, largest first; probed at first use."""
        key = (w.dtype, w.shape[0], w.shape[1], torch.get_num_threads())
        if key not in self.tiles:
            found = probe(w)
            if key[-1] > 1 and not _rows_are_of_one_thread(w, found):
                found = ()
            self.tiles[key] = found
        return self.tiles[key]


PLAN = TilePlan()
ITEMS = ItemPlan()


def _product(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(x, w.t(), out=out)


def probe(w: torch.Tensor) -> tuple[int, ...]:
    """Which row tiles keep a row's bits on this machine for a matrix of this shape.

    w        (N, K)
    returns  tile sizes, largest first. (1,) if a row's bits depend on its place in a small tile;
             the small tile alone if wider ones give other bits than it does
    """
    generator = _generator()
    x = torch.randn(WIDE_TILES[0], w.shape[1], generator=generator).to(w.dtype)
    order = torch.randperm(SMALL_TILE * 4, generator=generator)

    def rows_by(tile: int, rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty(rows.shape[0], w.shape[0], dtype=w.dtype)
        for i in range(0, rows.shape[0], tile):
            _product(rows[i : i + tile], w, out[i : i + tile])
        return out

    some = x[: SMALL_TILE * 4]
    small = rows_by(SMALL_TILE, some)
    shuffled = rows_by(SMALL_TILE, some[order].contiguous())
    alone = torch.zeros_like(x[:SMALL_TILE])
    alone[3] = some[0]
    lonely = rows_by(SMALL_TILE, alone)
    if not (torch.equal(shuffled, small[order]) and torch.equal(lonely[3], small[0])):
        return (1,)
    whole = rows_by(SMALL_TILE, x)
    wide = tuple(tile for tile in WIDE_TILES if torch.equal(rows_by(tile, x), whole))
    return (*wide, SMALL_TILE)


def matmul_rows(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x wᵀ, a row's bits depending on that row and w alone.

    x        (M, K) contiguous, M >= 0
    w        (N, K) contiguous, same dtype
    returns  (M, N), that dtype (sums in float32 inside)
    """
    tiles = PLAN.of(w)
    if not tiles:
        with one_thread():
            return matmul_rows(x, w)
    return _by_tiles(x, w, tiles)


def _rows_are_of_one_thread(w: torch.Tensor, tiles: tuple[int, ...]) -> bool:
    """Whether products by these tiles have the bits of those on one thread."""
    x = torch.randn(SMALL_TILE * 2, w.shape[1], generator=_generator()).to(w.dtype)
    here = _by_tiles(x, w, tiles[-1:])
    with one_thread():
        return torch.equal(here, matmul_rows(x, w))


def _by_tiles(x: torch.Tensor, w: torch.Tensor, tiles: tuple[int, ...]) -> torch.Tensor:
    rows, smallest = x.shape[0], tiles[-1]
    padded = -(-rows // smallest) * smallest
    if padded != rows:
        x = torch.cat([x, x.new_zeros(padded - rows, x.shape[1])])
    out = torch.empty(padded, w.shape[0], dtype=w.dtype)
    start = 0
    while start < padded:
        tile = next(t for t in tiles if t <= padded - start)
        if tile == 1:
            # memory of its own, aligned: a library may sum a single row by its address
            own = torch.empty(1, w.shape[0], dtype=w.dtype)
            _product(x[start : start + 1].clone(), w, own)
            out[start] = own[0]
        else:
            _product(x[start : start + tile], w, out[start : start + tile])
        start += tile
    return out[:rows]


def matmul_items(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a bᵀ for each item; an item's rows depend on themselves and on that item's b alone.

    a        (I, R, D) float32
    b        (I, L, D) float32, itself or its transpose contiguous
    returns  (I, R, L) float32
    """
    is_safe = ITEMS.of(a.shape[1], a.shape[2], b.shape[1], b.is_contiguous())
    if is_safe is None:
        with one_thread():
            return matmul_items(a, b)
    if is_safe:
        return torch.bmm(a, b.transpose(1, 2))
    return tree_sum(a.unsqueeze(2) * b.unsqueeze(1))


def _items_are_of_one_thread(
    is_safe: bool | None, rows: int, inner: int, columns: int, is_contiguous: bool
) -> bool:
    """Whether batched products have the bits, or the refusal, of one thread."""
    a, right = _drawn_items(rows, inner, columns, is_contiguous)
    here = torch.bmm(a, right)
    with one_thread():
        if ITEMS.of(rows, inner, columns, is_contiguous) != is_safe:
            return False
        return not is_safe or torch.equal(here, torch.bmm(a, right))


def probe_items(rows: int, inner: int, columns: int, is_contiguous: bool) -> bool:
    """True iff a batched product of this shape keeps an item's bits on this machine:
    for any number of items, any place among them, any place of a row in its item."""
    a, right = _drawn_items(rows, inner, columns, is_contiguous)
    whole = torch.bmm(a, right)
    order = torch.randperm(len(a), generator=_generator())
    flipped = torch.bmm(a.flip(1), right).flip(1)
    return (
        all(torch.equal(torch.bmm(a[:n], right[:n]), whole[:n]) for n in (1, 2, 3, 7, 16, 50))
        and torch.equal(torch.bmm(a[order], right[order]), whole[order])
        and torch.equal(flipped, whole)
    )


def _drawn_items(
    rows: int, inner: int, columns: int, is_contiguous: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides of a batched product of 96 items: (96, R, D) and (96, D, L)."""
    generator, count = _generator(), 96
    a = torch.randn(count, rows, inner, generator=generator)
    shape = (count, columns, inner) if is_contiguous else (count, inner, columns)
    b = torch.randn(shape, generator=generator)
    return a, b.transpose(1, 2) if is_contiguous else b


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20251018)


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """T(x Wᵀ + b), row-invariant, for every weight format.

    x        (M, K) T, M >= 0
    returns  (M, N) T

    Weight-only FP8 equals the same call on `weight.expanded()` to the bit.
    Source: MODEL.md §3.1, and §2.3 for W8A8.
    """
    is_w8a8 = weight.activations != "none" and weight.scale is not None
    if is_w8a8 or weight.bias is not None:
        return linear_float(x, weight).to(x.dtype)
    return matmul_rows(x.contiguous(), weight.expanded())


def linear_float(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """x Wᵀ + b before it is rounded to T: the bias, or a routing weight, meets the float32 sum.

    x        (M, K) T, M >= 0
    returns  (M, N) float32
    """
    x = x.contiguous()
    if weight.activations != "none" and weight.scale is not None:
        total = _product_w8a8(x, weight)
    else:
        total = matmul_rows(x.float(), weight.expanded().float())
    return total if weight.bias is None else total + weight.bias.float()


def _product_w8a8(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Products of FP8 codes summed in float32, scaled per group or per row (MODEL.md §2.3)."""
    scale = weight.scale
    assert scale is not None
    by_token = weight.activations == "token"
    quantize = quantize_activations_token if by_token else quantize_activations_group
    codes, row_scale = quantize(x)
    if by_token and weight.kind == "channel":
        column_scale = scale.reshape(1, -1)
        total = matmul_rows(codes.float(), weight.data.float()) * row_scale * column_scale
    else:
        total = torch.zeros(x.shape[0], weight.out_features)
        for g in range(-(-x.shape[1] // GROUP)):
            part = slice(g * GROUP, min((g + 1) * GROUP, x.shape[1]))
            if weight.kind == "block":
                column_scale = scale[:, g].repeat_interleave(GROUP)[: weight.out_features]
            else:
                column_scale = scale[:, 0]
            product = matmul_rows(
                codes[:, part].float().contiguous(), weight.data[:, part].float().contiguous()
            )
            own_scale = row_scale if by_token else row_scale[:, g : g + 1]
            total = total + product * own_scale * column_scale
    return total


def explain() -> dict[str, str]:
    """What the probes found so far: operation → what is used and why."""
    tiles: dict[tuple[int, ...], int] = {}
    for found in PLAN.tiles.values():
        tiles[found] = tiles.get(found, 0) + 1
    shapes = ", ".join(
        f"rows by {'/'.join(map(str, t)) or 'one thread'}: {n} shapes" for t, n in tiles.items()
    )
    slow = sum(not safe for safe in ITEMS.is_safe.values())
    return {
        "linear": f"torch.mm in padded row tiles ({shapes or 'not probed yet'})",
        "attention": (
            f"torch.bmm per key block ({len(ITEMS.is_safe) - slow} shapes hold their bits"
            + (f", {slow} by elementwise products instead)" if slow else ")")
        ),
        "sums": "elementwise trees: fixed by the length alone",
        "sampling": "philox4x32-10, inverse of the cumulative sums",
    }
