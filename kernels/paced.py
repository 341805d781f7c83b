"""The large products of a forward pass in pieces, with the bits that they have in one.

An output of a packed product does not depend on the columns beside it (cpu/gemm.h), a row of any
operation here not on the rows beside it, so both may be cut. Of what torch multiplies a product is
a piece, and the experts of one row are, at every level.

Shapes as in dispatch.py.
"""

from collections.abc import Callable

import torch

from . import dispatch
from .dispatch import ExpertBank, GateUp, Linear, Pair
from .gemm import Weight
from .packed import LANES, PackedWeight
from .pieces import PIECE_BYTES, PIECE_PRODUCTS, PIECE_WEIGHT_BYTES, Pieces, at_once

# columns of a product that is cut: enough of them to be worth a call
_COLUMNS = 4 * LANES
# of an output, at most
_OUT_BYTES = 4


def linear_in_pieces(x: torch.Tensor, weight: Linear) -> Pieces[torch.Tensor]:
    """`dispatch.linear`."""
    return _by_columns(x, weight, dispatch.linear)


def gate_up_in_pieces(x: torch.Tensor, weights: GateUp) -> Pieces[torch.Tensor]:
    """`dispatch.gate_up`."""
    return _by_columns(x, weights, dispatch.gate_up)


def project_in_pieces(x: torch.Tensor, head: Linear) -> Pieces[torch.Tensor]:
    """`dispatch.project`."""
    return _by_columns(x, head, dispatch.project)


def experts_in_pieces(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bank: ExpertBank
) -> Pieces[torch.Tensor]:
    """`dispatch.experts`."""
    rows, slots = ids.shape
    out = torch.empty_like(x)
    size, num_bytes = _size(bank.gate_ups[0]), _bytes(bank.gate_ups[0])
    size, num_bytes = size + _size(bank.downs[0]), num_bytes + _bytes(bank.downs[0])
    count = at_once(rows, slots * size, PIECE_PRODUCTS)
    if num_bytes * min(len(bank.downs), count * slots) > PIECE_WEIGHT_BYTES:
        count = min(count, at_once(rows, slots * num_bytes, PIECE_WEIGHT_BYTES))
    for start in range(0, rows, count):
        part = slice(start, start + count)
        out[part] = dispatch.experts(x[part], ids[part], weights[part], bank)
        yield
    return out


def log_softmax_in_pieces(logits: torch.Tensor, targets: torch.Tensor) -> Pieces[torch.Tensor]:
    """ln p of a token of each row: logits (R, V) float32, targets (R,) int64 → (R,) float32."""
    rows = logits.shape[0]
    found = torch.empty(rows)
    count = at_once(rows, logits[:1].nbytes, PIECE_BYTES)
    for start in range(0, rows, count):
        part = slice(start, start + count)
        lp = dispatch.log_softmax(logits[part])
        found[part] = lp.gather(1, targets[part].unsqueeze(1))[:, 0]
        yield
    return found


def _by_columns(
    x: torch.Tensor,
    weight: Linear | GateUp,
    product: Callable[..., torch.Tensor],
) -> Pieces[torch.Tensor]:
    rows = max(1, x.shape[0])
    if not isinstance(weight, PackedWeight):
        return product(x, weight)
    columns, size, num_bytes = weight.n, _size(weight), _bytes(weight)
    count = min(
        at_once(columns, rows * size // columns, PIECE_PRODUCTS, multiple=_COLUMNS),
        at_once(columns, num_bytes // columns, PIECE_WEIGHT_BYTES, multiple=_COLUMNS),
        at_once(columns, rows * _OUT_BYTES, PIECE_BYTES, multiple=_COLUMNS),
    )
    if count >= columns:
        return product(x, weight)
    out: torch.Tensor | None = None
    for first in range(0, columns, count):
        part = product(x, weight.columns(first, min(first + count, columns)))
        if out is None:
            out = part.new_empty(x.shape[0], columns)
        out[:, first : first + count] = part
        yield
    assert out is not None
    return out


def _size(weight: Linear | GateUp) -> int:
    """Multiply-adds of a row."""
    if isinstance(weight, Pair):
        return weight.gate.data.numel() + weight.up.data.numel()
    if isinstance(weight, Weight):
        return weight.data.numel()
    return weight.n * weight.k * (2 if weight.struct.is_pair else 1)


def _bytes(weight: Linear | GateUp) -> int:
    if isinstance(weight, Pair):
        return weight.gate.data.nbytes + weight.up.data.nbytes
    return weight.data.nbytes if isinstance(weight, Weight) else weight.num_bytes
