"""What the clients say and how they bear trouble, without a server: flows are driven by hand."""

import asyncio
import inspect
from itertools import pairwise

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep import AsyncClient, Client, SamplingParams
from everstep.clients import flows
from everstep.clients.calls import Address
from everstep.clients.event_stream import ServerEvents, StreamReader
from everstep.clients.flows import Call, Pause
from everstep.clients.patience import FIRST_CONTACT_S, LONGEST_PAUSE_S, Patience, error_of
from everstep.engine.errors import (
    ConfigError,
    Conflict,
    ContextTooLong,
    Draining,
    EngineDied,
    EngineUnavailable,
    EverstepError,
    IllegalState,
    InvalidRequest,
    InvalidTrajectory,
    JournalError,
    JournalFull,
    KeyReused,
    Overloaded,
    UnknownBudget,
    UnknownModel,
    UnknownRollout,
)
from everstep.engine.journal.ops import Budget
from everstep.engine.rollout import Rollout
from everstep.engine.trajectory import encode, pack
from everstep.server.decoding import decode_own
from everstep.server.http import error_response
from everstep.server.rollouts.wire import (
    BudgetRequest,
    PackedRollouts,
    Selection,
    StreamEvent,
    SubmitRequest,
)

from ..fakes import FakeClock

URL = "http://test"
SUBMITTED = {"group_id": "g", "rollout_ids": ["ro-1"]}


def reply(status: int = 200, body: object = None, **headers: str) -> httpx.Response:
    pairs = {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    request = httpx.Request("GET", URL)
    return httpx.Response(status, content=content, headers=pairs, request=request)


def failed(error: EverstepError) -> httpx.Response:
    """As the server answers it."""
    answer = error_response(error)
    return httpx.Response(answer.status_code, content=answer.body, headers=dict(answer.headers))


def patience(clock: FakeClock | None = None, **options) -> Patience:
    return Patience(URL, 120.0, clock=clock or FakeClock(), **{"has_answered": True, **options})


def drive(flow, replies: list, clock: FakeClock | None = None) -> tuple:
    """(result, calls). A pause passes at once on the clock."""
    calls: list[Call] = []
    answer = None
    while True:
        try:
            step = flow.send(answer)
        except StopIteration as done:
            assert not replies, "answers are left over"
            return done.value, calls
        if isinstance(step, Pause):
            answer = None
            if clock is not None:
                clock.advance(step.seconds)
        else:
            calls.append(step)
            answer = replies.pop(0)


# --- errors


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("samples must be 1", field="samples"),
        ContextTooLong("too long", field="prompt"),
        UnknownModel("not here", field="model"),
        InvalidTrajectory("trajectory: cut", field="file"),
        UnknownRollout("no such"),
        UnknownBudget("no such"),
        Conflict("known"),
        KeyReused("used"),
        IllegalState("ended"),
        Overloaded("full", retry_after_s=3.0),
        EngineUnavailable("loading"),
        JournalError("corrupt"),
        JournalFull("full"),
    ],
)
def test_an_error_of_the_server_is_raised_as_its_class(error):
    found = error_of(failed(error))
    assert type(found) is type(error)
    assert (str(found), found.code, found.status) == (str(error), error.code, error.status)
    assert getattr(found, "field", None) == getattr(error, "field", None)
    if isinstance(error, Overloaded):
        assert found.retry_after_s == 3.0


@pytest.mark.parametrize("error", [EngineDied("gone"), Draining("going")])
def test_kinds_that_share_a_code_come_as_the_general_one(error):
    assert type(error_of(failed(error))) is EngineUnavailable


@pytest.mark.parametrize(
    ("status", "body"), [(500, b"<html>"), (404, b""), (418, b'{"error": "x"}'), (502, b"\xff")]
)
def test_an_answer_of_somebody_else_is_an_error_too(status, body):
    found = error_of(reply(status, body))
    assert found.status == status
    assert found.code == "unexpected_answer"
    assert str(status) in str(found)


