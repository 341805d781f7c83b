"""SHA-256 of two messages at once against hashlib's, for every length about the places where blocks end."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels import sha256
from everstep.kernels.sha256 import Message, hashing, sha256_each

BYTES = np.random.default_rng(0).integers(0, 256, 1 << 16, dtype=np.uint8)
SIZES = st.integers(0, 200) | st.integers(0, 20_000)
MESSAGES = st.lists(st.tuples(st.integers(0, 130), st.integers(0, 99), SIZES), max_size=5)


def messages_of(drawn: list[tuple[int, int, int]]) -> list[Message]:
    """(size of the head, first byte of the body, its size)"""
    return [
        Message(str(number), BYTES[:head].tobytes(), BYTES[start : start + size])
        for number, (head, start, size) in enumerate(drawn)
    ]


def expected(messages: list[Message]) -> dict[str, str]:
    return {
        name: hashlib.sha256(head + body.tobytes()).hexdigest() for name, head, body in messages
    }


@pytest.fixture(params=["the library", "both", "hashlib"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "hashlib":
        monkeypatch.setattr(sha256, "_library", lambda: None)
    elif sha256._library() is None:
        pytest.skip("this processor has no instructions for SHA-256")
    # small ones go through the library as well, or those below the place in the middle
    monkeypatch.setattr(sha256, "_LEAST", 1000 if request.param == "both" else 0)


@pytest.mark.usefixtures("way")
class TestSha256:
    @given(MESSAGES)
    def test_it_is_that_of_hashlib(self, drawn: list[tuple[int, int, int]]) -> None:
        messages = messages_of(drawn)
        found = list(sha256_each(iter(messages)))
        assert len(found) == len(messages)
        assert dict(found) == expected(messages)

    @given(MESSAGES, st.integers(100, 4000))
    def test_pieces_are_bounded(self, drawn: list[tuple[int, int, int]], piece: int) -> None:
        messages = messages_of(drawn)
        found = list(hashing(iter(messages), piece))
        assert dict(one for one in found if one is not None) == expected(messages)
        total = sum(body.size for *_, body in messages)
        assert found.count(None) >= total // (piece + 2 * 64)

    def test_threads_share_messages(self) -> None:
        messages = messages_of([(n % 70, n, 7 * n * n) for n in range(90)])
        left = iter(messages)
        with ThreadPoolExecutor(3) as pool:
            # list iterators may be shared
            shares = list(pool.map(lambda _: list(sha256_each(left)), range(3)))
        found = [one for share in shares for one in share]
        assert max(Counter(name for name, _ in found).values()) == 1
        assert dict(found) == expected(messages)
