"""Lengths of rollouts, drawn: a lognormal with a cap, which equal lengths are a case of."""

import math
from statistics import NormalDist

from msgspec import Struct

from ...engine.rollout import derive_seed
from .words import Sample

_NORMAL = NormalDist()


class CappedLognormal(Struct, frozen=True, kw_only=True):
    """min(lognormal, cap), where `share_at_cap` of all samples reach the cap.

    So one number says how heavy the tail is: cap / median, `ratio`. At ratio 1 all are equal.
    """

    median: int
    ratio: float
    share_at_cap: float = 0.01
    seed: int = 0

    @property
    def cap(self) -> int:
        return round(self.median * self.ratio)

    @property
    def spread(self) -> float:
        """σ of the logarithm."""
        return math.log(self.ratio) / _NORMAL.inv_cdf(1 - self.share_at_cap)

    @property
    def mean(self) -> float:
        """E[min(X, cap)], before rounding to whole tokens."""
        spread = self.spread
        if not spread:
            return float(self.median)
        edge = math.log(self.ratio) / spread
        below = self.median * math.exp(spread**2 / 2) * _NORMAL.cdf(edge - spread)
        return below + self.cap * (1 - _NORMAL.cdf(edge))

    def __call__(self, sample: Sample) -> int:
        """The length of a sample; another attempt is another draw."""
        return self.draw(sample.prompt, sample.index, sample.attempt)

    def draw(self, *name: object) -> int:
        uniform = (derive_seed(self.seed, *name) + 0.5) / 2**63
        length = self.median * math.exp(self.spread * _NORMAL.inv_cdf(uniform))
        return max(1, min(self.cap, round(length)))
