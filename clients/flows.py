"""What both clients of /rollouts say and how they read the answers; neither sends anything here.

A call is a *flow*: a generator that yields what to do next (send this, pause so long), is sent
what came of it, and returns the result. So retries, polls and pages are written once, and
`Client` and `AsyncClient` differ only in how they wait.
"""

import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

import httpx
import msgspec
from msgspec import UNSET, Struct

from ..engine.errors import (
    EngineUnavailable,
    EverstepError,
    InvalidRequest,
)
from ..engine.journal.ops import Budget, BudgetState
from ..engine.messages import Staged
from ..engine.rollout import Found, Record, Rollout, RolloutState, SamplingParams
from ..engine.trajectory import Trajectory, decode, seal, unpack
from ..server.rollouts.wire import (
    BudgetList,
    BudgetRequest,
    Done,
    Empty,
    ForkRequest,
    GetManyRequest,
    Outcome,
    PackedRollouts,
    RolloutList,
    Selection,
    Submitted,
    SubmittedMany,
)
from ..server.weights.wire import StageRequest, Updated, WeightsAnswer
from .patience import Clock, Patience, error_from

T = TypeVar("T")
StructT = TypeVar("StructT", bound=Struct)

PAGE = 500
POLL_S = 20.0
MIN_POLL_S = 1.0
READ_TIMEOUT_S = 60.0
# a version is loaded and checked beside generation, which has most of the time
WEIGHTS_TIMEOUT_S = 3600.0
_MSGPACK = "application/msgpack"
_encode = msgspec.json.Encoder().encode


class Call(Struct, frozen=True, kw_only=True):
    """A request to send. read_s: how long its answer may stay silent."""

    method: str
    path: str
    query: dict[str, str] = {}
    headers: dict[str, str] = {}
    content: bytes | None = None
    read_s: float = READ_TIMEOUT_S


class Pause(Struct, frozen=True):
    """Go on after so long."""

    seconds: float


Step = Call | Pause
Reply = httpx.Response | httpx.TransportError | None
Flow = Generator[Step, Reply, T]


def send(call: Call, patience: Patience) -> Flow[httpx.Response]:
    """The answer, once there is a good one. Only for calls that may be sent twice."""
    while True:
        reply = yield call
        assert reply is not None
        if isinstance(reply, httpx.Response) and reply.status_code < 400:
            patience.succeeded()
            return reply
        yield Pause(patience.pause_after(reply))


# --- rollouts


def submit(fields: Mapping[str, Any], key: str | None, patience: Patience) -> Flow[Submitted]:
    return _submit("/rollouts", _json(fields), key, patience)


def submit_many(
    submissions: Sequence[Mapping[str, Any]], patience: Patience
) -> Flow[list[Submitted | EverstepError]]:
    """Each with an idempotency_key, so that all may be sent again."""
    keyed = [{"idempotency_key": uuid.uuid4().hex} | dict(fields) for fields in submissions]
    call = _post("/rollouts/submit", _json({"submissions": keyed}))
    response = yield from send(call, patience)
    return [_outcome(one) for one in _read(response, SubmittedMany).data]


def _outcome(outcome: Outcome) -> Submitted | EverstepError:
    error = outcome.error
    if error is not None:
        return error_from(error.code, error.message, error.param)
    return Submitted(group_id=outcome.group_id or "", rollout_ids=outcome.rollout_ids)


def fork(
    rollout_id: str, request: ForkRequest, key: str | None, patience: Patience
) -> Flow[Submitted]:
    return _submit(f"{path_of(rollout_id)}/fork", _json(request), key, patience)


def import_(
    export: bytes | Trajectory, allow_other_weights: bool, key: str | None, patience: Patience
) -> Flow[Submitted]:
    call = Call(
        method="POST",
        path="/rollouts/import",
        query={"allow_other_weights": "true"} if allow_other_weights else {},
        headers={"content-type": "application/octet-stream"},
        content=export if isinstance(export, bytes) else seal(export),
    )
    response = yield from send(_with_key(call, key), patience)
    return _read(response, Submitted)


def get(rollout_id: str, patience: Patience) -> Flow[Rollout]:
    call = Call(method="GET", path=path_of(rollout_id), headers={"accept": _MSGPACK})
    response = yield from send(call, patience)
    return unpack(decode(response.content))


