"""create_app: the routes, the one error handler, and what wraps every request.

The app neither starts nor closes the manager (server/launch.py does), so that it can answer
/health while a model loads.
"""

import hmac
import re
import time
import uuid
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import log
from ..engine.errors import EverstepError
from ..engine.manager.manager import RolloutManager
from ..engine.tokenizer import Tokenizer
from .batches.batch_queue import BatchQueue
from .batches.batches import BatchesFace
from .config import ADMIN, PROTECTED, HttpConfig, ServeConfig
from .http import error_body, error_response, json_response
from .openai.openai import OpenAIFace
from .operations import Operations
from .origins import Origins
from .rollouts.budgets import BudgetsFace
from .rollouts.many import ManyFace
from .rollouts.rollouts import RolloutsFace
from .service import Service
from .stream import ClientGone
from .weights.weights import WeightsFace

CLIENT_CLOSED_REQUEST = 499
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    manager: RolloutManager,
    tokenizer: Tokenizer | None,
    config: ServeConfig,
    batches: BatchQueue | None = None,
) -> Starlette:
    """tokenizer None: token ids in and out only. batches None: /v1/batches refuses.

    Raises ConfigError (`ServeConfig.check`).
    """
    config.check()
    service = Service(manager, tokenizer, config, created=int(time.time()))
    return Starlette(
        routes=[
            *OpenAIFace(service).routes(),
            *BatchesFace(batches, max_body_bytes=config.http.max_body_bytes).routes(),
            *BudgetsFace(service).routes(),
            *ManyFace(service).routes(),
            *RolloutsFace(service).routes(),
            *WeightsFace(service).routes(),
            *Operations(service).routes(),
        ],
        middleware=[
            Middleware(RequestId),
            Middleware(Origins, config=config.http),
            Middleware(ApiKey, key=config.http.api_key),
            Middleware(AdminKey, config=config.http),
        ],
        exception_handlers={
            EverstepError: _on_error,
            HTTPException: _on_http_error,
            ClientGone: _on_client_gone,
            Exception: _on_bug,
        },
    )


class RequestId:
    """`x-request-id`: the client's own where it is printable, else a new one; on every reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKey:
    """`Authorization: Bearer KEY` on /v1 and /rollouts, compared in constant time. No key set: open."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._key = key.encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        body = error_body(
            "a valid API key is required: send the header 'Authorization: Bearer KEY'",
            status=401,
            code="invalid_api_key",
        )
        response = json_response(body, status=401, headers={"www-authenticate": "Bearer"})
        await response(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._key is None or scope["type"] != "http":
            return True
        if not (scope["path"] + "/").startswith(PROTECTED):
            return True
        return _has_key(scope, self._key)


class AdminKey:
    """As `ApiKey`, for the calls that change what is served. No key set: for this machine only,
    which a server that listens to others cannot tell, so it refuses."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._app = app
        self._key = config.admin_key.encode() if config.admin_key is not None else None
        self._is_loopback = config.is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, reason = self._refusal(scope)
        if not status:
            await self._app(scope, receive, send)
            return
        body = error_body(reason, status=status, code="invalid_admin_key")
        headers = {"www-authenticate": "Bearer"} if status == 401 else None
        await json_response(body, status=status, headers=headers)(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        if scope["type"] != "http" or not (scope["path"] + "/").startswith(ADMIN):
            return 0, ""
        if self._key is None:
            if self._is_loopback:
                return 0, ""
            return 403, "admin calls need a key: start the server with --admin-key"
        if _has_key(scope, self._key):
            return 0, ""
        return 401, (
            "a valid admin key is required: send the header 'Authorization: Bearer KEY' with that "
            "of --admin-key"
        )


def _has_key(scope: Scope, key: bytes) -> bool:
    scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    is_equal = hmac.compare_digest(token.strip().encode("utf-8", "replace"), key)
    return scheme.lower() == "bearer" and is_equal


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, EverstepError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and wrong methods, in the same shape as everything else."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    reason = HTTPStatus(status).phrase.lower()
    body = error_body(
        f"{request.method} {request.url.path[:200]}: {reason}",
        status=status,
        code=_CODES.get(status),
    )
    return json_response(body, status=status, headers=error.headers)


async def _on_client_gone(_: Request, __: Exception) -> Response:
    """Nobody reads it; servers log this number."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_bug(request: Request, error: Exception) -> Response:
    """Our own fault: logged here, and raised again by Starlette for the server's log."""
    log.event("request.failed", level="error", path=request.url.path, error=repr(error))
    body = error_body(
        "internal error; the server's log says more", status=500, code="internal_error"
    )
    return json_response(body, status=500)
