"""Copies of a rank's shards under a name, to score with weights that are no longer in training.

The old policy `exact` needs the weights that sampled a token, a KL penalty those of the reference.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from .optimiser import like, local_of


class HeldWeights:
    """Shards of some versions of the named parameters."""

    def __init__(self, named: Mapping[str, torch.Tensor]) -> None:
        self._named = dict(named)
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def labels(self) -> list[str]:
        """In the order in which they came."""
        return list(self._held)

    @torch.no_grad()
    def hold(self, label: str) -> None:
        """Copy the parameters as they are."""
        self._held[label] = {n: local_of(p.detach()).clone() for n, p in self._named.items()}

    def drop(self, label: str) -> None:
        del self._held[label]

    @contextmanager
    def use(self, label: str) -> Iterator[None]:
        """The parameters have the held values inside the block. For scoring alone."""
        now = {name: local_of(p.detach()).clone() for name, p in self._named.items()}
        self._write(self._held[label])
        try:
            yield
        finally:
            self._write(now)

    def tensors(self, label: str) -> dict[str, torch.Tensor]:
        """By the parameters' names, sharded as they are; they alias what is held."""
        return {name: like(self._named[name], own) for name, own in self._held[label].items()}

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._named.items():
            local_of(parameter.detach()).copy_(values[name])
