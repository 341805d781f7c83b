"""/v1/files and /v1/batches: OpenAI's batch API over the journal (PROTOCOLS.md 11.6)."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, get_args

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Message

from ...engine.errors import InvalidRequest, JournalError
from ..decoding import decode_request
from ..http import BodyTooLarge, ignored_fields_header, json_response, read_body
from ..idempotency import request_key
from ..rollouts.requests import Parameters
from ..stream import ClientGone
from .batch_queue import BatchQueue
from .wire import BatchRequest, FileDeleted, Page, Purpose

# OpenAI's limit
MAX_FILE_BYTES = 200 * 2**20
# what a form adds to its file
_FORM_BYTES = 64 * 2**10
_PAGE = 20
_MAX_PAGE = 10_000
_PIECE = 1 << 20


class BatchesFace:
    """The endpoints over one queue; None: the server keeps no journal, and says so."""

    def __init__(self, queue: BatchQueue | None, *, max_body_bytes: int) -> None:
        self._maybe_queue = queue
        self._max_body_bytes = max_body_bytes

    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/files", self.files, methods=["GET"]),
            Route("/v1/files/{id}", self.file, methods=["GET"]),
            Route("/v1/files/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self.content, methods=["GET"]),
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches", self.batches, methods=["GET"]),
            Route("/v1/batches/{id}", self.batch, methods=["GET"]),
            Route("/v1/batches/{id}/cancel", self.cancel, methods=["POST"]),
        ]

    @property
    def _queue(self) -> BatchQueue:
        if self._maybe_queue is None:
            raise JournalError(
                "this server keeps no journal, so it takes no files and batches; "
                "start it with --journal PATH"
            )
        return self._maybe_queue

    # --- files

    async def upload(self, http: Request) -> Response:
        queue = self._queue
        try:
            async with _counted(http).form(max_files=1, max_fields=8) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise InvalidRequest("file: send a file as multipart/form-data", field="file")
                if purpose != "batch":
                    raise InvalidRequest(
                        f"purpose: only 'batch' is taken, got {purpose!r}", field="purpose"
                    )
                found = await asyncio.to_thread(
                    queue.files.add, _pieces(file.file), file.filename or "batch.jsonl", "batch"
                )
        except ClientDisconnect:
            raise ClientGone from None
        except HTTPException as error:
            raise InvalidRequest(f"the form cannot be read: {error.detail}") from None
        return json_response(found)

    async def files(self, http: Request) -> Response:
        parameters = Parameters(http, "purpose", "after", "limit", "order")
        purpose = parameters.text("purpose")
        if purpose is not None and purpose not in get_args(Purpose):
            raise InvalidRequest(
                f"purpose must be one of {', '.join(get_args(Purpose))}, got {purpose!r}",
                field="purpose",
            )
        order = parameters.text("order") or "desc"
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"order must be asc or desc, got {order!r}", field="order")
        found = [f for f in self._queue.files.list() if purpose in (None, f.purpose)]
        if order == "desc":
            found.reverse()
        return json_response(_page(found, parameters))

    async def file(self, http: Request) -> Response:
        return json_response(self._queue.files.get(http.path_params["id"]))

    async def delete(self, http: Request) -> Response:
        file_id = http.path_params["id"]
        self._queue.remove_file(file_id)
        return json_response(FileDeleted(id=file_id))

    async def content(self, http: Request) -> Response:
        path = self._queue.files.path(http.path_params["id"])
        return FileResponse(path, media_type="application/jsonl")

    # --- batches

    async def create(self, http: Request) -> Response:
        queue = self._queue
        body = await read_body(http, max_bytes=self._max_body_bytes)
        decoded = decode_request(body, BatchRequest)
        key = request_key(http, "/v1/batches", decoded.raw)
        headers = ignored_fields_header(decoded.ignored)
        return json_response(queue.create(decoded.request, key), headers=headers)

    async def batches(self, http: Request) -> Response:
        return json_response(_page(self._queue.list(), Parameters(http, "after", "limit")))

    async def batch(self, http: Request) -> Response:
        return json_response(self._queue.get(http.path_params["id"]))

    async def cancel(self, http: Request) -> Response:
        return json_response(self._queue.cancel(http.path_params["id"]))


def _page(items: Sequence[Any], parameters: Parameters) -> Page:
    """What follows `after`, at most `limit`."""
    limit = parameters.integer("limit", low=1, high=_MAX_PAGE) or _PAGE
    after = parameters.text("after")
    start = 0
    if after is not None:
        ids = [item.id for item in items]
        if after not in ids:
            raise InvalidRequest(f"after: nothing here has the id {after!r}", field="after")
        start = ids.index(after) + 1
    data = list(items[start : start + limit])
    return Page(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=start + limit < len(items),
    )


def _counted(http: Request) -> Request:
    """The request, which ends with BodyTooLarge beyond the limit of a file."""
    too_large = BodyTooLarge(f"a file may have {MAX_FILE_BYTES} bytes; split it")
    limit = MAX_FILE_BYTES + _FORM_BYTES
    declared = http.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await http.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise too_large
        return message

    return Request(http.scope, receive)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece
