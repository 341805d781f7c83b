"""The /rollouts face: durable generations by id (DESIGN.md §5, docs/reference/rollouts-api.md).

A rollout is accepted once it is journaled, and only a cancel of its own ends it early: a
connection that breaks ends nothing, whatever it was waiting for.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ...engine.errors import InvalidRequest
from ...engine.manager.intake import Accepted
from ...engine.rollout import Rollout
from ...engine.trajectory import encode, pack, seal, unpack
from ..decoding import decode_own, fields_of
from ..http import encode_json, error_of, error_response, read_body
from ..idempotency import request_key
from ..media import TYPES, Media, answer, answer_media, body_media
from ..service import Service
from ..stream import EventStream, event, unless_disconnected
from .answers import answer_of, event_of, summary_of
from .requests import (
    MAX_WAIT_S,
    Parameters,
    as_integer,
    query_of,
    renamed,
    selected,
    submission_of,
    trajectory_of,
)
from .wire import Done, Empty, ForkRequest, RolloutList, SubmitRequest, Submitted

Control = Callable[..., Coroutine[Any, Any, list[str]]]
_MAX_TOKENS = 2**31 - 1
# a reader that is cut off comes back after so many ms; sent first, so the status is out at once
_RETRY = b"retry: 1000\n\n"


class RolloutsFace:
    """The endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._manager = service.manager
        manager = service.manager
        self._controls: dict[str, Control] = {
            "pause": manager.pause,
            "resume": manager.resume,
            "cancel": manager.cancel,
            "ack": manager.acknowledge,
        }

    def routes(self) -> list[Route]:
        one = "/rollouts/{id}"
        return [
            Route("/rollouts", self.submit, methods=["POST"]),
            Route("/rollouts", self.list, methods=["GET"]),
            Route("/rollouts/import", self.import_, methods=["POST"]),
            *(
                Route(f"/rollouts/{verb}", self._bulk(control), methods=["POST"])
                for verb, control in self._controls.items()
            ),
            Route(one, self.get, methods=["GET"]),
            Route(f"{one}/stream", self.stream, methods=["GET"]),
            Route(f"{one}/fork", self.fork, methods=["POST"]),
            Route(f"{one}/export", self.export, methods=["GET", "POST"]),
            *(
                Route(f"{one}/{verb}", self._single(control), methods=["POST"])
                for verb, control in self._controls.items()
            ),
        ]

    # --- what makes rollouts

    async def submit(self, http: Request) -> Response:
        answer_media(http)
        fields = await self._fields(http)
        request = decode_own(fields, SubmitRequest, inner=("sampling",))
        self._service.model_name(request.model)
        key = request_key(http, "/rollouts", fields)
        try:
            submission = await submission_of(self._service, request, fields)
            accepted = await self._manager.accept(submission, key)
        except InvalidRequest as error:
            raise renamed(error, request) from None
        return _submitted(http, accepted)

    async def fork(self, http: Request) -> Response:
        answer_media(http)
        fields = await self._fields(http)
        request = decode_own(fields, ForkRequest)
        key = request_key(http, "/rollouts/{id}/fork", fields)
        accepted = await self._manager.fork(
            http.path_params["id"],
            request.at,
            samples=request.samples,
            seed=request.seed,
            pool=request.pool,
            key=key,
        )
        return _submitted(http, accepted)

    async def import_(self, http: Request) -> Response:
        answer_media(http)
        allows_others = Parameters(http, "allow_other_weights").switch("allow_other_weights")
        media = body_media(http, ("json", "msgpack", "sealed"))
        body = await self._body(http)
        key = request_key(http, "/rollouts/import", body)
        trajectory = await trajectory_of(body, media)
        accepted = await self._manager.import_(
            trajectory, allow_other_weights=allows_others, key=key
        )
        return _submitted(http, accepted)

    # --- what reads them

    async def get(self, http: Request) -> Response:
        media = answer_media(http)
        parameters = Parameters(http, "wait", "after")
        wait_s = parameters.seconds("wait")
        after = parameters.integer("after", low=0, high=_MAX_TOKENS)
        if after is not None and wait_s is None:
            raise InvalidRequest(
                "after needs wait: how long to wait for more tokens", field="after"
            )
        rollout_id = http.path_params["id"]
        if wait_s is None:
            return self._rollout(await self._manager.find(rollout_id), media)
        wait_s = min(wait_s, MAX_WAIT_S)
        waiting = self._manager.wait(rollout_id, after=after, timeout_s=wait_s)
        return self._rollout(await unless_disconnected(http, waiting), media)

    def _rollout(self, rollout: Rollout, media: Media) -> Response:
        if media == "msgpack":
            data = encode(pack(rollout))
        else:
            data = encode_json(answer_of(rollout, self._manager))
        return Response(data, media_type=TYPES[media])

    async def stream(self, http: Request) -> ASGIApp:
        after = Parameters(http, "after").integer("after", low=0, high=_MAX_TOKENS) or 0
        # browsers come back to the same URL, with the id of the last event that they saw
        if (seen := http.headers.get("last-event-id")) is not None:
            after = as_integer("Last-Event-ID", seen, low=0, high=_MAX_TOKENS)
        rollout = await self._manager.find(http.path_params["id"])
        num_tokens = len(rollout.output_ids)
        if rollout.state.is_ended and after > num_tokens:
            raise InvalidRequest(
                f"after must be at most {num_tokens}, the tokens that it has, got {after}",
                field="after",
            )
        if http.method == "HEAD":
            # it has no end to wait for
            return Response(media_type="text/event-stream")
        return EventStream(
            self._events(rollout.id, after),
            headers={},
            heartbeat_s=self._service.config.http.heartbeat_s,
            on_end=lambda: None,
            on_error=lambda error: b"event: error\n" + event(encode_json(error_of(error))),
            refuse=error_response,
        )

    async def _events(self, rollout_id: str, after: int) -> AsyncGenerator[bytes]:
        yield _RETRY
        async for delta in self._manager.stream(rollout_id, after=after):
            news = event_of(
                delta.rollout, delta.start, delta.end, delta.text, is_last=delta.is_last
            )
            yield b"id: %d\n" % delta.end + event(encode_json(news))

    async def list(self, http: Request) -> Response:
        answer_media(http)
        query = query_of(http)
        found = await self._manager.list(query)
        is_full = len(found) == query.limit
        return answer(
            http,
            RolloutList(
                data=[summary_of(summary) for summary in found],
                next_cursor=str(found[-1].number) if is_full else None,
            ),
        )

    async def export(self, http: Request) -> Response:
        media = answer_media(http, ("sealed", "msgpack", "json"))
        rollout_id = http.path_params["id"]
        trajectory = await self._manager.export(rollout_id)
        headers = {}
        if media == "sealed":
            data = seal(trajectory)
            headers["content-disposition"] = f'attachment; filename="{trajectory.id}.evst"'
        elif media == "msgpack":
            data = encode(trajectory)
        else:
            body = answer_of(unpack(trajectory), self._manager)
            body.vocab_size, body.tokenizer = trajectory.vocab_size, trajectory.tokenizer
            data = encode_json(body)
        return Response(data, media_type=TYPES[media], headers=headers)

    # --- what steers them

    def _single(self, control: Control) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(http: Request) -> Response:
            answer_media(http)
            decode_own(await self._fields(http, is_optional=True), Empty)
            ids = await self._manager.unless_stalled(control([http.path_params["id"]]))
            return answer(http, Done(rollout_ids=ids))

        return endpoint

    def _bulk(self, control: Control) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(http: Request) -> Response:
            answer_media(http)
            selection = selected(await self._fields(http))
            steering = control(selection.ids, group=selection.group)
            ids = await self._manager.unless_stalled(steering)
            return answer(http, Done(rollout_ids=ids))

        return endpoint

    # --- helpers of these

    async def _body(self, http: Request) -> bytes:
        return await read_body(http, max_bytes=self._service.config.http.max_body_bytes)

    async def _fields(self, http: Request, *, is_optional: bool = False) -> dict[str, Any]:
        media = body_media(http)
        body = await self._body(http)
        if is_optional and not body:
            return {}
        return fields_of(body, "msgpack" if media == "msgpack" else "json")


def _submitted(http: Request, accepted: Accepted) -> Response:
    """202; a header says where an earlier request with the same key had made them."""
    body = Submitted(group_id=accepted.group_id, rollout_ids=accepted.rollout_ids)
    response = answer(http, body, status=202)
    if accepted.is_replay:
        response.headers["idempotent-replayed"] = "true"
    return response
