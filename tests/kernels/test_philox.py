"""Philox against the published vectors, and the uniforms made of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.kernels import native, native_sampling
from everstep.kernels.philox import philox4x32, uniforms

# Random123's kat_vectors, philox4x32 with 10 rounds
VECTORS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return np.array([[int(word, 16) for word in text.split()]], dtype=np.uint64)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_words(counter, key, expected):
    assert np.array_equal(philox4x32(words(counter), words(key)), words(expected))


@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40)), min_size=1, max_size=20
    )
)
def test_a_uniform_depends_on_its_own_seed_and_position_only(pairs):
    together = uniforms([s for s, _ in pairs], [p for _, p in pairs])
    assert [uniforms([s], [p])[0] for s, p in pairs] == together.tolist()
    assert ((together >= 0) & (together < 1)).all()


def test_uniforms_of_neighbouring_positions_and_seeds_look_independent():
    values = uniforms([7] * 20000, list(range(20000)))
    others = uniforms(list(range(20000)), [7] * 20000)
    for sample in (values, others):
        assert abs(sample.mean() - 0.5) < 0.01
        assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.03


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**64 - 1)),
        min_size=1,
        max_size=20,
    )
)
def test_the_library_has_the_same_uniforms(pairs):
    library = native.library()
    if library is None:
        pytest.skip("no library on this machine")
    native_sampling.declare(library)
    seeds, positions = [s for s, _ in pairs], [p for _, p in pairs]
    got = native_sampling.uniforms(library, seeds, positions)
    assert got.tolist() == uniforms(seeds, positions).tolist()
