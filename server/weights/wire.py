"""What /weights takes and answers (docs/howto/weights.md)."""

from typing import Annotated

from msgspec import Meta, Struct

from ...engine.checkpoint.manifest import Version
from ...engine.messages import Flipped, KVPolicy, Priority, Staged, Staging

Path = Annotated[str, Meta(min_length=1)]
Number = Annotated[int, Meta(ge=0, le=2**53)]


class StageRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /weights/stage: load and check a version beside the one that serves."""

    path: Path
    """A folder on the server's machine: a checkpoint with its manifest.json."""
    priority: Priority = "background"
    """Beside generation: a stated share of its time, or as much as may be between two steps."""
    rollback: Number | None = None
    """Its number, where the flip is to be a rollback to it: it need not be newer then."""


class FlipRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /weights/flip: serve the staged version from the next step on."""

    version: Number
    kv: KVPolicy = "keep"
    """What becomes of the KV of rollouts that are under way."""


class UpdateRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /weights/update: stage, then flip."""

    path: Path
    kv: KVPolicy = "keep"
    priority: Priority = "background"


class RollbackRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /weights/rollback: serve a version again, by its name; a new lineage begins."""

    version: Number
    path: Path | None = None
    """Where it never served here, or its files are elsewhere now."""
    kv: KVPolicy = "keep"
    priority: Priority = "background"


class WeightsAnswer(Struct, kw_only=True):
    """GET /weights."""

    current: Version
    """That which serves, or, with `waiting_for`, is to serve."""
    waiting_for: str | None
    """Why all rollouts stand still, if they do: these weights are missing."""
    staged: Version | None
    staging: Staging | None
    """How far the version is that is being staged."""
    history: list[Version]
    """The last that served, in order."""
    last_staged: Staged | None = None
    last_flip: Flipped | None = None
    """What the last ones took, since the server was started."""


class Updated(Struct, kw_only=True):
    """What a change came to. staged: of `update`; lineage: to be named by what follows."""

    flipped: Flipped
    lineage: str
    staged: Staged | None = None
