"""AdamW over a rank's shards: masters, moments and clipping in float32.

An update is elementwise, so each rank makes it on the plain tensors of its shards; only the norm of
the gradient needs the others. State has the parameters' names and shapes (DTensors), so that a
checkpoint of it can be read by another number of ranks.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .config import OptimConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimiser:
    """AdamW of the named parameters, which may be DTensors.

    A parameter of which a rank holds no row has a shard without elements there.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        self._named, self._config = dict(named), config
        # the same memory as the parameters', seen as this rank's own tensors
        self._own = {name: nn.Parameter(local_of(p.detach())) for name, p in named.items()}
        self._adamw = torch.optim.AdamW(
            self._own.values(),
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            foreach=True,
        )
        self.num_updates = 0

    def step(self) -> float:
        """One update from the parameters' gradients, which are dropped; the norm of the gradient
        before it was clipped. Where that is not finite there is no update, and none is counted."""
        for name, parameter in self._named.items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient: ranks would differ in what they send")
            self._own[name].grad = local_of(parameter.grad)
        norm = self._norm()
        if math.isfinite(norm):
            self._update(norm)
            self.num_updates += 1
        for name, parameter in self._named.items():
            parameter.grad = self._own[name].grad = None
        return norm

    @torch.no_grad()
    def _update(self, norm: float) -> None:
        limit = self._config.max_norm
        if limit is not None and norm > limit:
            grads = [p.grad for p in self._own.values() if p.grad is not None]
            torch._foreach_mul_(grads, limit / norm)
        for group in self._adamw.param_groups:
            group["lr"] = self._config.rate(self.num_updates)
        self._adamw.step()

    def _norm(self) -> float:
        squares = torch.zeros((), dtype=torch.float64)
        for own in self._own.values():
            assert own.grad is not None
            squares += torch.linalg.vector_norm(own.grad, dtype=torch.float64).cpu() ** 2
        if dist.is_initialized():
            sizes = {p.device_mesh for p in self._named.values() if isinstance(p, DTensor)}
            for mesh in sizes:
                dist.all_reduce(squares, group=mesh.get_group())
        return float(squares.sqrt())

    def state(self) -> dict[str, torch.Tensor]:
        """Moments by `exp_avg.NAME`, sharded as their parameters are; zeros before the first update."""
        found = {}
        for name, parameter in self._named.items():
            own = self._own[name]
            state = self._adamw.state.get(own)
            for moment in _MOMENTS:
                value = torch.zeros_like(own) if state is None else state[moment]
                found[f"{moment}.{name}"] = like(parameter, value.detach())
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Take up what `state` gave after `num_updates` updates."""
        self.num_updates = num_updates
        for name, own in self._own.items():
            moments = {m: local_of(state[f"{m}.{name}"]).clone() for m in _MOMENTS}
            self._adamw.state[own] = {"step": torch.tensor(float(num_updates)), **moments}


def local_of(x: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, the same memory; anything else as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole_of(x: torch.Tensor) -> torch.Tensor:
    """A DTensor gathered from all ranks, anything else as it is. Collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A DTensor of this rank's part, laid out as `parameter`; the part itself if that is none."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