def wait(
    rollout_id: str, timeout_s: float | None, patience: Patience, clock: Clock = time.monotonic
) -> Flow[Rollout]:
    """The rollout once it has ended: long polls, shorter ones where a connection does not last."""
    deadline = None if timeout_s is None else clock() + timeout_s
    poll_s = POLL_S
    while True:
        wait_s = poll_s if deadline is None else max(0.0, min(poll_s, deadline - clock()))
        reply = yield Call(
            method="GET",
            path=path_of(rollout_id),
            query={"wait": f"{wait_s:.3f}"},
            headers={"accept": _MSGPACK},
            read_s=wait_s + READ_TIMEOUT_S,
        )
        assert reply is not None
        if isinstance(reply, httpx.Response) and reply.status_code < 400:
            patience.succeeded()
            rollout = unpack(decode(reply.content))
            if rollout.state.is_ended:
                return rollout
        else:
            poll_s = max(MIN_POLL_S, poll_s / 2)
            yield Pause(patience.pause_after(reply))
        if deadline is not None and clock() >= deadline:
            raise TimeoutError(f"{rollout_id} has not ended after {timeout_s} s")


def get_many(rollout_ids: Sequence[str], patience: Patience) -> Flow[Found]:
    response = yield from send(_get_many(rollout_ids), patience)
    return _found(response)


def wait_any(
    rollout_ids: Sequence[str],
    timeout_s: float | None,
    patience: Patience,
    clock: Clock = time.monotonic,
) -> Flow[Found]:
    """Those that have ended, once one has, or the time is up: long polls, as `wait`."""
    deadline = None if timeout_s is None else clock() + timeout_s
    poll_s = POLL_S
    while True:
        wait_s = poll_s if deadline is None else max(0.0, min(poll_s, deadline - clock()))
        reply = yield msgspec.structs.replace(
            _get_many(rollout_ids), query={"wait": f"{wait_s:.3f}"}, read_s=wait_s + READ_TIMEOUT_S
        )
        assert reply is not None
        if isinstance(reply, httpx.Response) and reply.status_code < 400:
            patience.succeeded()
            found = _found(reply)
            is_late = deadline is not None and clock() >= deadline
            if found.rollouts or found.unknown or is_late:
                return found
        else:
            poll_s = max(MIN_POLL_S, poll_s / 2)
            yield Pause(patience.pause_after(reply))


def _get_many(rollout_ids: Sequence[str]) -> Call:
    call = _post("/rollouts/get", _json(GetManyRequest(ids=list(rollout_ids))))
    return msgspec.structs.replace(call, headers=call.headers | {"accept": _MSGPACK})


def _found(response: httpx.Response) -> Found:
    try:
        packed = msgspec.msgpack.decode(response.content, type=PackedRollouts)
    except msgspec.MsgspecError as error:
        raise _stranger(response, error) from None
    return Found([unpack(decode(memoryview(one))) for one in packed.data], packed.unknown)


def page(query: Mapping[str, str], patience: Patience) -> Flow[RolloutList]:
    call = Call(method="GET", path="/rollouts", query=dict(query))
    response = yield from send(call, patience)
    return _read(response, RolloutList)


def control(verb: str, selection: Selection, patience: Patience) -> Flow[list[str]]:
    call = Call(method="POST", path=f"/rollouts/{verb}", content=_json(selection))
    response = yield from send(call, patience)
    return _read(response, Done).rollout_ids


def export(rollout_id: str, patience: Patience) -> Flow[bytes]:
    call = Call(
        method="GET",
        path=f"{path_of(rollout_id)}/export",
        headers={"accept": "application/octet-stream"},
    )
    response = yield from send(call, patience)
    return response.content


def _submit(path: str, content: bytes, key: str | None, patience: Patience) -> Flow[Submitted]:
    response = yield from send(_with_key(_post(path, content), key), patience)
    return _read(response, Submitted)


def _post(path: str, content: bytes) -> Call:
    headers = {"content-type": "application/json"}
    return Call(method="POST", path=path, headers=headers, content=content)


def _with_key(call: Call, key: str | None) -> Call:
    """With a key of its own, so that it may be sent again, whatever became of the first."""
    headers = call.headers | {"idempotency-key": key or uuid.uuid4().hex}
    return msgspec.structs.replace(call, headers=headers)


# --- token budgets of pools


def open_budget(request: BudgetRequest, key: str | None, patience: Patience) -> Flow[Budget]:
    call = _with_key(_post("/rollouts/budget", _json(request)), key)
    response = yield from send(call, patience)
    return _read(response, Budget)


def close_budget(budget_id: str, patience: Patience) -> Flow[Budget]:
    response = yield from send(_post(f"{_budget_path(budget_id)}/close", b""), patience)
    return _read(response, Budget)


def budgets(pool: str | None, patience: Patience) -> Flow[list[Budget]]:
    query = {} if pool is None else {"pool": pool}
    call = Call(method="GET", path="/rollouts/budget", query=query)
    response = yield from send(call, patience)
    return _read(response, BudgetList).data