def test_a_code_that_no_class_has_is_kept():
    body = {"error": {"message": "key", "type": "t", "param": None, "code": "invalid_api_key"}}
    found = error_of(reply(401, body))
    assert (type(found), found.code, found.status) == (EverstepError, "invalid_api_key", 401)


# --- trouble


def test_what_passes_is_tried_again_with_the_same_key():
    trouble = [
        httpx.ConnectError("refused"),
        httpx.ReadError("cut"),
        failed(EngineUnavailable("loading")),
        failed(Overloaded("full", retry_after_s=5.0)),
        failed(JournalFull("full")),
        reply(502, b"<html>bad gateway"),
        reply(503, b"<html>away"),
    ]
    flow = flows.submit({"prompt": "Hi"}, None, patience())
    result, calls = drive(flow, [*trouble, reply(202, SUBMITTED)])
    assert result.rollout_ids == ["ro-1"]
    assert len(calls) == 8
    assert len({call.headers["idempotency-key"] for call in calls}) == 1
    assert len({call.content for call in calls}) == 1
    _, others = drive(flows.submit({"prompt": "Hi"}, None, patience()), [reply(202, SUBMITTED)])
    assert others[0].headers["idempotency-key"] != calls[0].headers["idempotency-key"]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("bad"),
        UnknownRollout("no"),
        KeyReused("used"),
        EverstepError("bug"),
        JournalError("this server keeps no journal"),
    ],
)
def test_what_cannot_pass_is_raised_at_once(error):
    with pytest.raises(type(error)):
        drive(flows.submit({"prompt": "Hi"}, "k", patience()), [failed(error)])


def test_trouble_is_borne_until_its_deadline_and_counted_from_its_beginning():
    clock = FakeClock()
    held = patience(clock)
    flow = flows.get("ro-1", held)
    began = clock.now_s
    with pytest.raises(EngineUnavailable, match="no answer from http://test: cut"):
        drive(flow, [httpx.ReadError("cut")] * 500, clock)
    assert 110 < clock.now_s - began <= 120
    # after a success it is new trouble
    held.succeeded()
    clock.advance(1000)
    assert held.pause_after(httpx.ReadError("cut")) > 0


def test_an_address_that_never_answered_is_given_up_soon():
    clock = FakeClock()
    began = clock.now_s
    with pytest.raises(EngineUnavailable):
        drive(
            flows.get("ro-1", patience(clock, has_answered=False)),
            [httpx.ConnectError("refused")] * 500,
            clock,
        )
    assert clock.now_s - began <= FIRST_CONTACT_S


def test_retry_after_is_kept_to():
    held = patience()
    assert held.pause_after(failed(Overloaded("full", retry_after_s=7.0))) >= 7.0


# --- waiting


def rollout(state: str = "running", **fields) -> Rollout:
    return Rollout(
        id="ro-1",
        group_id="g",
        prompt_ids=[1, 2],
        sampling=SamplingParams(),
        seed=1,
        max_tokens=10,
        state=state,
        **fields,
    )


def packed(state: str, **fields) -> httpx.Response:
    found = rollout(**fields)
    answer = pack(found)
    answer = msgspec.convert(
        msgspec.to_builtins(answer, builtin_types=(bytes,)) | {"state": state}, type(answer)
    )
    return reply(200, encode(answer))


ENDED = {"finish_reason": {"type": "abort"}}


def ended() -> httpx.Response:
    found = rollout()
    answer = pack(found)
    fields = msgspec.to_builtins(answer, builtin_types=(bytes,)) | {"state": "aborted"} | ENDED
    return reply(200, encode(msgspec.convert(fields, type(answer))))


