"""A capsule holds what replays and nothing that identifies; whatever else a file is, it is refused."""

import hashlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine.errors import InvalidTrajectory
from everstep.engine.proofs import capsule as capsules
from everstep.engine.proofs.capsule import FORMAT, MAGIC, Capsule, parse, strip
from everstep.engine.rollout import FinishReason, Rollout, RolloutState, SamplingParams, Segment
from everstep.engine.trajectory import pack, seal


def make_rollout(**changes) -> Rollout:
    fields = {
        "id": "ro-1",
        "group_id": "grp-1",
        "prompt_ids": [1, 2, 3],
        "sampling": SamplingParams(max_tokens=3, stop=("secret stop",)),
        "seed": 7,
        "max_tokens": 3,
        "client": "secret client",
        "pool": "secret pool",
        "metadata": {"secret": "metadata"},
        "state": RolloutState.FINISHED,
        "finish_reason": FinishReason("stop", "secret stop"),
        "output_ids": [4, 5],
        "lp_sampled": [-1.0, -2.0],
        "lp_temp": [-1.0, -2.0],
        "kept_mass": [1.0, 1.0],
        "flags": [1, 1],
        "versions": [0, 0],
        "text": "secret text",
        "text_offset": 11,
        "segments": [Segment(0, 0, "digest", "cpu/torch/avx2/float32/plain", "core-1")],
        "created_s": 1.0,
        "ended_s": 2.0,
    }
    return Rollout(**(fields | changes))


def sealed(capsule: Capsule) -> bytes:
    body = MAGIC + FORMAT.to_bytes(4, "little") + msgspec.msgpack.encode(capsule)
    return body + hashlib.blake2b(body, digest_size=16).digest()


def test_a_written_capsule_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "bug.capsule"
    made = capsules.make(make_rollout(), settings={"dtype": "auto"}, environment={"torch": "2"})
    size = capsules.write(made, file)
    assert size == file.stat().st_size
    assert [f.name for f in tmp_path.iterdir()] == ["bug.capsule"]
    assert capsules.read(file) == made
    assert made.rollout() == make_rollout()


def test_an_exported_trajectory_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "export"
    file.write_bytes(seal(pack(make_rollout())))
    assert capsules.read(file).rollout() == make_rollout()


def test_nothing_that_identifies_is_in_it_unless_asked() -> None:
    made = capsules.make(strip(make_rollout()), settings={}, environment={})
    assert b"secret" not in sealed(made)
    rollout = made.rollout()
    assert (rollout.prompt_ids, rollout.output_ids, rollout.seed) == ([1, 2, 3], [4, 5], 7)
    assert rollout.finish_reason == FinishReason("stop")
    failed = make_rollout(
        state=RolloutState.FAILED, finish_reason=FinishReason("error", detail="x")
    )
    assert strip(failed).finish_reason == FinishReason("error")


@pytest.mark.parametrize("choice", ["with_text", "with_metadata"])
def test_text_and_metadata_are_there_when_asked(choice: str) -> None:
    rollout = strip(make_rollout(), **{choice: True})
    assert (rollout.text == "secret text") == (choice == "with_text")
    assert (rollout.sampling.stop == ("secret stop",)) == (choice == "with_text")
    assert (rollout.metadata is not None) == (choice == "with_metadata")
    assert rollout.client == rollout.pool == ""


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "neither a capsule"),
        (b"EVCP", "cut after 4 bytes"),
        (MAGIC + (9).to_bytes(4, "little") + bytes(40), "capsule format 9"),
        (MAGIC + FORMAT.to_bytes(4, "little") + bytes(40), "checksum"),
        (b"EVST" + bytes(60), "format"),
    ],
)
def test_a_file_of_another_kind_says_so(data: bytes, said: str) -> None:
    with pytest.raises(InvalidTrajectory, match=said):
        parse(data)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(capsules, "MAX_BYTES", 10)
    (tmp_path / "big").write_bytes(bytes(11))
    with pytest.raises(InvalidTrajectory, match="more than 10 bytes"):
        capsules.read(tmp_path / "big")


GOOD = sealed(capsules.make(make_rollout(), settings={"dtype": "auto"}, environment={"a": "b"}))


@given(at=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(at: int, bit: int) -> None:
    data = bytearray(GOOD)
    data[at] ^= 1 << bit
    with pytest.raises(InvalidTrajectory):
        parse(bytes(data))


@given(st.integers(0, len(GOOD) - 1))
def test_every_cut_is_found(length: int) -> None:
    with pytest.raises(InvalidTrajectory):
        parse(GOOD[:length])


def reseal(body: bytes) -> bytes:
    """As a forger does: the checksum fits whatever the body is."""
    body = MAGIC + FORMAT.to_bytes(4, "little") + body
    return body + hashlib.blake2b(body, digest_size=16).digest()


def read_whole(data: bytes) -> None:
    said = ""
    try:
        parse(data).rollout()
    except InvalidTrajectory as error:
        said = str(error)
    assert "\n" not in said


@given(st.binary(max_size=200))
def test_a_forged_body_is_refused_in_one_line(body: bytes) -> None:
    read_whole(reseal(body))


@given(at=st.integers(0, len(GOOD) - 25), byte=st.integers(0, 255))
def test_a_forged_byte_is_refused_in_one_line_or_harmless(at: int, byte: int) -> None:
    body = bytearray(GOOD[8:-16])
    body[at] = byte
    read_whole(reseal(bytes(body)))


@given(at=st.data())
def test_a_forged_trajectory_is_refused_in_one_line_or_harmless(at: st.DataObject) -> None:
    """The innermost layer forged, all checksums right."""
    body = bytearray(seal(pack(make_rollout()))[8:-16])
    for _ in range(at.draw(st.integers(1, 3))):
        body[at.draw(st.integers(0, len(body) - 1))] = at.draw(st.integers(0, 255))
    head = b"EVST" + (1).to_bytes(4, "little") + bytes(body)
    forged = head + hashlib.blake2b(head, digest_size=16).digest()
    read_whole(sealed(Capsule(trajectory=forged)))
