"""What a receiver makes of offers and pieces that are not what they should be."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from everstep.engine.checkpoint.manifest import Manifest, TensorRecord, combine_digests
from everstep.engine.checkpoint.safetensors_header import DTYPE_NAMES as NAMES
from everstep.engine.checkpoint.safetensors_writer import Part, layout
from everstep.engine.errors import CheckpointError, WeightsRefused
from everstep.trainer_bridge.weights.arrival import Arrival, Workers
from everstep.trainer_bridge.weights.checksum import piece_crc
from everstep.trainer_bridge.weights.pages import Pages
from everstep.trainer_bridge.weights.protocol import Offer, Piece

from .memory import memory_folder

PARTS = [
    Part("a", torch.float32, (4,)),
    Part("b", torch.bfloat16, (0, 3)),
    Part("c", torch.bfloat16, (3,)),
]
HEAD, _ = layout(PARTS)
SIZE = len(HEAD) + 16 + 6
TENSORS = {"a": bytes(range(16)), "b": b"", "c": bytes(range(16, 22))}


def digest_of(name: str, data: bytes) -> str:
    """As docs/reference/bridge.md says it."""
    dtype, shape = {"a": ("F32", "4"), "b": ("BF16", "0,3"), "c": ("BF16", "3")}[name]
    head = b"\0".join(part.encode() for part in (name, dtype, shape, ""))
    return hashlib.sha256(head + data).hexdigest()


@pytest.fixture
def workers() -> Iterator[Workers]:
    found = Workers()
    yield found
    found.close()


def arrival_of(root: Path, workers: Workers, **changes: Any) -> Arrival:
    offer = Offer(version=1, attempt=1, num_bytes=SIZE, head=HEAD, files={}, keep=1)
    return Arrival(Pages(root), msgspec.structs.replace(offer, **changes), 2, workers, lambda: None)


def take(
    arrival: Arrival, rank: int, start: int, size: int, spans: list[int] | None = None
) -> None:
    data = memoryview(bytes(range(start, start + size)))
    where = [len(HEAD) + start, size] if spans is None else spans
    piece = Piece(1, 1, arrival.taken[rank], where, piece_crc(where, data))
    arrival.take(rank, piece, data)
    wait([write.done for write in arrival._writes])
    arrival.settle()


def test_bytes_in_any_order_from_two_ranks(tmp_path: Path, workers: Workers) -> None:
    arrival = arrival_of(tmp_path, workers, files={"config.json": b"{}"})
    take(arrival, 1, 10, 12)
    assert arrival.digests() is None
    assert arrival.doing.startswith("has ")
    take(arrival, 0, 0, 10)
    digests = None
    while digests is None:
        digests = arrival.digests()
    assert digests == {name: digest_of(name, data) for name, data in TENSORS.items()}
    whole = HEAD + bytes(range(22))
    assert (arrival.folder.partial / "model.safetensors").read_bytes() == whole
    assert (arrival.folder.partial / "config.json").read_bytes() == b"{}"
    with pytest.raises(CheckpointError, match=r"manifest.json of version 1: "):
        arrival.publish(b"{")
    arrival.discard()
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_there_are_hashed_when_there_is_time(
    tmp_path: Path, workers: Workers
) -> None:
    arrival = arrival_of(tmp_path, workers)
    take(arrival, 0, 0, 18)
    assert arrival.has_whole
    assert not arrival._digests
    arrival.hash()
    assert not arrival.has_whole
    found = {name: digest.result() for name, digest in arrival._digests.items()}
    assert found == {name: digest_of(name, TENSORS[name]) for name in ("a", "b")}
    assert arrival.digests() is None
    arrival.discard()


def test_bytes_that_come_twice_are_named(tmp_path: Path, workers: Workers) -> None:
    arrival = arrival_of(tmp_path, workers)
    take(arrival, 0, 0, 10)
    with pytest.raises(WeightsRefused, match="bytes of a came twice, the last from rank 1"):
        take(arrival, 1, 8, 8)
    arrival.discard()


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([0, 4], "belongs outside of model.safetensors"),
        ([SIZE - 2, 4], "belongs outside of model.safetensors"),
        ([len(HEAD), 3], r"has 4 bytes for \[3\]"),
        ([len(HEAD)], "has 4 bytes for"),
        ([], "has 4 bytes for"),
    ],
)
def test_a_piece_that_belongs_nowhere(
    spans: list[int], words: str, tmp_path: Path, workers: Workers
) -> None:
    arrival = arrival_of(tmp_path, workers)
    with pytest.raises(CheckpointError, match=words):
        take(arrival, 0, 0, 4, spans)
    arrival.discard()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_bytes": SIZE + 1}, "would have"),
        ({"head": HEAD[:-1]}, "malformed"),
        ({"head": b""}, "malformed"),
        ({"files": {"../x": b""}}, "'../x' cannot be a file of a version"),
        ({"files": {"manifest.json": b""}}, "cannot be a file"),
        ({"files": {"model.safetensors": b""}}, "cannot be a file"),
        ({"files": {".hidden": b""}}, "cannot be a file"),
    ],
)
def test_an_offer_that_cannot_be_taken(
    changes: dict[str, Any], words: str, tmp_path: Path, workers: Workers
) -> None:
    with pytest.raises(CheckpointError, match=words):
        arrival_of(tmp_path / "root", workers, **changes)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "root").exists()


def test_a_version_arrives_over_an_older_one(workers: Workers) -> None:
    with memory_folder() as root:
        pages, numbers = Pages(root), []
        for version in (1, 2, 3):
            data = bytes(range(100 * version - 99, 100 * version - 77))
            offer = Offer(version=version, attempt=1, num_bytes=SIZE, head=HEAD, files={}, keep=1)
            arrival = Arrival(pages, offer, 1, workers, lambda: None)
            for number, (start, end) in enumerate([(10, 22), (0, 10)]):
                where, part = [len(HEAD) + start, end - start], memoryview(data[start:end])
                arrival.take(0, Piece(version, 1, number, where, piece_crc(where, part)), part)
            wait([write.done for write in arrival._writes])
            arrival.settle()
            digests = None
            while digests is None:
                digests = arrival.digests()
            tensors = {
                p.name: TensorRecord(NAMES[p.dtype], p.shape, digests[p.name]) for p in PARTS
            }
            manifest = Manifest(version=version, digest=combine_digests(digests), tensors=tensors)
            file = arrival.publish(msgspec.json.encode(manifest)) / "model.safetensors"
            assert file.read_bytes() == HEAD + data
            numbers.append(file.stat().st_ino)
        assert numbers[0] == numbers[2] != numbers[1]
        pages.close()