def test_waiting_polls_until_it_has_ended_and_shorter_where_connections_do_not_last():
    replies = [packed("queued"), httpx.ReadError("cut"), httpx.ReadError("cut"), ended()]
    result, calls = drive(flows.wait("ro-1", None, patience()), replies)
    assert result.state.is_ended
    waits = [float(call.query["wait"]) for call in calls]
    assert waits == [20.0, 20.0, 10.0, 5.0]
    assert all(call.read_s > wait for call, wait in zip(calls, waits, strict=True))


def test_waiting_ends_when_the_time_is_up():
    clock = FakeClock()
    flow = flows.wait("ro-1", 30.0, patience(clock), clock)
    step = flow.send(None)
    assert float(step.query["wait"]) == 20.0
    clock.advance(20)
    step = flow.send(packed("queued"))
    assert float(step.query["wait"]) == 10.0
    clock.advance(10)
    with pytest.raises(TimeoutError, match="ro-1"):
        flow.send(packed("queued"))


# --- many in one request


def several(*ended_: httpx.Response, **unknown: str) -> httpx.Response:
    packed_ = PackedRollouts(data=[msgspec.Raw(one.content) for one in ended_], unknown=unknown)
    return reply(200, msgspec.msgpack.encode(packed_))


def test_many_are_sent_again_with_their_keys_and_each_has_its_outcome():
    accepted = {"group_id": "g", "rollout_ids": ["ro-1"]}
    refused = {"message": "top_p: no", "type": "t", "param": "sampling.top_p"}
    answer = {"data": [accepted, {"error": refused | {"code": "invalid_request_error"}}]}
    many = [{"prompt": "a", "idempotency_key": "mine"}, {"prompt": "b"}]
    replies = [httpx.ReadError("cut"), failed(JournalFull("full")), reply(202, answer)]
    [first, second], calls = drive(flows.submit_many(many, patience()), replies)
    assert first.rollout_ids == ["ro-1"]
    assert isinstance(second, InvalidRequest)
    assert second.field == "sampling.top_p"
    bodies = [msgspec.json.decode(call.content)["submissions"] for call in calls]
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0][0]["idempotency_key"] == "mine"
    assert len(bodies[0][1]["idempotency_key"]) == 32


def test_waiting_for_any_polls_until_one_has_ended_or_the_time_is_up():
    replies = [several(), httpx.ReadError("cut"), httpx.ReadError("cut"), several(ended())]
    found, calls = drive(flows.wait_any(["ro-1", "ro-2"], None, patience()), replies)
    assert [one.id for one in found.rollouts] == ["ro-1"]
    assert [float(call.query["wait"]) for call in calls] == [20.0, 20.0, 10.0, 5.0]
    assert msgspec.json.decode(calls[0].content) == {"ids": ["ro-1", "ro-2"]}
    found, _ = drive(flows.wait_any(["ro-2"], None, patience()), [several(**{"ro-2": "why"})])
    assert found.unknown == {"ro-2": "why"}
    clock = FakeClock()
    flow = flows.wait_any(["ro-1"], 5.0, patience(clock), clock)
    assert float(flow.send(None).query["wait"]) == 5.0
    clock.advance(5)
    with pytest.raises(StopIteration) as done:
        flow.send(several())
    assert not done.value.value.rollouts


def test_what_is_not_borne_is_raised_at_once():
    calm = patience(not_borne=(JournalFull,))
    with pytest.raises(JournalFull):
        drive(flows.submit_many([{"prompt": "a"}], calm), [failed(JournalFull("full"))])
    _, calls = drive(
        flows.get_many(["ro-1"], calm), [failed(EngineUnavailable("loading")), several(ended())]
    )
    assert len(calls) == 2


# --- streams

EVENTS = [
    StreamEvent(
        start=start,
        end=end,
        output_ids=list(range(start, end)),
        lp_sampled=[-1.0] * (end - start),
        lp_temp=[-1.0] * (end - start),
        kept_mass=[1.0] * (end - start),
        versions=[(0, end - start)],
        text="x😀" * (end - start),
        state="running" if end < 6 else "finished",
        finish_reason=None if end < 6 else {"type": "length"},
    )
    for start, end in [(0, 1), (1, 3), (3, 6)]
]


