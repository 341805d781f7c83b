"""Bodies in, errors out: what every HTTP face of ours shares."""

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ..engine.errors import (
    EngineUnavailable,
    EverstepError,
    InvalidRequest,
    JournalFull,
    Overloaded,
    WeightsRefused,
)
from .openai.wire import ErrorBody, ErrorResponse
from .stream import ClientGone, RolloutFailed

encode_json = msgspec.json.Encoder().encode

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable"}
UNAVAILABLE_RETRY_S = 1.0


class BodyTooLarge(EverstepError):
    """The body exceeds http.max_body_bytes."""

    code = "request_too_large"
    status = 413


class UnsupportedMedia(EverstepError):
    """The body has a Content-Type, or a Content-Encoding, that is not read here."""

    code = "unsupported_media_type"
    status = 415


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body; raises BodyTooLarge without reading on, UnsupportedMedia for a packed one."""
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        raise UnsupportedMedia(
            f"Content-Encoding {packed[:80]!r} is not read here; send the body as it is"
        )
    declared = request.headers.get("content-length", "0")
    too_large = BodyTooLarge(
        f"the body exceeds {max_bytes} bytes; raise --http.max-body-bytes, or send less at once"
    )
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    parts = bytearray()
    try:
        async for part in request.stream():
            parts += part
            if len(parts) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(parts)


def json_response(
    body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        encode_json(body),
        status_code=status,
        headers=dict(headers or {}),
        media_type="application/json",
    )


def error_body(
    message: str, *, status: int, code: str | None, param: str | None = None
) -> ErrorResponse:
    """OpenAI's nested form."""
    default = "invalid_request_error" if status < 500 else "server_error"
    return ErrorResponse(ErrorBody(message, _TYPES.get(status, default), param, code))


def error_of(error: EverstepError) -> ErrorResponse:
    param = error.field if isinstance(error, InvalidRequest) else None
    if isinstance(error, WeightsRefused):
        param = error.tensor
    return error_body(str(error), status=error.status, code=error.code, param=param)


def error_response(error: EverstepError) -> Response:
    """With the headers that tell clients when, or whether, to try again."""
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded | EngineUnavailable | JournalFull):
        wait_s = error.retry_after_s if isinstance(error, Overloaded) else UNAVAILABLE_RETRY_S
        headers["retry-after"] = str(math.ceil(wait_s))
        headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
    if isinstance(error, RolloutFailed):
        # the same seed would only fail again
        headers["x-should-retry"] = "false"
    return json_response(error_of(error), status=error.status, headers=headers)


def ignored_fields_header(names: list[str]) -> dict[str, str]:
    """`x-everstep-ignored-fields`: names percent-encoded, since a client chose them."""
    if not names:
        return {}
    text = ",".join(quote(name, safe="") for name in names[:64])
    return {"x-everstep-ignored-fields": text[:2048]}
