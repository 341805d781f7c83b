"""Several rollouts in one request: submitted, read, waited for.

A run of many short rollouts asks for as much as it gets; by one request each, it would be busy
with requests.
"""

import asyncio
from typing import Any

from msgspec import Raw, Struct
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...engine.errors import EverstepError, InvalidRequest
from ...engine.journal.ops import RequestKey
from ...engine.manager.intake import Accepted, Submission
from ...engine.rollout import Found
from ...engine.trajectory import encode, pack
from ..decoding import decode_own, fields_of
from ..http import encode_json, error_of, read_body
from ..idempotency import HEADER, key_of
from ..media import TYPES, Media, answer, answer_media, body_media, encode_msgpack
from ..service import Service
from ..stream import unless_disconnected
from .answers import answer_of
from .requests import MAX_WAIT_S, Parameters, renamed, submission_of
from .wire import (
    GetManyRequest,
    Outcome,
    PackedRollouts,
    RolloutsAnswer,
    SubmitManyRequest,
    SubmitRequest,
    SubmittedMany,
)

_KEY = "idempotency_key"
# ended ones in an answer to who waits: the others are there when he asks again
MOST_ENDED = 64


class _Checked(Struct):
    """A submission that may be accepted."""

    request: SubmitRequest
    submission: Submission
    key: RequestKey | None


class ManyFace:
    """The endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._manager = service.manager

    def routes(self) -> list[Route]:
        return [
            Route("/rollouts/submit", self.submit, methods=["POST"]),
            Route("/rollouts/get", self.get, methods=["POST"]),
        ]

    async def submit(self, http: Request) -> Response:
        """Each is accepted or refused for itself. What is not a submission's own fault (no room, no
        engine) answers for all: with keys, the same request may be sent again."""
        answer_media(http)
        if HEADER in http.headers:
            raise InvalidRequest(
                f"Idempotency-Key is of one submission: give each its own, as {_KEY}",
                field="Idempotency-Key",
            )
        request = decode_own(await self._fields(http), SubmitManyRequest)
        checked = [
            await self._check(http, number, fields)
            for number, fields in enumerate(request.submissions)
        ]
        outcomes = await asyncio.gather(*map(self._outcome, checked))
        return answer(http, SubmittedMany(data=outcomes), status=202)

    async def _check(
        self, http: Request, number: int, given: dict[str, Any]
    ) -> _Checked | EverstepError:
        fields = {name: value for name, value in given.items() if value is not None}
        try:
            key = fields.pop(_KEY, None)
            named = None if key is None else self._key(http, number, key, fields)
            request = decode_own(fields, SubmitRequest, inner=("sampling",))
            self._service.model_name(request.model)
            return _Checked(request, await submission_of(self._service, request, fields), named)
        except EverstepError as error:
            return _own(error)

    def _key(self, http: Request, number: int, key: Any, fields: dict[str, Any]) -> RequestKey:
        place = f"submissions[{number}].{_KEY}"
        if not isinstance(key, str):
            raise InvalidRequest(f"{place} must be a string", field=place)
        # as POST /rollouts has it: either way the same submission
        return key_of(http, key, "/rollouts", fields, path="/rollouts", field=place)

    async def _outcome(self, checked: _Checked | EverstepError) -> Outcome:
        if isinstance(checked, EverstepError):
            return Outcome(error=error_of(checked).error)
        try:
            accepted: Accepted = await self._manager.accept(checked.submission, checked.key)
        except InvalidRequest as error:
            return Outcome(error=error_of(renamed(error, checked.request)).error)
        except EverstepError as error:
            return Outcome(error=error_of(_own(error)).error)
        return Outcome(
            group_id=accepted.group_id,
            rollout_ids=accepted.rollout_ids,
            is_replay=accepted.is_replay,
        )

    async def get(self, http: Request) -> Response:
        media = answer_media(http)
        wait_s = Parameters(http, "wait").seconds("wait")
        request = decode_own(await self._fields(http), GetManyRequest)
        if wait_s is None:
            return self._rollouts(await self._manager.find_many(request.ids), media)
        finding = self._manager.find_many(request.ids, timeout_s=min(wait_s, MAX_WAIT_S))
        found = await unless_disconnected(http, finding)
        return self._rollouts(replace(found, rollouts=found.rollouts[:MOST_ENDED]), media)

    def _rollouts(self, found: Found, media: Media) -> Response:
        unknown = dict(found.unknown)
        if media == "msgpack":
            packed = [Raw(encode(pack(rollout))) for rollout in found.rollouts]
            data = encode_msgpack(PackedRollouts(data=packed, unknown=unknown))
        else:
            answers = [answer_of(rollout, self._manager) for rollout in found.rollouts]
            data = encode_json(RolloutsAnswer(data=answers, unknown=unknown))
        return Response(data, media_type=TYPES[media])

    async def _fields(self, http: Request) -> dict[str, Any]:
        media = body_media(http)
        body = await read_body(http, max_bytes=self._service.config.http.max_body_bytes)
        return fields_of(body, "msgpack" if media == "msgpack" else "json")


def _own(error: EverstepError) -> EverstepError:
    """The error, if it is one submission's own; raises it where it would meet any."""
    if error.retryable or error.status >= 500:
        raise error
    return error
