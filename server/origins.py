"""Which web pages may call: a browser names its page in `Origin`, and obeys what is answered.

A page of anybody's can make a browser send a POST to this machine, though not read the answer. A
key stops that. Where no key guards a call, one that comes from a page that is not allowed is
refused, so that no page may cancel rollouts or change weights here.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import HttpConfig
from .http import error_body, json_response

ANY = "*"
_METHODS = "GET, POST, DELETE, HEAD"
_EXPOSED = (
    "x-request-id, x-everstep-versions, x-everstep-ignored-fields, idempotent-replayed, "
    "retry-after, retry-after-ms"
)
_A_DAY_S = "86400"


class Origins:
    """CORS for the pages of `http.allowed_origins`, and a refusal for others."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        origin = headers.get("origin")
        if origin is None:
            await self._app(scope, receive, send)
            return
        allowed = self._config.allowed_origins
        if origin in allowed or ANY in allowed:
            asks_first = "access-control-request-method" in headers
            if scope["method"] == "OPTIONS" and asks_first:
                wanted = headers.get("access-control-request-headers", "")
                response = json_response({}, headers=_permission(wanted))
                await response(scope, receive, _with_origin(send, origin))
            else:
                await self._app(scope, receive, _with_origin(send, origin))
        elif self._config.is_guarded(scope["path"]):
            # the browser keeps the answer from the page
            await self._app(scope, receive, send)
        else:
            body = error_body(
                f"calls from the page {origin[:200]!r} are not allowed: start the server with "
                "--allowed-origins ORIGIN, or with a key",
                status=403,
                code="origin_not_allowed",
            )
            await json_response(body, status=403)(scope, receive, send)


def _permission(wanted: str) -> dict[str, str]:
    """What a browser that asks first may do. Keys come in a header, so any header may."""
    return {
        "access-control-allow-methods": _METHODS,
        "access-control-allow-headers": wanted or "*",
        "access-control-max-age": _A_DAY_S,
    }


def _with_origin(send: Send, origin: str) -> Send:
    async def send_with_origin(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = _EXPOSED
            headers.add_vary_header("Origin")
        await send(message)

    return send_with_origin
