"""The /v1 face: which bytes go to which endpoint, and what comes back."""

from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ...engine.errors import EngineUnavailable
from ..decoding import decode_request
from ..http import (
    encode_json,
    error_of,
    error_response,
    ignored_fields_header,
    json_response,
    read_body,
)
from ..idempotency import request_key
from ..service import Service
from ..stream import DONE, EventStream, event
from .chat import Chat
from .completions import Completions
from .generation import Generation
from .wire import ChatRequest, CompletionRequest, ModelCard, ModelList


class OpenAIFace:
    """The endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def models(self, _: Request) -> Response:
        return json_response(
            ModelList(data=[self._card(name) for name in self._service.config.model_names])
        )

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._service.model_name(name)
        return json_response(self._card(name))

    async def completions(self, http: Request) -> ASGIApp:
        decoded = decode_request(await self._body(http), CompletionRequest)
        self._service.model_name(decoded.request.model)
        headers = ignored_fields_header(decoded.ignored)
        key = request_key(http, "/v1/completions", decoded.raw)
        completions = await Completions.submit(self._service, decoded.request, key)
        if decoded.request.stream:
            return self._stream(completions.stream(), completions.generation, headers)
        with completions.generation as generation:
            response = await completions.whole(http)
            return json_response(response, headers=headers | generation.headers())

    async def chat(self, http: Request) -> ASGIApp:
        decoded = decode_request(await self._body(http), ChatRequest)
        self._service.model_name(decoded.request.model)
        headers = ignored_fields_header(decoded.ignored)
        key = request_key(http, "/v1/chat/completions", decoded.raw)
        chat = await Chat.submit(self._service, decoded.request, decoded.raw, key)
        if decoded.request.stream:
            return self._stream(chat.stream(), chat.generation, headers)
        with chat.generation as generation:
            response = await chat.whole(http)
            return json_response(response, headers=headers | generation.headers())

    async def _body(self, http: Request) -> bytes:
        return await read_body(http, max_bytes=self._service.config.http.max_body_bytes)

    def _stream(
        self, events: AsyncGenerator[bytes], generation: Generation, headers: dict[str, str]
    ) -> EventStream:
        return EventStream(
            events,
            headers=headers | generation.headers(),
            heartbeat_s=self._service.config.http.heartbeat_s,
            on_end=generation.close,
            on_error=lambda error: event(encode_json(error_of(error))) + DONE,
            refuse=error_response,
        )

    def _card(self, name: str) -> ModelCard:
        try:
            max_model_len = self._service.manager.info.max_model_len
        except EngineUnavailable:
            max_model_len = None
        return ModelCard(
            id=name,
            created=self._service.created,
            root=self._service.config.engine.model.path,
            max_model_len=max_model_len,
        )
