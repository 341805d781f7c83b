"""Work in pieces: what is done between two steps of generation must not hold up the next one.

A piece is bounded by what it touches, which does not depend on the machine's load; a quiet machine
does each in a millisecond or two. Where one is larger, its docstring says so.
"""

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Pieces = Generator[None, None, T]
"""Work in pieces; the result is its value."""
# of a tensor that is read, checked, hashed, converted or packed
PIECE_BYTES = 1 << 20
# of weights that products read
PIECE_WEIGHT_BYTES = 16 << 20
# multiply-adds of products
PIECE_PRODUCTS = 1 << 26


def drain(pieces: Generator[object, None, T]) -> T:
    """Do all of it now."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            result: T = stop.value
            return result


def at_once(total: int, cost: int, bound: int = PIECE_BYTES, *, multiple: int = 1) -> int:
    """How many of `total` items of this cost are a piece: a multiple of `multiple`, at least that."""
    fits = bound // max(cost, 1) // multiple * multiple
    return max(multiple, min(fits, max(total, 1)))
