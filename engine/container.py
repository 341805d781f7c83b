"""Bytes that know when they were cut, altered or written by a newer version.

Magic, format (uint32, little-endian), body, blake2b-16 of all before it. Sealed trajectories and
capsules are such.
"""

import hashlib

_DIGEST_SIZE = 16
_FORMAT_SIZE = 4


class ContainerFault(Exception):
    """What was read is no whole container of this format. field: `file` or `format`."""

    def __init__(self, field: str, words: str) -> None:
        super().__init__(words)
        self.field = field


def wrap(magic: bytes, format: int, body: bytes) -> bytes:
    """The body in its container."""
    said = magic + format.to_bytes(_FORMAT_SIZE, "little") + body
    return said + _digest(said)


def unwrap(data: bytes, magic: bytes, format: int) -> memoryview:
    """The body of data that begin with this magic; raises ContainerFault."""
    head = len(magic) + _FORMAT_SIZE
    if len(data) < head + _DIGEST_SIZE:
        raise ContainerFault("file", f"cut after {len(data)} bytes")
    found = int.from_bytes(data[len(magic) : head], "little")
    if found != format:
        raise ContainerFault("format", f"{found}, this version of everstep reads {format}")
    said = memoryview(data)[:-_DIGEST_SIZE]
    if _digest(said) != data[-_DIGEST_SIZE:]:
        raise ContainerFault("file", "cut or altered: its checksum does not fit")
    return said[head:]


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_SIZE).digest()