def wait_budget(
    budget_id: str, timeout_s: float | None, patience: Patience, clock: Clock = time.monotonic
) -> Flow[Budget]:
    """The budget once it has ended, or the time is up."""
    until = None if timeout_s is None else clock() + timeout_s
    while True:
        wait_s = POLL_S if until is None else max(0.0, min(POLL_S, until - clock()))
        call = Call(
            method="GET",
            path=_budget_path(budget_id),
            query={"wait": f"{wait_s:.3f}"},
            read_s=wait_s + READ_TIMEOUT_S,
        )
        response = yield from send(call, patience)
        budget = _read(response, Budget)
        is_late = until is not None and clock() >= until
        if is_late or budget.state is not BudgetState.OPEN:
            return budget


# --- weights


def weights(key: str | None, patience: Patience) -> Flow[WeightsAnswer]:
    call = Call(method="GET", path="/weights", headers=_admin(key))
    response = yield from send(call, patience)
    return _read(response, WeightsAnswer)


def stage_weights(request: StageRequest, key: str | None, patience: Patience) -> Flow[Staged]:
    response = yield from send(_change("stage", request, key), patience)
    return _read(response, Staged)


def unstage_weights(key: str | None, patience: Patience) -> Flow[WeightsAnswer]:
    response = yield from send(_change("unstage", Empty(), key), patience)
    return _read(response, WeightsAnswer)


def change_weights(
    verb: str, request: Struct, key: str | None, patience: Patience
) -> Flow[Updated]:
    """Sent again after trouble: a version that serves already is not served twice."""
    response = yield from send(_change(verb, request, key), patience)
    return _read(response, Updated)


def _change(verb: str, request: Struct, key: str | None) -> Call:
    call = _post(f"/weights/{verb}", _json(request))
    return msgspec.structs.replace(
        call, headers=call.headers | _admin(key), read_s=WEIGHTS_TIMEOUT_S
    )


def _admin(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


# --- what they say


def submission_fields(
    sampling: SamplingParams | Mapping[str, Any] | None = None,
    record: Sequence[Record] = (),
    **fields: Any,
) -> dict[str, Any]:
    """The body of POST /rollouts; what is None is left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    wanted: list[Record] = list(record)
    if isinstance(sampling, SamplingParams):
        wanted += [name for name in sampling.record if name not in wanted]
        sampling = sampling_fields(sampling)
    if sampling:
        given["sampling"] = dict(sampling)
    if wanted:
        given["record"] = wanted
    return given


def sampling_fields(params: SamplingParams) -> dict[str, Any]:
    """In the names of the wire, without defaults."""
    usual = SamplingParams()
    names = [name for name in params.__struct_fields__ if name != "record"]
    values = {name: getattr(params, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


def selection_of(rollouts: str | Sequence[str] | None, group: str | None, every: bool) -> Selection:
    """Exactly one; raises InvalidRequest."""
    if (rollouts is not None) + (group is not None) + every != 1:
        raise InvalidRequest(
            "name rollouts, or group=…, or all=True: exactly one", field="rollouts"
        )
    ids = [rollouts] if isinstance(rollouts, str) else rollouts
    return Selection(ids=None if ids is None else list(ids), group=group, all=every or None)


def query_of(
    state: RolloutState | str | None, group: str | None, pool: str | None, limit: int
) -> dict[str, str]:
    given = {"state": state, "group": group, "pool": pool, "limit": str(limit)}
    return {name: str(value) for name, value in given.items() if value is not None}


def path_of(rollout_id: str) -> str:
    return f"/rollouts/{_name_of('rollout', rollout_id)}"


def _budget_path(budget_id: str) -> str:
    return f"/rollouts/budget/{_name_of('budget', budget_id)}"


def _name_of(kind: str, name: str) -> str:
    # an id is a name, never a path of its own
    if not name or not set(name).isdisjoint("/?#%\\ ") or name in (".", ".."):
        raise InvalidRequest(f"{name!r} is no {kind}'s id", field=f"{kind}_id")
    return name


def _json(body: Any) -> bytes:
    if isinstance(body, Struct):
        fields = {name: getattr(body, name) for name in body.__struct_fields__}
        body = {name: value for name, value in fields.items() if value not in (None, UNSET)}
    try:
        return _encode(body)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"the request cannot be written as JSON: {error}") from None


def _read(response: httpx.Response, kind: type[StructT]) -> StructT:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.MsgspecError as error:
        raise _stranger(response, error) from None


def _stranger(response: httpx.Response, error: msgspec.MsgspecError) -> EngineUnavailable:
    return EngineUnavailable(f"{response.url} answered what no Everstep server answers: {error}")