def wire(events: list[StreamEvent]) -> bytes:
    blocks = [b"id: %d\ndata: %s\n\n" % (e.end, msgspec.json.encode(e)) for e in events]
    return b"retry: 1000\n\n" + b": keep-alive\n\n".join(blocks)


@given(st.lists(st.integers(0, 1000), max_size=8))
def test_events_are_the_same_however_their_bytes_are_cut(cuts):
    data = wire(EVENTS)
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    parser = ServerEvents()
    found = []
    for start, end in pairwise(places):
        found += parser.feed(data[start:end])
    assert [name for name, _ in found] == ["message"] * 3
    assert [msgspec.json.decode(text)["end"] for _, text in found] == [1, 3, 6]


@given(st.data())
def test_a_reader_cut_anywhere_goes_on_behind_the_last_whole_event(data):
    reader = StreamReader("ro-1", 0, patience())
    seen: list[int] = []
    for _ in range(10):
        after = int(reader.call().query["after"])
        assert after == len(seen)
        rest = wire([event for event in EVENTS if event.start >= after])
        cut = data.draw(st.integers(0, len(rest)))
        for event in reader.take(rest[:cut]):
            seen += event.output_ids
        if reader.has_ended:
            break
    else:
        reader.call()
        for event in reader.take(wire([e for e in EVENTS if e.start >= len(seen)])):
            seen += event.output_ids
    assert seen == list(range(6))


def test_a_stream_that_skips_or_repeats_is_refused():
    for wrong in (EVENTS[1:], [EVENTS[0], EVENTS[0]], [EVENTS[0], EVENTS[2]]):
        reader = StreamReader("ro-1", 0, patience())
        reader.call()
        with pytest.raises(EngineUnavailable, match="expected"):
            list(reader.take(wire(wrong)))


def test_heartbeats_are_signs_of_life():
    """A rollout that thinks for hours behind a proxy that cuts each connection is not given up."""
    clock = FakeClock()
    reader = StreamReader("ro-1", 0, patience(clock))
    for _ in range(100):
        reader.call()
        clock.advance(15)
        assert list(reader.take(b": keep-alive\n\n")) == []
        clock.advance(50)
        assert reader.pause_after(httpx.ReadError("cut")) <= LONGEST_PAUSE_S
    for _ in range(3):
        clock.advance(39)
        reader.pause_after(httpx.ConnectError("refused"))
    clock.advance(39)
    with pytest.raises(EngineUnavailable):
        reader.pause_after(httpx.ConnectError("refused"))


def test_an_error_event_is_raised_as_its_class():
    reader = StreamReader("ro-1", 0, patience())
    reader.call()
    body = failed(JournalError("corrupt")).content
    with pytest.raises(JournalError, match="corrupt"):
        list(reader.take(b"event: error\ndata: " + body + b"\n\n"))
    with pytest.raises(EngineUnavailable, match="no Everstep server"):
        list(reader.take(b"data: {}\n\n"))


# --- what is said

samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.integers(-1, 5),
    logit_bias=st.dictionaries(st.integers(0, 9), st.floats(-1, 1), max_size=2),
    seed=st.none() | st.integers(-5, 5),
    max_tokens=st.none() | st.integers(1, 9),
    stop=st.lists(st.text(min_size=1), max_size=2).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 5), max_size=2).map(tuple),
    ignore_eos=st.booleans(),
    prompt_logprobs=st.none() | st.integers(0, 3),
    top_logprobs=st.integers(0, 3),
    record=st.lists(st.sampled_from(["lp_raw", "routing"]), unique=True).map(tuple),
)


