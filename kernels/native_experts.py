"""Routed experts of the C++ library: one call for all experts of a layer (cpu/experts.cpp)."""

import ctypes
from collections.abc import Sequence

import torch

from .packed import PackedWeight


class ExpertTable:
    """The addresses of a layer's packed experts; keeps the weights alive.

    gate_ups  E pairs of one shape; downs E weights of one shape
    Raises ValueError if they are not of one shape and type.
    """

    def __init__(self, gate_ups: Sequence[PackedWeight], downs: Sequence[PackedWeight]) -> None:
        kinds = {(w.n, w.k, w.dtype) for w in gate_ups}, {(w.n, w.k, w.dtype) for w in downs}
        if len(gate_ups) != len(downs) or any(len(kind) != 1 for kind in kinds):
            raise ValueError(f"experts of different shapes: {kinds}")
        self._weights = (tuple(gate_ups), tuple(downs))
        self._gate_ups = (ctypes.c_void_p * len(gate_ups))(*(w.address for w in gate_ups))
        self._downs = (ctypes.c_void_p * len(downs))(*(w.address for w in downs))
        self.library = gate_ups[0].library
        self.width, self.dtype = gate_ups[0].k, gate_ups[0].dtype
        i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
        call = self.library.everstep_experts
        call.argtypes = [i32, pointer, i64, *[pointer] * 2, *[i64] * 3, *[pointer] * 3, i32]
        call.restype = None

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the two lists of weights, gate-ups and downs; valid as long as this object lives."""
        return ctypes.addressof(self._gate_ups), ctypes.addressof(self._downs)

    def __len__(self) -> int:
        return len(self._gate_ups)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`dispatch.experts` for these weights: x (T, H) T, ids and weights (T, K) → (T, H) T."""
        if x.shape[1] != self.width or x.dtype != self.dtype or ids.dtype != torch.int64:
            raise ValueError(f"x {tuple(x.shape)} {x.dtype} or ids {ids.dtype} do not fit")
        if x.stride(1) != 1:
            x = x.contiguous()
        ids, weights = ids.contiguous(), weights.contiguous()
        out = torch.empty((x.shape[0], self.width), dtype=x.dtype)
        self.library.everstep_experts(
            x.dtype == torch.bfloat16, x.data_ptr(), x.stride(0), ids.data_ptr(),
            weights.data_ptr(), *ids.shape, len(self), self._gate_ups, self._downs,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out
