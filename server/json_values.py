"""`metadata` of a durable rollout: what goes into the journal must come back as it was."""

import math
from typing import Any

import msgspec

from ..engine.errors import InvalidRequest

MAX_METADATA_BYTES = 2**20
MAX_METADATA_DEPTH = 64


def check_metadata(value: Any) -> None:
    """Raise InvalidRequest unless it is JSON of a bearable size, which can be given back as it is."""
    left = [(value, 0)]
    while left:
        item, depth = left.pop()
        if depth > MAX_METADATA_DEPTH:
            raise _bad_metadata(f"at most {MAX_METADATA_DEPTH} levels deep")
        if isinstance(item, dict):
            if not all(isinstance(key, str) for key in item):
                raise _bad_metadata("an object's keys are strings")
            left += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list):
            left += [(inner, depth + 1) for inner in item]
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise _bad_metadata(f"finite numbers only, got {item}")
        elif isinstance(item, int):
            if not -(2**63) <= item < 2**64:
                raise _bad_metadata("integers of at most 64 bits")
        elif not isinstance(item, str | None):
            raise _bad_metadata(f"JSON values only, got {type(item).__name__}")
    size = len(msgspec.json.encode(value))
    if size > MAX_METADATA_BYTES:
        raise _bad_metadata(f"at most {MAX_METADATA_BYTES} bytes as JSON, got {size}")


def _bad_metadata(accepted: str) -> InvalidRequest:
    return InvalidRequest(f"metadata: {accepted}", field="metadata")