@given(samplings)
def test_sampling_params_mean_the_same_on_the_wire(params):
    fields = flows.submission_fields(params, ("entropy",), prompt_ids=[1])
    sent = msgspec.json.decode(msgspec.json.encode(fields))
    request = decode_own(sent, SubmitRequest, inner=("sampling",))
    assert request.record == ["entropy", *params.record]
    for name in ("temperature", "top_k", "logit_bias", "seed", "max_tokens", "ignore_eos"):
        assert getattr(request.sampling, name) == getattr(params, name)
    assert list(params.stop) == (request.sampling.stop or [])
    assert request.sampling.prompt_logprobs == params.prompt_logprobs
    assert request.sampling.top_logprobs == params.top_logprobs


@pytest.mark.parametrize("given_", [(None, None, False), ("a", "g", False), (["a"], None, True)])
def test_a_control_call_names_exactly_one_kind(given_):
    with pytest.raises(InvalidRequest):
        flows.selection_of(*given_)


def test_a_control_call_says_only_what_is_given():
    _, [call] = drive(
        flows.control("pause", flows.selection_of("ro-1", None, False), patience()),
        [reply(200, {"rollout_ids": ["ro-1"]})],
    )
    assert call.content == b'{"ids":["ro-1"]}'
    assert flows.selection_of(None, None, True) == Selection(all=True)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a?b", "a#b", "%2e", ".", "a b"])
def test_an_id_is_no_path(name):
    with pytest.raises(InvalidRequest, match="no rollout's id"):
        flows.path_of(name)


def test_what_json_cannot_say_is_refused_before_it_is_sent():
    with pytest.raises(InvalidRequest, match="cannot be written as JSON"):
        next(flows.submit({"metadata": object()}, None, patience()))


# --- where to

VARIABLES = ("EVERSTEP_BASE_URL", "EVERSTEP_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_KEY")


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, (None, None), ("http://127.0.0.1:8000", None)),
        ({}, ("http://a:1/", "k"), ("http://a:1", "k")),
        ({}, ("http://a:1/v1", None), ("http://a:1", None)),
        (
            {"EVERSTEP_BASE_URL": "http://b", "EVERSTEP_API_KEY": "e"},
            (None, None),
            ("http://b", "e"),
        ),
        (
            {"OPENAI_BASE_URL": "http://o/v1", "OPENAI_API_KEY": "s"},
            (None, None),
            ("http://o", "s"),
        ),
        # the key of one server is not told to another
        ({"OPENAI_API_KEY": "s"}, (None, None), ("http://127.0.0.1:8000", None)),
        (
            {"OPENAI_BASE_URL": "http://o", "OPENAI_API_KEY": "s"},
            ("http://a", None),
            ("http://a", None),
        ),
    ],
)
def test_the_address_comes_from_arguments_then_the_environment(
    monkeypatch, environment, arguments, expected
):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = Address.find(*arguments)
    assert (found.url, found.api_key) == expected


def test_an_address_that_is_none_is_refused_at_once():
    with pytest.raises(ConfigError, match="http://"):
        Client("localhost:8000")


# --- token budgets


def budget(state: str = "open", used: int = 0) -> dict[str, object]:
    return {"id": "bud-1", "pool": "math", "tokens": 9, "used": used, "state": state}


def test_a_budget_is_opened_once_whatever_became_of_the_first_try():
    flow = flows.open_budget(BudgetRequest(pool="math", tokens=9), None, patience())
    found, calls = drive(flow, [httpx.ReadError("cut"), reply(202, budget())])
    assert found == Budget(id="bud-1", pool="math", tokens=9)
    assert [call.path for call in calls] == ["/rollouts/budget"] * 2
    assert calls[0].headers["idempotency-key"] == calls[1].headers["idempotency-key"]
    assert msgspec.json.decode(calls[0].content) == {"pool": "math", "tokens": 9}


