"""Trajectories: nothing is lost on the way out and back, and nothing wrong gets in."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.engine.errors import InvalidTrajectory
from everstep.engine.rollout import FinishReason, RolloutState, Segment
from everstep.engine.trajectory import FORMAT, Ragged, decode, encode, pack, seal, unpack, unseal
from tests.engine.journal.drawn import end, make_grown, make_rollout, rollouts


def grown_rollout():
    from everstep.engine.journal.ops import grow
    from tests.engine.journal.drawn import ORIGINS

    rollout = make_rollout("ro-1", metadata={"a": [1, 2.5, None, "x"]})
    grow(rollout, ORIGINS[0], make_grown("ro-1", 0, 3), 5.0)
    grow(rollout, ORIGINS[1], make_grown("ro-1", 3, 2), 6.0)
    return rollout


@given(rollouts())
@settings(max_examples=200, deadline=None)
def test_a_rollout_comes_back_whole(rollout):
    assert unpack(unseal(seal(pack(rollout)))) == rollout
    assert unpack(msgspec.json.decode(msgspec.json.encode(pack(rollout)), type=type(pack(rollout))))


def test_columns_are_copied():
    rollout = grown_rollout()
    packed, whole = pack(rollout), unpack(pack(rollout))
    rollout.output_ids.append(9)
    rollout.segments.clear()
    assert unpack(packed) == whole


def test_columns_have_their_documented_bytes():
    rollout = grown_rollout()
    packed = pack(rollout)
    assert packed.prompt_ids == b"\1\0\0\0\2\0\0\0\3\0\0\0"
    assert len(packed.lp_sampled) == 4 * 5
    assert packed.flags == bytes(rollout.flags)
    assert packed.versions == [(1, 3), (2, 2)]


WRONG = [
    ("output_ids", {"output_ids": b"\0\0\0"}),
    ("output_ids", {"output_ids": b"\xff\xff\xff\xff" * 5}),
    ("prompt_ids", {"prompt_ids": b"\0\0\0\x80"}),
    ("lp_sampled", {"lp_sampled": b"\0" * 16}),
    ("lp_temp", {"lp_temp": b"\0\0\x80\x7f" * 5}),
    ("kept_mass", {"kept_mass": b"\0\0\xc0\x7f" * 5}),
    ("flags", {"flags": b"\1"}),
    ("versions", {"versions": [(1, 2**53)]}),
    ("versions", {"versions": [(1, 5)]}),
    ("lp_raw", {"lp_raw": b"\0" * 8}),
    ("kept_ids", {"kept_ids": Ragged(b"\xff\xff\xff\xff" * 5, b"")}),
    ("kept_ids", {"kept_ids": Ragged(b"\xff\xff\xff\x7f" * 5, b"")}),
    ("top", {"top": Ragged(b"\1\0\0\0" + b"\0" * 16, b"\0" * 4, b"")}),
    ("top", {"top": Ragged(b"\1\0\0\0" + b"\0" * 16, b"\0" * 4, b"\0\0\xc0\x7f")}),
    ("prompt_lp", {"prompt_lp": b"\0\0\0\0"}),
    ("prompt_lp", {"prompt_lp": b"\0\0\xc0\x7f" * 2}),
    ("prompt_top", {"prompt_top": Ragged(b"\0" * 40, b"", b"")}),
    ("text_offset", {"text_offset": 3}),
    ("finish_reason", {"finish_reason": FinishReason("stop")}),
    ("finish_reason", {"state": RolloutState.FAILED}),
    ("output_ids", {"max_tokens": 4}),
    ("segments", {"segments": []}),
    ("segments", {"segments": [Segment(1, 1, "aa", "n", "c")]}),
    ("segments", {"segments": [Segment(0, 1, "aa", "n", "c"), Segment(6, 2, "bb", "n", "c")]}),
    ("created_s", {"ended_s": float("inf")}),
    ("metadata", {"metadata": {1: 2}}),
    ("metadata", {"metadata": [b"bytes"]}),
]


@pytest.mark.parametrize(("field", "change"), WRONG)
def test_what_does_not_add_up_is_refused_by_field(field, change):
    packed = pack(grown_rollout())
    assert unpack(packed)
    for name, value in change.items():
        setattr(packed, name, value)
    with pytest.raises(InvalidTrajectory, match=f"^trajectory: {field}: ") as caught:
        unpack(packed)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("output_ids", {"output_ids": [2**31]}),
        ("prompt_ids", {"prompt_ids": ["1"]}),
        ("flags", {"flags": [256]}),
        ("metadata", {"metadata": {"n": 2**64}}),
        ("metadata", {"metadata": object()}),
    ],
)
def test_what_cannot_be_packed_is_refused_by_field(field, fields):
    with pytest.raises(InvalidTrajectory) as caught:
        pack(make_rollout("ro-1", **fields))
    assert caught.value.field == field


def test_a_newer_format_is_refused_with_both_numbers():
    data = bytearray(seal(pack(grown_rollout())))
    data[4:8] = (FORMAT + 1).to_bytes(4, "little")
    with pytest.raises(InvalidTrajectory, match=rf"{FORMAT + 1}.* reads {FORMAT}"):
        unseal(bytes(data))


def test_every_cut_and_every_flipped_bit_is_found():
    data = seal(pack(end(grown_rollout())))
    for length in range(len(data)):
        with pytest.raises(InvalidTrajectory):
            unseal(data[:length])
    for at in range(len(data)):
        for bit in (1, 16, 128):
            changed = bytearray(data)
            changed[at] ^= bit
            with pytest.raises(InvalidTrajectory):
                unseal(bytes(changed))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_noise_is_refused(data):
    for attempt in (data, b"EVST\1\0\0\0" + data):
        with pytest.raises(InvalidTrajectory):
            unseal(attempt)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_forged_bodies_are_refused_or_add_up(data):
    """Whoever forges the checksum too gets an InvalidTrajectory or a rollout that adds up."""
    body = bytearray(encode(pack(grown_rollout())))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    try:
        rollout = unpack(decode(bytes(body)))
    except InvalidTrajectory:
        return
    assert encode(pack(unpack(pack(rollout)))) == encode(pack(rollout))  # NaN in metadata


def test_nesting_without_end_is_refused():
    deep = msgspec.msgpack.encode({"metadata": None})
    deep = deep.replace(b"\xc0", b"\x91" * 100_000 + b"\xc0")
    with pytest.raises(InvalidTrajectory):
        decode(deep)
