"""The one table of tolerances: how far a kernel may be from its float64 reference, per dtype."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """What is allowed per element, and how often.

    relative  of the expected value: the last bit of T
    of_terms  of the size of the terms that were summed: float32 accumulation
    differ    share of elements that may differ at all (bf16: a float32 error that crosses a
              rounding border; more of them means a cast in another place)
    """

    relative: float
    of_terms: float
    differ: float


TOLERANCES = {
    torch.float32: Tolerance(relative=1e-6, of_terms=2e-6, differ=1.0),
    torch.bfloat16: Tolerance(relative=2.0**-7, of_terms=2e-6, differ=0.02),
}

TINY = torch.finfo(torch.float32).tiny

# a logprob in float32: absolute, and per unit of the largest logit beside it
LOGPROB = 2e-6
LOGPROB_OF_LOGITS = 3e-7
# one cell of a chi-square statistic: standard deviations that a fixed seed may be away
CHI_SQUARE_SIGMAS = 4.0


def logprob_tolerance(logits, temperature=1.0):
    """How far a float32 logprob may be off, for a row of such logits."""
    size = max(abs(value) for value in logits) / (temperature or 1.0)
    return LOGPROB + LOGPROB_OF_LOGITS * size


def assert_close(actual, expected, terms=None):
    """`actual` is `expected` within the tolerance of its dtype.

    terms  size of the summed terms, broadcast to `expected`; default: the largest of its row
    """
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    if not actual.numel():
        return
    allowed = TOLERANCES[actual.dtype]
    wide, wanted = actual.double(), expected.double()
    if terms is None:
        terms = wanted.abs().amax(-1, keepdim=True)
    # what float32 cannot hold as a normal number may be taken for zero
    bound = allowed.relative * wanted.abs() + allowed.of_terms * terms + TINY
    error = (wide - wanted).abs() - bound
    assert error.max() <= 0, f"off by {(wide - wanted).abs().max():.3e}"
    # one element at least, so that small tensors are not held to more than large ones
    unequal = int((wide != wanted).sum())
    assert unequal <= max(1, allowed.differ * actual.numel()), f"{unequal} elements differ"
