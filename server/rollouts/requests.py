"""What the endpoints of /rollouts read: bodies, queries, exports."""

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from ...engine.errors import InvalidRequest, InvalidTrajectory
from ...engine.journal.ops import Query
from ...engine.manager.intake import Submission
from ...engine.rollout import RolloutState
from ...engine.trajectory import MAGIC, Trajectory, decode, encode, pack, unseal
from ..conversation import render
from ..decoding import check_names, decode_own, fields_of
from ..json_values import check_metadata
from ..media import Media
from ..openai.generation import sampling_of
from ..service import Service
from .answers import rollout_of
from .wire import RolloutAnswer, Sampling, Selection, SubmitRequest, prompt_field

# a longer poll answers with what there is by then: proxies cut connections that are silent
MAX_WAIT_S = 60.0
MAX_PAGE = 1000
# longer bodies are taken apart on a thread, so that the event loop goes on
LONG_BODY = 2**20


# --- what to generate


async def submission_of(
    service: Service, request: SubmitRequest, fields: Mapping[str, Any]
) -> Submission:
    """`fields` as sent: templates print them. Raises InvalidRequest."""
    check_metadata(request.metadata)
    sampling = request.sampling
    params = sampling_of(
        sampling,
        max_tokens=sampling.max_tokens,
        num_top=sampling.top_logprobs or None,
        mode=sampling.logprobs_mode or service.config.openai.logprobs_mode,
        num_prompt_top=sampling.prompt_logprobs,
        record=request.record,
    )
    return Submission(
        prompt_ids=await _prompt_ids(service, request, fields),
        sampling=params,
        samples=request.samples,
        group_id=request.group_id,
        pool=request.pool,
        attempt=request.attempt,
        priority=request.priority,
        client=request.user or "",
        metadata=request.metadata,
    )


async def _prompt_ids(
    service: Service, request: SubmitRequest, fields: Mapping[str, Any]
) -> list[int]:
    match prompt_field(request):
        case "prompt_ids":
            assert request.prompt_ids is not None
            return request.prompt_ids
        case "prompt":
            assert request.prompt is not None
            text, adds = request.prompt, True
        case _:
            text, adds = _rendered(service, request, fields), False
    if request.add_special_tokens is not None:
        adds = request.add_special_tokens
    [prompt_ids] = await service.encode([text], add_special_tokens=adds)
    return prompt_ids


def _rendered(service: Service, request: SubmitRequest, fields: Mapping[str, Any]) -> str:
    return render(
        service.tokenizer,
        fields["messages"],
        template=service.config.openai.chat_template,
        tools=fields.get("tools"),
        options=request.chat_template_kwargs,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
    )


def renamed(error: InvalidRequest, request: SubmitRequest) -> InvalidRequest:
    """The same error in the names of this endpoint."""
    field = error.field
    if field == "prompt":
        field = prompt_field(request)
    elif field in Sampling.__struct_fields__:
        field = f"sampling.{field}"
    return type(error)(str(error), field=field)


# --- which rollouts


def selected(fields: Mapping[str, Any]) -> Selection:
    """Exactly one of ids, group, all; raises InvalidRequest."""
    selection = decode_own(dict(fields), Selection)
    names = Selection.__struct_fields__
    given = [name for name in names if getattr(selection, name) not in (None, False)]
    if len(given) != 1:
        raise InvalidRequest(
            f"exactly one of ids, group, all is required, got {' and '.join(given) or 'none'}",
            field=given[1] if given else "ids",
        )
    return selection


class Parameters:
    """The query of a URL. Raises InvalidRequest for a name that is not one of `known`."""

    def __init__(self, http: Request, *known: str) -> None:
        check_names(http.query_params, known)
        self._given = http.query_params

    def text(self, name: str) -> str | None:
        return self._given.get(name)

    def integer(self, name: str, *, low: int, high: int) -> int | None:
        text = self._given.get(name)
        if text is None:
            return None
        return as_integer(name, text, low=low, high=high)

    def seconds(self, name: str) -> float | None:
        text = self._given.get(name)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise InvalidRequest(
                f"{name} must be seconds, 0 or more, got {text[:40]!r}", field=name
            )
        return value

    def switch(self, name: str) -> bool:
        text = self._given.get(name, "false").lower()
        if text not in ("true", "false", "1", "0"):
            raise InvalidRequest(f"{name} must be true or false, got {text[:40]!r}", field=name)
        return text in ("true", "1")


def as_integer(name: str, text: str, *, low: int, high: int) -> int:
    """Raises InvalidRequest."""
    # int() would take '１２', '1_2' and ' 12 '
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
    if not low <= value <= high:
        raise InvalidRequest(
            f"{name} must be an integer from {low} to {high}, got {text[:40]!r}", field=name
        )
    return value


def query_of(http: Request) -> Query:
    """Of GET /rollouts; raises InvalidRequest."""
    parameters = Parameters(http, "state", "group", "pool", "cursor", "limit")
    state = parameters.text("state")
    if state is not None and state not in list(RolloutState):
        raise InvalidRequest(
            f"state must be one of {', '.join(RolloutState)}, got {state[:40]!r}", field="state"
        )
    return Query(
        state=None if state is None else RolloutState(state),
        group_id=parameters.text("group"),
        pool=parameters.text("pool"),
        after=parameters.integer("cursor", low=0, high=2**63 - 1) or 0,
        limit=parameters.integer("limit", low=1, high=MAX_PAGE) or 100,
    )


# --- exports


async def trajectory_of(body: bytes, media: Media) -> Trajectory:
    """An export as it comes back; raises InvalidTrajectory. What is inside is checked at import."""
    read = _READERS["sealed" if body.startswith(MAGIC) else media]
    if len(body) < LONG_BODY:
        return read(body)
    return await asyncio.to_thread(read, body)


def _from_json(body: bytes) -> Trajectory:
    try:
        answer = decode_own(fields_of(body, "json"), RolloutAnswer)
    except InvalidRequest as error:
        raise InvalidTrajectory(f"trajectory: {error}", field=error.field) from None
    trajectory = pack(rollout_of(answer))
    trajectory.vocab_size = answer.vocab_size or None
    trajectory.tokenizer = answer.tokenizer or None
    # once more through the one reader that checks every range
    return decode(encode(trajectory))


_READERS = {"sealed": unseal, "msgpack": decode, "json": _from_json}
