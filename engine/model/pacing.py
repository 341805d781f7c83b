"""A decoder layer in pieces, by the definition that all passes run (engine/model/model.py).

`run_layer` is a plain function. It is called again and again over operations that remember what
they gave: each call comes one piece of one product further, and stops there.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch

from ... import kernels
from ...kernels import ExpertBank, GateUp, Linear, Pieces
from ..checkpoint.ring_config import RingConfig
from .model import KernelOperations, Norms, Routes, run_layer
from .weights import Layer

Result = TypeVar("Result")


def layer_in_pieces(
    ops: KernelOperations, layer: Layer, x: torch.Tensor, index: int
) -> Pieces[tuple[torch.Tensor, Routes | None]]:
    """`run_layer`, with the same bits. A piece is bounded as kernels/paced.py says, and the
    attention of the rows is one: see `rows_at_once`."""
    paced = _PacedOperations(ops)
    while True:
        paced.begin()
        try:
            with torch.inference_mode():
                return run_layer(paced, layer, x, index)
        except _Pause:
            pass
        yield


def rows_at_once(config: RingConfig, rows: int, end: int) -> int:
    """How many of `rows` queries are attended to in a piece, over `end` keys."""
    products = 2 * end * config.num_attention_heads * config.head_dim
    return kernels.at_once(rows, products, kernels.PIECE_PRODUCTS)


class _Pause(Exception):
    """A piece is done."""


class _PacedOperations:
    """`model.Operations` that come one piece further in each run."""

    def __init__(self, ops: KernelOperations) -> None:
        self._ops = ops
        self._results: list[object] = []
        self._next = 0
        self._pieces: Pieces[object] | None = None

    def begin(self) -> None:
        """A run begins."""
        self._next = 0

    def _once(self, compute: Callable[[], Result], *, pauses: bool = False) -> Result:
        """What is done in no time, or is a piece of its own."""
        if self._next == len(self._results):
            self._results.append(compute())
            if pauses:
                raise _Pause
        self._next += 1
        return cast(Result, self._results[self._next - 1])

    def _paced(self, begin: Callable[[], Pieces[Result]]) -> Result:
        """A piece of it, unless it is done."""
        if self._next == len(self._results):
            if self._pieces is None:
                self._pieces = begin()
            try:
                next(self._pieces)
            except StopIteration as stop:
                self._pieces = None
                self._results.append(stop.value)
            raise _Pause
        self._next += 1
        return cast(Result, self._results[self._next - 1])

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._once(lambda: self._ops.rms_norm(x, weight))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._once(lambda: self._ops.add(x, y))

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._once(lambda: self._ops.add_rms_norm(x, y, weight))

    def linear(self, x: torch.Tensor, weight: Linear) -> torch.Tensor:
        return self._paced(lambda: kernels.linear_in_pieces(x, weight))

    def gate_up(self, x: torch.Tensor, weights: GateUp) -> torch.Tensor:
        return self._paced(lambda: kernels.gate_up_in_pieces(x, weights))

    def attend(self, index: int, qkv: torch.Tensor, norms: Norms) -> torch.Tensor:
        return self._once(lambda: self._ops.attend(index, qkv, norms), pauses=True)

    def route(
        self, x: torch.Tensor, gate: Linear, bias: torch.Tensor, replay: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._once(lambda: self._ops.route(x, gate, bias, replay))

    def experts(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bank: ExpertBank
    ) -> torch.Tensor:
        return self._paced(lambda: kernels.experts_in_pieces(x, ids, weights, bank))