def test_a_budget_is_waited_for_until_it_ends_or_the_time_is_up():
    replies = [reply(200, budget()), httpx.ReadError("cut"), reply(200, budget("spent", 9))]
    found, calls = drive(flows.wait_budget("bud-1", None, patience()), replies)
    assert (found.state, found.used) == ("spent", 9)
    assert {call.path for call in calls} == {"/rollouts/budget/bud-1"}
    found, [call] = drive(flows.wait_budget("bud-1", 0.0, patience()), [reply(200, budget())])
    assert (found.state, call.query) == ("open", {"wait": "0.000"})


def test_budgets_are_listed_and_closed():
    found, [call] = drive(flows.budgets("math", patience()), [reply(200, {"data": [budget()]})])
    assert ([one.id for one in found], call.query) == (["bud-1"], {"pool": "math"})
    flow = flows.close_budget("bud-1", patience())
    found, [call] = drive(flow, [reply(200, budget("closed", 4))])
    assert (found.used, call.method, call.path) == (4, "POST", "/rollouts/budget/bud-1/close")
    with pytest.raises(InvalidRequest, match="no budget's id"):
        drive(flows.close_budget("../x", patience()), [])


# --- both clients


def test_both_clients_have_the_same_calls():
    def calls(kind: type) -> dict[str, str]:
        return {
            name: str(inspect.signature(value)).split(" -> ")[0]
            for name, value in vars(kind).items()
            if callable(value) and not name.startswith("_")
        }

    assert calls(Client) == calls(AsyncClient)


def test_a_call_without_a_server_goes_through_httpx_once_and_is_retried():
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if len(seen) == 1:
            return failed(EngineUnavailable("loading"))
        return httpx.Response(202, json=SUBMITTED)

    http = httpx.Client(transport=httpx.MockTransport(handle))
    client = Client(URL, api_key="secret", http=http)
    client._calls.patience = lambda: Patience(URL, 120.0, has_answered=True)  # type: ignore[method-assign]
    assert client.submit("Hi", samples=2, tools=[]).rollout_ids == ["ro-1"]
    assert [str(request.url) for request in seen] == [f"{URL}/rollouts"] * 2
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert msgspec.json.decode(seen[0].content) == {
        "prompt": "Hi",
        "samples": 2,
        "priority": 0,
        "tools": [],
    }


def summaries(ids: range, cursor: str | None) -> httpx.Response:
    fields = {"group_id": "g", "index": 0, "pool": "", "state": "finished", "created_s": 0.0}
    fields |= {"ended_s": 1.0, "num_output_tokens": 1, "is_acked": False}
    data = [{"id": f"ro-{i}", **fields} for i in ids]
    return httpx.Response(200, json={"data": data, "next_cursor": cursor})


def test_lists_are_read_page_by_page():
    asked: list[dict[str, str]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(dict(request.url.params))
        return summaries(range(2), "2") if len(asked) % 2 else summaries(range(2, 3), None)

    async def listed() -> list[str]:
        http = httpx.AsyncClient(transport=httpx.MockTransport(handle))
        async with http, AsyncClient(URL, http=http) as client:
            return [one.id async for one in client.list(pool="p", state="finished")]

    with (
        httpx.Client(transport=httpx.MockTransport(handle)) as http,
        Client(URL, http=http) as client,
    ):
        found = [one.id for one in client.list(pool="p", state="finished")]
    assert found == asyncio.run(listed()) == ["ro-0", "ro-1", "ro-2"]
    query = {"pool": "p", "state": "finished", "limit": "500"}
    assert asked == [query, {**query, "cursor": "2"}] * 2


def test_a_cancelled_wait_leaves_no_task_behind():
    async def work() -> None:
        async def handle(_: httpx.Request) -> httpx.Response:
            await asyncio.sleep(3600)
            return packed("queued")

        http = httpx.AsyncClient(transport=httpx.MockTransport(handle))
        async with AsyncClient(URL, http=http) as client:
            task = asyncio.create_task(client.wait("ro-1"))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await http.aclose()

    asyncio.run(work())
