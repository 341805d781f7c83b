"""JSON and msgpack by Content-Type and Accept, for the protocol that is ours."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..engine.errors import EverstepError
from .http import UnsupportedMedia, encode_json

Media = Literal["json", "msgpack", "sealed"]

TYPES: dict[Media, str] = {
    "json": "application/json",
    "msgpack": "application/msgpack",
    "sealed": "application/octet-stream",
}
_NAMES: dict[str, Media] = {
    "application/json": "json",
    "application/msgpack": "msgpack",
    "application/x-msgpack": "msgpack",
    "application/vnd.msgpack": "msgpack",
    "application/octet-stream": "sealed",
}
# what curl -d says of everything; sealed bytes tell themselves by how they begin
_UNSAID = {"", "application/x-www-form-urlencoded"}
encode_msgpack = msgspec.msgpack.Encoder().encode


class NotAcceptable(EverstepError):
    """No type that Accept allows can be given."""

    code = "not_acceptable"
    status = 406


def body_media(http: Request, accepted: Sequence[Media] = ("json", "msgpack")) -> Media:
    """How the body is written; raises UnsupportedMedia. The first of `accepted` is the default."""
    said = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said in _UNSAID:
        return accepted[0]
    media = _NAMES.get(said)
    if media is None or media not in accepted:
        names = ", ".join(TYPES[one] for one in accepted)
        raise UnsupportedMedia(f"Content-Type {said[:80]!r} is not read here; accepted: {names}")
    return media


def answer_media(http: Request, offered: Sequence[Media] = ("json", "msgpack")) -> Media:
    """What the client would rather have; the first of `offered` where it does not mind.

    Raises NotAcceptable.
    """
    ranges = [one for line in http.headers.getlist("accept") for one in line.split(",")]
    wanted = [_range(text) for text in ranges if text.strip()]
    if not wanted:
        return offered[0]
    best = max(offered, key=lambda media: _quality(media, wanted))
    if _quality(best, wanted) <= 0:
        names = ", ".join(TYPES[one] for one in offered)
        raise NotAcceptable(f"Accept allows none of what is given here: {names}")
    return best


def answer(http: Request, body: Any, *, status: int = 200) -> Response:
    """A struct as what the client wants of it."""
    media = answer_media(http)
    data = encode_json(body) if media == "json" else encode_msgpack(body)
    return Response(data, status_code=status, media_type=TYPES[media])


def _range(text: str) -> tuple[str, float]:
    """(type, quality) of one part of an Accept header; what cannot be read counts as unwanted."""
    name, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = 1.0
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key == "q":
            try:
                quality = min(1.0, max(0.0, float(value)))
            except ValueError:
                quality = 0.0
    return name, quality


def _quality(media: Media, wanted: Sequence[tuple[str, float]]) -> float:
    """By the most specific range that matches."""
    names = [name for name, kind in _NAMES.items() if kind == media]
    for group in (names, ["application/*"], ["*/*"]):
        found = [quality for name, quality in wanted if name in group]
        if found:
            return max(found)
    return 0.0
