"""One file that holds a rollout and what it takes to run it again elsewhere: a bug report.

It holds a sealed trajectory, in a container like its own (engine/container.py), without what could
identify anybody: no client, no metadata, and no text unless asked. What is read is not
trusted: the file is as large as its bytes, and every fault is an InvalidTrajectory of one line.
"""

import os
from pathlib import Path

import msgspec
from msgspec import Struct

from ..container import ContainerFault, unwrap, wrap
from ..errors import InvalidTrajectory
from ..rollout import FinishReason, Rollout
from ..trajectory import MAGIC as TRAJECTORY_MAGIC
from ..trajectory import pack, seal, unpack, unseal

MAGIC = b"EVCP"
FORMAT = 1
MAX_BYTES = 2**30


class Capsule(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A rollout and where it came from.

    trajectory   sealed (engine/trajectory.py); its segments say digests and numerics ids
    settings     engine.model.* of the engine, by path, but for the model's own path
    environment  name → value: versions, processor, kernel levels
    """

    trajectory: bytes
    settings: dict[str, str] = {}
    environment: dict[str, str] = {}

    def rollout(self) -> Rollout:
        """Raises InvalidTrajectory."""
        return unpack(unseal(self.trajectory))


def strip(rollout: Rollout, *, with_text: bool = False, with_metadata: bool = False) -> Rollout:
    """A copy that says nothing but tokens and numbers, unless asked.

    Stop strings are text; a core knows none, so that nothing that is replayed depends on them.
    """
    copy = msgspec.structs.replace(rollout, client="", pool="")
    if not with_metadata:
        copy.metadata = None
    if not with_text:
        copy.text, copy.text_offset = "", 0
        copy.sampling = msgspec.structs.replace(copy.sampling, stop=())
        reason = copy.finish_reason
        if reason is not None and (isinstance(reason.matched, str) or reason.detail):
            matched = reason.matched if isinstance(reason.matched, int) else None
            copy.finish_reason = FinishReason(reason.type, matched)
    return copy


def make(rollout: Rollout, *, settings: dict[str, str], environment: dict[str, str]) -> Capsule:
    """Raises InvalidTrajectory where a trajectory cannot say it."""
    return Capsule(trajectory=seal(pack(rollout)), settings=settings, environment=environment)


def write(capsule: Capsule, file: Path) -> int:
    """Write it whole or not at all; returns its size in bytes. Raises OSError."""
    data = wrap(MAGIC, FORMAT, msgspec.msgpack.encode(capsule))
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_bytes(data)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    return len(data)


def read(file: Path) -> Capsule:
    """A capsule, or an exported trajectory as one. Raises InvalidTrajectory, OSError."""
    with file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InvalidTrajectory(f"{file}: more than {MAX_BYTES} bytes", field="file")
    try:
        return parse(data)
    except InvalidTrajectory as error:
        raise InvalidTrajectory(f"{file}: {error}", field=error.field) from None


def parse(data: bytes) -> Capsule:
    """What `write` wrote; raises InvalidTrajectory: cut, altered, foreign, or newer."""
    if data.startswith(TRAJECTORY_MAGIC):
        unseal(data)
        return Capsule(trajectory=data)
    if not data.startswith(MAGIC):
        raise InvalidTrajectory(
            "neither a capsule (everstep capsule) nor an exported trajectory", field="file"
        )
    try:
        return msgspec.msgpack.decode(unwrap(data, MAGIC, FORMAT), type=Capsule)
    except ContainerFault as fault:
        what = "capsule format " if fault.field == "format" else ""
        raise InvalidTrajectory(f"{what}{fault}", field=fault.field) from None
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise InvalidTrajectory(f"capsule: {error}", field="file") from None
