"""The /rollouts/budget face: token budgets of pools (docs/howto/rollouts.md).

A budget ends when its pool has grown by its tokens, or when it is closed. A reader that leaves ends
nothing.
"""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..decoding import decode_own, fields_of
from ..http import read_body
from ..idempotency import request_key
from ..media import answer, answer_media, body_media
from ..service import Service
from ..stream import unless_disconnected
from .requests import MAX_WAIT_S, Parameters
from .wire import BudgetList, BudgetRequest, Empty


class BudgetsFace:
    """The endpoints over one service. Its routes come before those of /rollouts/{id}."""

    def __init__(self, service: Service) -> None:
        self._manager = service.manager
        self._max_body_bytes = service.config.http.max_body_bytes

    def routes(self) -> list[Route]:
        return [
            Route("/rollouts/budget", self.open, methods=["POST"]),
            Route("/rollouts/budget", self.list, methods=["GET"]),
            Route("/rollouts/budget/{id}", self.get, methods=["GET"]),
            Route("/rollouts/budget/{id}/close", self.close, methods=["POST"]),
        ]

    async def open(self, http: Request) -> Response:
        answer_media(http)
        media = body_media(http)
        body = await read_body(http, max_bytes=self._max_body_bytes)
        fields = fields_of(body, "msgpack" if media == "msgpack" else "json")
        request = decode_own(fields, BudgetRequest)
        key = request_key(http, "/rollouts/budget", fields)
        budget = await self._manager.budgets.open(
            request.pool, request.tokens, key, places=request.places
        )
        return answer(http, budget, status=202)

    async def list(self, http: Request) -> Response:
        answer_media(http)
        pool = Parameters(http, "pool").text("pool")
        return answer(http, BudgetList(data=self._manager.budgets.of(pool)))

    async def get(self, http: Request) -> Response:
        answer_media(http)
        wait_s = Parameters(http, "wait").seconds("wait")
        budget_id = http.path_params["id"]
        if wait_s is None:
            return answer(http, self._manager.budgets.get(budget_id))
        waiting = self._manager.budgets.wait(budget_id, min(wait_s, MAX_WAIT_S))
        return answer(http, await unless_disconnected(http, waiting))

    async def close(self, http: Request) -> Response:
        answer_media(http)
        media = body_media(http)
        body = await read_body(http, max_bytes=self._max_body_bytes)
        if body:
            decode_own(fields_of(body, "msgpack" if media == "msgpack" else "json"), Empty)
        return answer(http, await self._manager.budgets.close(http.path_params["id"]))
