"""Frames of the bridge: what is not one of ours is refused with a reason, whatever it is."""

import contextlib
import pickle

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine.errors import BridgeError
from everstep.trainer_bridge import protocol
from everstep.trainer_bridge.protocol import Deliver, Hello, Welcome

from .bridge_groups import group

HELLO = Hello(protocol=1, software="test", run="run", lineage="a", rank=0, world=1)


def test_a_group_comes_back_as_it_went() -> None:
    sent = Deliver(3, 7, 0, group("p", [0, 4, 9]))
    assert protocol.decode_to_rank(protocol.encode(sent)) == sent
    assert sent.group.num_tokens == 13


def test_another_version_is_named_even_if_its_fields_are_unknown() -> None:
    raw = {"type": "hello", "protocol": 9, "software": "everstep 7.0", "shoes": 2}
    with pytest.raises(
        BridgeError, match=r"\(everstep 7.0\) speaks bridge protocol 9, this side 1"
    ):
        protocol.decode_to_engine(msgspec.msgpack.encode(raw))


@given(st.binary(max_size=300))
def test_garbage_is_refused(frame: bytes) -> None:
    for decode in (protocol.decode_to_engine, protocol.decode_to_rank):
        with pytest.raises(BridgeError):
            decode(frame)


@given(st.data())
def test_a_message_with_a_byte_changed_is_a_message_or_refused(data: st.DataObject) -> None:
    frame = bytearray(protocol.encode(Deliver(1, 2, 3, group("p", [3]))))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BridgeError):
        protocol.decode_to_rank(bytes(frame))


@given(st.data())
def test_half_a_message_is_refused(data: st.DataObject) -> None:
    frame = protocol.encode(HELLO)
    with pytest.raises(BridgeError):
        protocol.decode_to_engine(frame[: data.draw(st.integers(0, len(frame) - 1))])


def test_a_pickle_is_garbage() -> None:
    with pytest.raises(BridgeError):
        protocol.decode_to_engine(pickle.dumps(HELLO.run))


def test_a_welcome_is_nothing_that_a_rank_says() -> None:
    welcome = Welcome(protocol=1, software="", run="r", session=1, at=0, place=0, heartbeat_s=5.0)
    with pytest.raises(BridgeError):
        protocol.decode_to_engine(protocol.encode(welcome))
