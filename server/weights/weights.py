"""The /weights face: which version serves, and its changes. Behind the admin key (server/app.py).

A call answers when what it asks for is done; a caller that leaves changes nothing about that.
"""

from typing import TypeVar

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..decoding import decode_own, fields_of
from ..http import read_body
from ..media import answer, answer_media, body_media
from ..rollouts.wire import Empty
from ..service import Service
from ..stream import unless_disconnected
from .wire import FlipRequest, RollbackRequest, StageRequest, Updated, UpdateRequest, WeightsAnswer

RequestT = TypeVar("RequestT", bound=Struct)
_SHOWN = 100


class WeightsFace:
    """The endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self._manager = service.manager
        self._max_body_bytes = service.config.http.max_body_bytes

    def routes(self) -> list[Route]:
        return [
            Route("/weights", self.get, methods=["GET"]),
            Route("/weights/stage", self.stage, methods=["POST"]),
            Route("/weights/unstage", self.unstage, methods=["POST"]),
            Route("/weights/flip", self.flip, methods=["POST"]),
            Route("/weights/update", self.update, methods=["POST"]),
            Route("/weights/rollback", self.rollback, methods=["POST"]),
        ]

    async def get(self, http: Request) -> Response:
        return answer(http, self._known())

    async def stage(self, http: Request) -> Response:
        request = await self._request(http, StageRequest)
        staging = self._manager.versions.stage(
            request.path, request.priority, rollback=request.rollback
        )
        return answer(http, await unless_disconnected(http, staging))

    async def unstage(self, http: Request) -> Response:
        await self._request(http, Empty)
        await self._manager.versions.unstage()
        return answer(http, self._known())

    async def flip(self, http: Request) -> Response:
        request = await self._request(http, FlipRequest)
        flipping = self._manager.versions.flip(request.version, request.kv)
        flipped = await unless_disconnected(http, flipping)
        return answer(http, Updated(flipped=flipped, lineage=self._manager.version.lineage))

    async def update(self, http: Request) -> Response:
        request = await self._request(http, UpdateRequest)
        updating = self._manager.versions.update(request.path, request.kv, request.priority)
        staged, flipped = await unless_disconnected(http, updating)
        lineage = self._manager.version.lineage
        return answer(http, Updated(staged=staged, flipped=flipped, lineage=lineage))

    async def rollback(self, http: Request) -> Response:
        request = await self._request(http, RollbackRequest)
        rolling = self._manager.versions.roll_back(
            request.version, path=request.path, kv=request.kv, priority=request.priority
        )
        flipped = await unless_disconnected(http, rolling)
        return answer(http, Updated(flipped=flipped, lineage=self._manager.version.lineage))

    def _known(self) -> WeightsAnswer:
        versions = self._manager.versions
        return WeightsAnswer(
            current=self._manager.version,
            waiting_for=versions.waiting_for,
            staged=versions.staged,
            staging=versions.staging,
            history=versions.history[-_SHOWN:],
            last_staged=versions.last_staged,
            last_flip=versions.last_flip,
        )

    async def _request(self, http: Request, kind: type[RequestT]) -> RequestT:
        answer_media(http)
        media = body_media(http)
        body = await read_body(http, max_bytes=self._max_body_bytes)
        fields = fields_of(body or b"{}", "msgpack" if body and media == "msgpack" else "json")
        return decode_own(fields, kind)
