"""Idempotency-Key: a request that is sent again is the same request.

A key belongs to the holder of an API key and to a route. What the first request with it said is
kept as a digest, over the content and not the spelling: JSON or msgpack, any order of fields.
"""

import hashlib
import re
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request

from ..engine.errors import InvalidRequest
from ..engine.journal.ops import RequestKey

HEADER = "idempotency-key"
MAX_KEY_CHARS = 255
_KEY = re.compile(rf"[\x21-\x7e]{{1,{MAX_KEY_CHARS}}}")
# the same answer, whole or streamed: a client may come back for it either way
_MANNER = frozenset({"stream", "stream_options"})
_canonical = msgspec.json.Encoder(order="deterministic").encode


def request_key(http: Request, route: str, content: Mapping[str, Any] | bytes) -> RequestKey | None:
    """The key of a request, None where it has none.

    route    as the key's scope; the path itself counts as content
    content  the fields of the body, or its bytes where it has no fields
    Raises InvalidRequest for a key that is too long or not printable.
    """
    given = http.headers.getlist(HEADER)
    if not given:
        return None
    if len(given) > 1:
        raise _no_key("Idempotency-Key")
    return key_of(http, given[0], route, content, path=http.url.path, field="Idempotency-Key")


def key_of(
    http: Request,
    key: str,
    route: str,
    content: Mapping[str, Any] | bytes,
    *,
    path: str,
    field: str,
) -> RequestKey:
    """As `request_key`, of a key that came otherwise.

    path   of the request that it stands for
    field  where the key stood
    """
    if not _KEY.fullmatch(key):
        raise _no_key(field)
    return RequestKey(
        holder=holder(http),
        route=route,
        key=key,
        body_digest=_digest(path, content),
        created_s=time.time(),
    )


def _no_key(field: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field} must be one, of 1 to {MAX_KEY_CHARS} printable ASCII characters without spaces",
        field=field,
    )


def holder(http: Request) -> str:
    """Whoever sent it, as a hash of the bearer token; "" without one."""
    _, _, token = http.headers.get("authorization", "").partition(" ")
    token = token.strip()
    return hashlib.blake2b(token.encode(), digest_size=16).hexdigest() if token else ""


def _digest(path: str, content: Mapping[str, Any] | bytes) -> str:
    digest = hashlib.blake2b(path.encode() + b"\0", digest_size=16)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        try:
            digest.update(_canonical({k: v for k, v in content.items() if k not in _MANNER}))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"the body holds what JSON cannot say: {error}") from None
    return digest.hexdigest()
