"""The wire structs of /v1/files and /v1/batches, as OpenAI publishes them (PROTOCOLS.md 11.6).

Times are unix seconds. A batch's struct is also what is kept of it on the disk.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

Purpose = Literal["batch", "batch_output"]
Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "cancelling", "cancelled"
]
ENDED: frozenset[Status] = frozenset({"failed", "completed", "cancelled"})


class FileObject(Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"


class FileDeleted(Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchRequest(Struct, kw_only=True, frozen=True):
    """completion_window is taken and kept; nothing expires here."""

    input_file_id: Annotated[str, Meta(min_length=1)]
    endpoint: Endpoint
    completion_window: Literal["24h"] = "24h"
    metadata: dict[str, Any] | None = None


class BatchError(Struct, kw_only=True):
    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(Struct, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(Struct, kw_only=True):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, Any] | None = None


class Page(Struct, kw_only=True):
    """A list of either."""

    object: Literal["list"] = "list"
    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool
