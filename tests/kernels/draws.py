"""What the kernel tests share: poisoned memory, bits, odd sizes, weights in every format."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from everstep.kernels import Weight

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16)
# one, odd, and both sides of tiles, key blocks and FP8 blocks
SIZES = (1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 257)
FORMATS = (
    "plain",
    "bias",
    "block",
    "channel",
    "block-group",
    "channel-token",
    "channel-group",
    "block-token",
)

few = settings(derandomize=True, deadline=None, max_examples=12)
many = settings(derandomize=True, deadline=None, max_examples=40)

sizes = st.sampled_from(SIZES)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**20)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN: an element that a kernel does not write cannot pass for a result."""

    def fill(tensor):
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, make=make, **options: fill(make(*args, **options))
        )


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(tensor):
    """The bit patterns, as integers: NaN equals itself, and -0 is not 0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    different = int((bits(actual) != bits(expected)).sum())
    assert different == 0, f"{different} of {actual.numel()} elements have other bits"


def folded(values):
    """The order that tree_sum documents, written as a loop, one float32 at a time."""
    values = list(values)
    while len(values) > 1:
        half = (len(values) + 1) // 2
        for i in range(half, len(values)):
            values[i - half] = values[i - half] + values[i]
        values = values[:half]
    return values[0]


def random(seed, *shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def strided(tensor):
    """The same values with gaps between the elements and between the rows."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), NAN, dtype=tensor.dtype)
    part = wide[..., 1::2]
    part.copy_(tensor)
    return part


def misaligned(tensor):
    """The same values, contiguous, at an address that is no multiple of any vector's size."""
    storage = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    moved = storage[1:].view(tensor.shape)
    moved.copy_(tensor)
    return moved


def make_weight(kind, rows, columns, dtype, seed=0):
    """A linear layer in one of FORMATS, its outputs of the inputs' size."""
    scale = 1.0 / math.sqrt(columns)
    if kind in ("plain", "bias"):
        bias = random(seed + 1, rows, dtype=dtype) if kind == "bias" else None
        return Weight(random(seed, rows, columns, dtype=dtype, scale=scale), dtype, bias=bias)
    strategy, _, activations = kind.partition("-")
    codes = random(seed, rows, columns, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = (-(-rows // 128), -(-columns // 128)) if strategy == "block" else (rows, 1)
    scales = (random(seed + 1, *shape).abs() + 0.5) * (scale / 100.0)
    return Weight(codes, dtype, strategy, scales, activations=activations or "none")
