"""What a sample is compared with: logprobs under older weights, each token under its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...engine import log
from ..losses.losses import old_logprobs
from ..trajectories.samples import Sample
from .held_weights import HeldWeights
from .sharding import World

REFERENCE = "reference"
"""What the held weights of the reference are called; others are called as their version."""


@dataclass
class Item:
    """A sample that is computed, and the logprobs (scored tokens,) that it is compared with.

    proximal  (scored tokens,) bool: of `LossInputs`
    """

    sample: Sample
    lp_old: torch.Tensor | None = None
    lp_ref: torch.Tensor | None = None
    proximal: torch.Tensor | None = None


class ExactPolicy:
    """The old policy `exact`: a token is compared with the weights that sampled it, if they are held;
    with those before this update, the newest, if they are gone (PAPER.md §2.3: `exact` if that
    checkpoint is still there, else `proximal`)."""

    def __init__(self, held: HeldWeights, world: World, hold_versions: int) -> None:
        self._held, self._world, self._hold_versions = held, world, hold_versions
        self._is_told = False

    def score(
        self,
        items: Sequence[Item],
        newest: int,
        score: Callable[[Sequence[Item]], Sequence[torch.Tensor]],
    ) -> None:
        """Fill `lp_old` and `proximal` of this rank's items. Collective.

        newest  version of the weights in training, which is held
        score   logprobs by the weights as they are; collective
        """
        held = [int(label) for label in self._held.labels if label != REFERENCE]
        versions = []
        for item in items:
            own = torch.from_numpy(item.sample.scored(item.sample.versions))
            item.proximal = ~torch.isin(own, torch.tensor(held))
            if item.sample.undone is not None:
                item.proximal |= torch.from_numpy(item.sample.scored(item.sample.undone))
            versions.append(own.masked_fill(item.proximal, newest))
        gone = sum(int(item.proximal.sum()) for item in items if item.proximal is not None)
        known = [sum(int((own == version).sum()) for own in versions) for version in held]
        *counts, num_gone = self._world.sums(*known, gone)
        self._tell(int(num_gone), newest)
        found: list[dict[int, torch.Tensor]] = [{} for _ in items]
        for version, count in zip(held, counts, strict=True):
            if not count:
                continue
            chosen = [n for n, own in enumerate(versions) if bool((own == version).any())]
            with self._held.use(str(version)):
                scored = score([items[n] for n in chosen])
            for n, lp in zip(chosen, scored, strict=True):
                found[n][version] = lp
        for item, own, lps in zip(items, versions, found, strict=True):
            if lps:
                some = next(iter(lps.values()))
                item.lp_old = old_logprobs("exact", some, own.to(some.device), lps)

    def _tell(self, num_gone: int, iteration: int) -> None:
        """Once in this life of the trainer; `proximal_fraction` has it for every iteration."""
        if not num_gone or self._is_told:
            return
        self._is_told = True
        if self._world.is_first:
            log.event(
                "trainer.weights_gone",
                level="warning",
                iteration=iteration,
                tokens=num_gone,
                hold_versions=self._hold_versions,
                trained="with the proximal old policy; see proximal_fraction",
            )
