"""/rollouts: every route, with what it should take and what it must refuse and leave unchanged."""

import asyncio
import json
import math

import msgspec
import pytest

from everstep.engine.config import JournalConfig
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.rollout import Rollout
from everstep.engine.trajectory import decode, encode, seal, unpack, unseal
from everstep.server.rollouts.wire import RolloutAnswer

from .conftest import EOS, TOKENIZER, call, serve
from .fake_backend import lp_of

pytestmark = pytest.mark.anyio
MSGPACK = {"accept": "application/msgpack"}
JSON = {"accept": "application/json"}
UNKNOWN = "ro-00000000000000000000000000000000"


def stepless(server) -> None:
    """No token until the gate is opened."""
    server.backend.gate.clear()


async def settle() -> None:
    """Until nothing moves that can, the journal's thread included."""
    for _ in range(20):
        await asyncio.sleep(0.001)


async def in_msgpack(server, rollout_id: str) -> Rollout:
    response = await server.http.get(f"/rollouts/{rollout_id}", headers=MSGPACK)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/msgpack"
    return unpack(decode(response.content))


# --- submit and get


async def test_a_prompt_is_answered_by_durable_rollouts_with_ids(durable):
    durable.reply("hello", "world")
    response = await durable.post(
        "/rollouts",
        prompt="Hi",
        samples=2,
        group_id="g/1",
        pool="train",
        priority=3,
        metadata={"answer": 42, "deep": [None, {"x": 1.0}]},
        sampling={"max_tokens": 9, "temperature": 0.5, "seed": 7, "stop": "never"},
    )
    assert response.status_code == 202
    body = response.json()
    assert body["group_id"] == "g/1"
    assert len(set(body["rollout_ids"])) == 2
    for index, (rollout_id, text) in enumerate(
        zip(body["rollout_ids"], ("hello", "world"), strict=True)
    ):
        rollout = await durable.ended(rollout_id)
        assert rollout["text"] == text
        assert (rollout["index"], rollout["group_id"], rollout["pool"]) == (index, "g/1", "train")
        assert rollout["metadata"] == {"answer": 42, "deep": [None, {"x": 1.0}]}
        assert rollout["sampling"]["temperature"] == 0.5
        assert rollout["sampling"]["stop"] == ["never"]
        assert rollout["max_tokens"] == 9
        assert rollout["finish_reason"] == {"type": "stop", "matched": TOKENIZER.token_id(EOS)}
        assert rollout["prompt_ids"] == TOKENIZER.encode("Hi")


async def test_values_per_token_are_aligned_and_the_same_in_json_and_msgpack(durable):
    durable.reply("hello world")
    [rollout_id] = await durable.submit(
        prompt="Hi",
        record=["lp_raw", "entropy", "kept_ids", "routing"],
        sampling={"prompt_logprobs": 2, "top_logprobs": 3},
    )
    as_json = await durable.ended(rollout_id)
    ids = as_json["output_ids"]
    assert as_json["lp_raw"] == [lp_of(token) for token in ids]
    assert as_json["lp_sampled"] == [lp_of(token) / 4 for token in ids]
    names = ("lp_temp", "kept_mass", "flags", "entropy", "kept_ids", "top")
    assert all(len(as_json[name]) == len(ids) for name in names)
    assert as_json["versions"] == [[7, len(ids)]]
    assert [s["digest"] for s in as_json["segments"]] == [durable.backend.ready.digest]
    assert as_json["prompt_lp"][0] is None
    assert len(as_json["prompt_lp"]) == len(as_json["prompt_top"]) == len(as_json["prompt_ids"])
    assert as_json["routing"]["shape"][1:] == [2, 2]
    usage = as_json["usage"]
    assert usage["total_tokens"] == len(as_json["prompt_ids"]) + len(ids)
    assert usage["cached_tokens"] == len(as_json["prompt_ids"]) // 2

    rollout = await in_msgpack(durable, rollout_id)
    for name in (
        "output_ids",
        "prompt_ids",
        "text",
        "lp_sampled",
        "kept_mass",
        "flags",
        "prompt_lp",
    ):
        assert getattr(rollout, name) == as_json[name], name
    assert [[list(pair) for pair in pairs] for pairs in rollout.top] == as_json["top"]
    assert rollout.is_durable


async def test_what_is_not_recorded_is_absent(durable):
    [rollout_id] = await durable.submit(prompt="Hi")
    found = await durable.ended(rollout_id)
    absent = {"lp_raw", "entropy", "kept_ids", "top", "prompt_lp", "prompt_top", "routing"}
    assert not absent & found.keys()


async def test_no_logprob_is_ever_null_or_nan(durable):
    """−inf of an alternative stands at the floor; JSON has no word for it."""
    durable.backend.lp = lambda token: -math.inf if token == 3 else lp_of(token)
    durable.reply("hello")
    [rollout_id] = await durable.submit(prompt="Hi", sampling={"top_logprobs": 3})
    found = await durable.ended(rollout_id)
    values = [value for pairs in found["top"] for _, value in pairs]
    assert min(values) == -9999.0
    assert all(isinstance(value, float) for value in values)


async def test_messages_go_through_the_template_as_in_chat(durable):
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    for extra in ({}, {"tools": tools}, {"chat_template_kwargs": {"think": True}}):
        await durable.post("/v1/chat/completions", messages=messages, **extra)
        [rollout_id] = await durable.submit(messages=messages, **extra)
        rollout = await durable.ended(rollout_id)
        assert rollout["prompt_ids"] == durable.backend.adds[-2].prompt_ids
    continued = [*messages, {"role": "assistant", "content": "because"}]
    [rollout_id] = await durable.submit(messages=continued, continue_final_message=True)
    rollout = await durable.ended(rollout_id)
    assert TOKENIZER.decode(rollout["prompt_ids"]).endswith("because")


async def test_a_body_in_msgpack_is_the_same_request(durable):
    body = {"prompt_ids": [5, 6, 7], "samples": 2, "sampling": {"logit_bias": {7: 1.0}}}
    response = await durable.http.post(
        "/rollouts",
        content=msgspec.msgpack.encode(body),
        headers={"content-type": "application/msgpack", **MSGPACK},
    )
    assert response.status_code == 202
    accepted = msgspec.msgpack.decode(response.content)
    assert (await durable.ended(accepted["rollout_ids"][1]))["prompt_ids"] == [5, 6, 7]


BAD = [
    ({}, "prompt"),
    ({"prompt": "Hi", "prompt_ids": [1]}, "prompt"),
    ({"prompt": "Hi", "messages": [{"role": "user", "content": "a"}]}, "messages"),
    ({"prompt": ""}, "prompt"),
    ({"prompt_ids": [9999]}, "prompt_ids"),
    ({"prompt_ids": [1] * 600}, "prompt_ids"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
    ({"prompt": "Hi", "samples": 0}, "samples"),
    ({"prompt": "Hi", "smaples": 2}, "smaples"),
    ({"prompt": "Hi", "sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
    ({"prompt": "Hi", "sampling": {"max_tokens": 600}}, "sampling.max_tokens"),
    ({"prompt": "Hi", "sampling": {"maxtokens": 6}}, "sampling.maxtokens"),
    ({"prompt": "Hi", "sampling": {"temperature": 1e-9}}, "sampling.temperature"),
    ({"prompt": "Hi", "sampling": {"logit_bias": {"9999": 1}}}, "sampling.logit_bias"),
    ({"prompt": "Hi", "sampling": {"stop": ["a"] * 65}}, "sampling.stop"),
    ({"prompt": "Hi", "metadata": 2**64}, "metadata"),
    ({"prompt": "Hi", "metadata": "x" * 2**20}, "metadata"),
    ({"prompt": "Hi", "group_id": ""}, "group_id"),
    ({"prompt": "long " * 60_000}, "prompt"),
    ({"messages": [{"role": "user", "content": "long " * 60_000}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"prompt": "Hi", "model": "other"}, "model"),
    ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tools": 1}}, None),
]


@pytest.mark.parametrize(("body", "field"), BAD)
async def test_a_bad_submission_is_400_in_one_line_and_makes_nothing(durable, body, field):
    response = await durable.post("/rollouts", **body)
    assert response.status_code == (404 if field == "model" else 400)
    error = response.json()["error"]
    assert "\n" not in error["message"]
    if field is not None:
        assert error["param"] == field, error
    assert durable.backend.adds == []
    assert (await durable.http.get("/rollouts")).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "Hi", "max_tokens": 3}, "did you mean sampling.max_tokens?"),
        ({"prompt": "Hi", "smaples": 3}, "did you mean samples?"),
        ({"prompt": "Hi", "group_id": "a b"}, "at most 128 printable ASCII characters"),
        ({"prompt": "Hi", "pool": "a b"}, "at most 128 printable ASCII characters"),
    ],
)
async def test_a_refusal_says_what_was_meant(durable, body, words):
    response = await durable.post("/rollouts", **body)
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"", "application/msgpack", 400),
        (b"\xc1", "application/msgpack", 400),
        (b"\x81\xa6prompt", "application/msgpack", 400),
        (b"\x81\x01\x02", "application/msgpack", 400),
        (b"\x91" * 100_000, "application/msgpack", 400),
        (b"\x82\xa6prompt\xa1a\xa8metadata\xc7\x01\x05a", "application/msgpack", 400),
        (b"\x82\xa6prompt\xa1a\xa8metadata\xd6\xff\0\0\0\1", "application/msgpack", 400),
        (b"\x81\xa6prompt\xc4\x01a", "application/msgpack", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', "application/octet-stream", 415),
    ],
)
async def test_a_body_that_cannot_be_read_makes_nothing(durable, content, kind, status):
    headers = {"content-type": kind, "idempotency-key": "k"}
    response = await durable.http.post("/rollouts", content=content, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert durable.backend.adds == []


async def test_a_body_that_is_too_large_is_413(anyio_backend):
    async with serve(journal=MemoryJournal(), http={"max_body_bytes": 1024}) as server:
        for path in ("/rollouts", "/rollouts/import", f"/rollouts/{UNKNOWN}/fork"):
            response = await server.post(path, prompt="x" * 2000)
            assert response.status_code == 413, path
        assert server.backend.adds == []


async def test_an_answer_that_cannot_be_given_is_406_before_anything_is_done(durable):
    response = await durable.http.post(
        "/rollouts", json={"prompt": "Hi"}, headers={"accept": "text/html"}
    )
    assert response.status_code == 406
    assert durable.backend.adds == []


async def test_rollouts_ask_for_the_key_as_v1_does(anyio_backend):
    async with serve(journal=MemoryJournal(), http={"api_key": "secret"}) as server:
        for path in ("/rollouts", f"/rollouts/{UNKNOWN}", f"/rollouts/{UNKNOWN}/stream"):
            assert (await server.http.get(path)).status_code == 401
        assert (await server.post("/rollouts", prompt="Hi")).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert (await server.http.get("/rollouts", headers=headers)).status_code == 200


async def test_without_a_journal_submissions_are_503_with_the_reason(server):
    response = await server.post("/rollouts", prompt="Hi")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "journal_error"
    assert server.backend.adds == []
    # and what needs no journal goes on
    assert (await server.post("/v1/completions", prompt="Hi")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("GET", "/stream"),
        ("GET", "/export"),
        ("POST", "/export"),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("POST", "/cancel"),
        ("POST", "/ack"),
        ("POST", "/fork"),
    ],
)
async def test_an_unknown_id_is_404(durable, method, path):
    body = {"at": 0} if path == "/fork" else None
    response = await durable.http.request(method, f"/rollouts/{UNKNOWN}{path}", json=body)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "rollout_not_found"
    assert UNKNOWN in error["message"]


@pytest.mark.parametrize(
    ("path", "query", "field"),
    [
        ("/rollouts/x", "wait=-1", "wait"),
        ("/rollouts/x", "wait=nan", "wait"),
        ("/rollouts/x", "wait=inf", "wait"),
        ("/rollouts/x", "wait=soon", "wait"),
        ("/rollouts/x", "wait=1&after=-1", "after"),
        ("/rollouts/x", "wait=1&after=1.5", "after"),
        ("/rollouts/x", "wait=1&after=99999999999999999999999", "after"),
        ("/rollouts/x", "after=1", "after"),
        ("/rollouts/x", "wiat=1", "wiat"),
        ("/rollouts/x/stream", "after=a", "after"),
        ("/rollouts/x/stream", "wait=1", "wait"),
        ("/rollouts", "state=done", "state"),
        ("/rollouts", "limit=0", "limit"),
        ("/rollouts", "limit=100000", "limit"),
        ("/rollouts", "cursor=x", "cursor"),
        ("/rollouts", "cursor=%D9%A3", "cursor"),
        ("/rollouts", "groop=x", "groop"),
    ],
)
async def test_a_bad_query_is_400_and_named(durable, path, query, field):
    response = await durable.http.get(f"{path}?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


# --- long poll


async def test_a_long_poll_answers_when_there_is_more_than_after(durable):
    durable.reply("hello world")
    stepless(durable)
    [rollout_id] = await durable.submit(prompt="Hi")
    url = f"/rollouts/{rollout_id}"
    now = (await durable.http.get(url, params={"wait": 0})).json()
    assert now["output_ids"] == []
    poll = asyncio.create_task(durable.http.get(url, params={"wait": 30, "after": 0}))
    await settle()
    assert not poll.done()
    durable.backend.gate.set()
    found = (await asyncio.wait_for(poll, 10)).json()
    assert len(found["output_ids"]) > 0
    whole = await durable.ended(rollout_id)
    assert whole["output_ids"][: len(found["output_ids"])] == found["output_ids"]
    # an ended one answers at once, whatever `after` is
    late = (await durable.http.get(url, params={"wait": 30, "after": 10**6})).json()
    assert late == whole


async def test_a_long_poll_ends_when_its_time_is_up(durable):
    stepless(durable)
    [rollout_id] = await durable.submit(prompt="Hi")
    response = await durable.http.get(f"/rollouts/{rollout_id}", params={"wait": 0.01})
    assert response.status_code == 200
    assert response.json()["finish_reason"] is None


# --- stream


def events_of(text: str) -> list[dict]:
    """The data of a stream's events; each id line must be the event's end."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if line and line[0] != ":")
        if "data" in lines:
            found.append(json.loads(lines["data"]))
            assert lines["id"] == str(found[-1]["end"])
    return found


async def streamed(server, rollout_id: str, after: int | None = None, **headers: str) -> list[dict]:
    params = {} if after is None else {"after": after}
    response = await server.http.get(
        f"/rollouts/{rollout_id}/stream", params=params, headers=headers
    )
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_of(response.text)


def joined(events: list[dict]) -> dict:
    """What a reader holds after these events."""
    whole: dict = {"text": ""}
    for name in ("output_ids", "lp_sampled", "lp_temp", "kept_mass"):
        whole[name] = [value for event in events for value in event[name]]
    whole["text"] = "".join(event["text"] for event in events)
    return whole


async def test_a_stream_gives_every_token_once_with_its_three_values(durable):
    durable.reply("hello 😀 world")
    [rollout_id] = await durable.submit(prompt="Hi")
    events = await streamed(durable, rollout_id)
    whole = await durable.ended(rollout_id)
    assert joined(events) == {name: whole[name] for name in joined(events)}
    assert [e["start"] for e in events] == [0, *[e["end"] for e in events[:-1]]]
    assert events[-1]["finish_reason"] == whole["finish_reason"]
    assert events[-1]["state"] == "finished"
    assert all(e["finish_reason"] is None for e in events[:-1])
    runs = [count for e in events for _, count in e["versions"]]
    assert sum(runs) == len(whole["output_ids"])


async def test_a_reader_that_comes_back_sees_the_rest_wherever_it_left(durable):
    durable.reply("hello 😀 because")
    [rollout_id] = await durable.submit(prompt="Hi", sampling={"stop": ["cause"]})
    whole = await durable.ended(rollout_id)
    assert whole["text"] == "hello 😀 be"
    num = len(whole["output_ids"])
    first = await streamed(durable, rollout_id)
    for after in range(num + 1):
        rest = await streamed(durable, rollout_id, after)
        assert joined(rest)["output_ids"] == whole["output_ids"][after:]
        assert whole["text"].endswith(joined(rest)["text"])
        by_header = await streamed(durable, rollout_id, 0, **{"last-event-id": str(after)})
        assert by_header == rest
    # text goes on where an uninterrupted reader was
    for count in range(len(first)):
        text = joined(first[:count])["text"]
        at = first[count - 1]["end"] if count else 0
        assert text + joined(await streamed(durable, rollout_id, at))["text"] == whole["text"]
    response = await durable.http.get(f"/rollouts/{rollout_id}/stream", params={"after": num + 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "after"


async def test_a_reader_that_leaves_ends_nothing(durable):
    durable.replies[:] = [TOKENIZER.encode("a")]
    [rollout_id] = await durable.submit(prompt="Hi", sampling={"max_tokens": 300})
    request = call(durable.app, f"/rollouts/{rollout_id}/stream", {}, window=1, method="GET")
    await settle()
    request.leave()
    await asyncio.wait_for(request.task, 10)
    assert (await durable.ended(rollout_id))["finish_reason"] == {"type": "length"}


async def test_a_head_of_a_stream_does_not_wait_for_its_end(durable):
    durable.backend.gate.clear()
    [rollout_id] = await durable.submit(prompt="Hi")
    asked = durable.http.head(f"/rollouts/{rollout_id}/stream")
    response = await asyncio.wait_for(asked, 10)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (await durable.http.head(f"/rollouts/{UNKNOWN}/stream")).status_code == 404


async def test_a_failure_is_the_last_event_of_its_rollout(durable):
    durable.reply("hello world because")
    durable.backend.fail_at = (2, "nonfinite: step 12, layer 3")
    [rollout_id] = await durable.submit(prompt="Hi")
    events = await streamed(durable, rollout_id)
    assert events[-1]["state"] == "failed"
    assert events[-1]["finish_reason"]["detail"] == "nonfinite: step 12, layer 3"
    assert len(joined(events)["output_ids"]) == 2


async def test_a_server_that_goes_says_so_to_those_who_read(durable):
    durable.backend.gate.clear()
    [rollout_id] = await durable.submit(prompt="Hi")
    stream = asyncio.create_task(durable.http.get(f"/rollouts/{rollout_id}/stream"))
    poll = asyncio.create_task(durable.http.get(f"/rollouts/{rollout_id}", params={"wait": 60}))
    await settle()
    durable.manager.drain()
    answer = await asyncio.wait_for(poll, 10)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    body = (await asyncio.wait_for(stream, 10)).text
    name, data = body.split("\n\n")[-2].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "service_unavailable"


async def test_a_full_journal_refuses_what_is_new_until_something_is_acknowledged(anyio_backend):
    journal = MemoryJournal(JournalConfig(max_bytes=2**20))
    async with serve(journal=journal) as server:
        for _ in range(3):
            ids = await server.submit(prompt="Hi", metadata="x" * 400_000)
            await server.ended(ids[0])
        refused = await server.keyed("/rollouts", "k", prompt="Hi")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "journal_full"
        assert int(refused.headers["retry-after"]) >= 1
        chat = await server.keyed("/v1/completions", "k", prompt="Hi")
        assert chat.status_code == 503
        # nothing that it holds is lost, and what needs no journal goes on
        listed = (await server.http.get("/rollouts")).json()["data"]
        assert len(listed) == 3
        assert (await server.post("/v1/completions", prompt="Hi")).status_code == 200
        assert (await server.post("/rollouts/ack", ids=[ids[0]])).status_code == 200
        assert (await server.keyed("/rollouts", "k", prompt="Hi")).status_code == 202


# --- list


async def test_the_list_pages_through_all_in_order(durable):
    ids = await durable.submit(prompt="Hi", samples=3, group_id="a", pool="p")
    ids += await durable.submit(prompt="Hi", samples=4, group_id="b")
    for rollout_id in ids:
        await durable.ended(rollout_id)

    async def all_of(**params) -> list[dict]:
        found, cursor = [], None
        while True:
            more = {"cursor": cursor} if cursor else {}
            page = (await durable.http.get("/rollouts", params={**params, **more})).json()
            found += page["data"]
            cursor = page["next_cursor"]
            if cursor is None:
                return found
            assert len(page["data"]) == params["limit"]

    for limit in (1, 2, 3, 7, 100):
        assert [one["id"] for one in await all_of(limit=limit)] == ids
    assert [one["id"] for one in await all_of(limit=2, group="b")] == ids[3:]
    assert [one["id"] for one in await all_of(limit=2, pool="p")] == ids[:3]
    assert [one["id"] for one in await all_of(limit=2, state="finished")] == ids
    assert await all_of(limit=2, state="running") == []
    [first, *_] = await all_of(limit=100)
    rollout = await durable.ended(ids[0])
    assert first["num_output_tokens"] == len(rollout["output_ids"])
    assert (first["state"], first["pool"], first["is_acked"]) == ("finished", "p", False)


# --- pause, resume, cancel, ack


async def control(server, verb: str, rollout_id: str | None = None, **body) -> list[str]:
    path = f"/rollouts/{verb}" if rollout_id is None else f"/rollouts/{rollout_id}/{verb}"
    response = await server.post(path, **body)
    assert response.status_code == 200, response.text
    return response.json()["rollout_ids"]


async def test_pause_and_resume_by_id_group_and_all(durable):
    durable.replies[:] = [TOKENIZER.encode("a")]
    stepless(durable)
    one = await durable.submit(prompt="Hi", samples=2, group_id="one", sampling={"max_tokens": 5})
    two = await durable.submit(prompt="Hi", samples=2, group_id="two", sampling={"max_tokens": 5})

    assert await control(durable, "pause", one[0]) == [one[0]]
    assert await control(durable, "pause", one[0]) == [one[0]]
    await settle()
    assert durable.backend.paused == {one[0]}
    assert await control(durable, "pause", group="two") == two
    await settle()
    assert durable.backend.paused == {one[0], *two}
    assert await control(durable, "resume", ids=[two[1]]) == [two[1]]
    assert await control(durable, "pause", all=True) == [*one, *two]
    late = await durable.submit(prompt="Hi", sampling={"max_tokens": 5})
    await settle()
    assert durable.backend.paused == {*one, *two, *late}
    durable.backend.gate.set()
    await settle()
    assert (await durable.http.get(f"/rollouts/{one[0]}")).json()["state"] == "paused"
    assert await control(durable, "resume", all=True) == [*one, *two, *late]
    for rollout_id in (*one, *two, *late):
        assert len((await durable.ended(rollout_id))["output_ids"]) == 5


async def test_cancel_keeps_the_tokens_and_is_idempotent(durable):
    durable.replies[:] = [TOKENIZER.encode("a")]
    durable.backend.step_s = 0.005
    ids = await durable.submit(prompt="Hi", samples=2, sampling={"max_tokens": 400})
    await durable.http.get(f"/rollouts/{ids[0]}", params={"wait": 10, "after": 2})
    assert await control(durable, "cancel", ids[0]) == [ids[0]]
    ended = await durable.ended(ids[0])
    assert ended["state"] == "aborted"
    assert ended["finish_reason"] == {"type": "abort"}
    assert len(ended["output_ids"]) >= 2
    again = await control(durable, "cancel", ids[0])
    assert set(again) <= {ids[0]}
    assert await durable.ended(ids[0]) == ended
    [other] = await durable.submit(prompt="Hi", sampling={"max_tokens": 400})
    await control(durable, "pause", other)
    await control(durable, "cancel", all=True)
    assert (await durable.ended(other))["state"] == "aborted"


async def test_ack_of_what_has_ended_and_only_of_that(durable):
    stepless(durable)
    ids = await durable.submit(prompt="Hi", samples=2, group_id="g")
    response = await durable.post(f"/rollouts/{ids[0]}/ack")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "illegal_state"
    assert (await durable.post("/rollouts/ack", ids=ids)).status_code == 409
    durable.backend.gate.set()
    for rollout_id in ids:
        await durable.ended(rollout_id)
    assert await control(durable, "ack", ids[0]) == [ids[0]]
    assert await control(durable, "ack", ids[0]) == [ids[0]]
    gone = await durable.http.get(f"/rollouts/{ids[0]}")
    assert gone.status_code == 404
    assert "acknowledged" in gone.json()["error"]["message"]
    assert await control(durable, "ack", group="g") == [ids[1]]
    listed = (await durable.http.get("/rollouts", params={"group": "g"})).json()["data"]
    assert all(one["is_acked"] for one in listed)


async def test_resume_of_an_ended_one_is_409_and_changes_nothing(durable):
    [rollout_id] = await durable.submit(prompt="Hi")
    ended = await durable.ended(rollout_id)
    response = await durable.post(f"/rollouts/{rollout_id}/resume")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "illegal_state"
    assert await durable.ended(rollout_id) == ended


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel", "ack"])
async def test_a_bulk_call_with_one_unknown_id_does_nothing(durable, verb):
    durable.replies[:] = [TOKENIZER.encode("a")]
    stepless(durable)
    ids = await durable.submit(prompt="Hi", samples=2)
    for body in ({"ids": [UNKNOWN, ids[0]]}, {"group": "no-such"}):
        response = await durable.post(f"/rollouts/{verb}", **body)
        assert response.status_code == 404, body
    await settle()
    assert durable.backend.paused == set()
    assert durable.manager.num_live == 2


@pytest.mark.parametrize(
    "body",
    [{}, {"ids": []}, {"ids": ["a"], "all": True}, {"all": False}, {"grup": "a"}, {"ids": 1}],
)
async def test_a_bulk_call_names_exactly_one_kind(durable, body):
    for verb in ("pause", "resume", "cancel", "ack"):
        assert (await durable.post(f"/rollouts/{verb}", **body)).status_code == 400


async def test_a_single_call_takes_no_field(durable):
    [rollout_id] = await durable.submit(prompt="Hi")
    response = await durable.post(f"/rollouts/{rollout_id}/cancel", force=True)
    assert response.status_code == 400
    assert (await durable.http.post(f"/rollouts/{rollout_id}/cancel")).status_code == 200


# --- fork


async def test_a_fork_begins_with_the_tokens_up_to_its_point(durable):
    durable.reply("hello world")
    [rollout_id] = await durable.submit(prompt="Hi", metadata={"k": 1})
    parent = await durable.ended(rollout_id)
    response = await durable.post(f"/rollouts/{rollout_id}/fork", at=2, samples=3)
    assert response.status_code == 202
    ids = response.json()["rollout_ids"]
    assert len(ids) == 3
    for index, fork_id in enumerate(ids):
        fork = await durable.ended(fork_id)
        assert fork["output_ids"][:2] == parent["output_ids"][:2]
        assert fork["lp_sampled"][:2] == parent["lp_sampled"][:2]
        assert fork["forked_from"] == [rollout_id, 2]
        assert fork["index"] == index
        assert fork["metadata"] == {"k": 1}
    assert len({(await durable.ended(fork_id))["seed"] for fork_id in ids}) == 3
    named = await durable.post(f"/rollouts/{rollout_id}/fork", at=2, pool="math")
    [forked] = named.json()["rollout_ids"]
    assert [(await durable.ended(i))["pool"] for i in (ids[0], forked)] == ["", "math"]
    [twin] = (await durable.post(f"/rollouts/{rollout_id}/fork", at=0)).json()["rollout_ids"]
    assert (await durable.ended(twin))["seed"] == parent["seed"]


@pytest.mark.parametrize(
    "body", [{}, {"at": -1}, {"at": 10**6}, {"at": "1"}, {"at": 1, "samples": 0}, {"at": 1, "n": 2}]
)
async def test_a_bad_fork_is_400_and_makes_nothing(durable, body):
    [rollout_id] = await durable.submit(prompt="Hi")
    await durable.ended(rollout_id)
    response = await durable.post(f"/rollouts/{rollout_id}/fork", **body)
    assert response.status_code == 400
    assert len((await durable.http.get("/rollouts")).json()["data"]) == 1


# --- export and import

FORMS = [
    ({}, "application/octet-stream"),
    (MSGPACK, "application/msgpack"),
    (JSON, "application/json"),
]


async def exported(server, rollout_id: str, headers: dict) -> bytes:
    response = await server.http.get(f"/rollouts/{rollout_id}/export", headers=headers)
    assert response.status_code == 200, response.text
    return response.content


@pytest.mark.parametrize(("accept", "kind"), FORMS)
@pytest.mark.parametrize("is_live", [False, True])
async def test_an_export_goes_on_elsewhere_as_it_would_have_here(durable, accept, kind, is_live):
    durable.reply("hello world because")
    [rollout_id] = await durable.submit(
        prompt="Hi",
        record=["lp_raw", "routing"],
        sampling={"prompt_logprobs": 1},
        metadata=[1, "a"],
    )
    if is_live:
        durable.backend.fail_at = None
        await durable.post(f"/rollouts/{rollout_id}/pause")
    else:
        await durable.ended(rollout_id)
    data = await exported(durable, rollout_id, accept)
    if is_live:
        await durable.post(f"/rollouts/{rollout_id}/resume")
    whole = await durable.ended(rollout_id)
    async with serve(journal=MemoryJournal()) as other:
        other.reply("hello world because")
        response = await other.http.post(
            "/rollouts/import", content=data, headers={"content-type": kind}
        )
        assert response.status_code == 202, response.text
        assert response.json()["rollout_ids"] == [rollout_id]
        if is_live:
            await other.post(f"/rollouts/{rollout_id}/resume")
        there = await other.ended(rollout_id)
        fluid = {"created_s", "first_token_s", "ended_s", "segments", "num_preemptions"}
        same = whole.keys() - fluid
        assert {name: there[name] for name in same} == {name: whole[name] for name in same}
        # an id that is known is not taken twice
        again = await other.http.post(
            "/rollouts/import", content=data, headers={"content-type": kind}
        )
        assert again.status_code == 409
        assert again.json()["error"]["code"] == "conflict"
    # and the source is as it was
    assert await durable.ended(rollout_id) == whole


async def test_sealed_bytes_are_known_by_how_they_begin(durable):
    [rollout_id] = await durable.submit(prompt="Hi")
    await durable.ended(rollout_id)
    response = await durable.http.post(f"/rollouts/{rollout_id}/export")
    assert response.headers["content-disposition"] == f'attachment; filename="{rollout_id}.evst"'
    assert unseal(response.content).id == rollout_id
    async with serve(journal=MemoryJournal()) as other:
        sent = await other.http.post("/rollouts/import", content=response.content)
        assert sent.status_code == 202


async def test_cut_forged_and_foreign_exports_are_400_and_take_nothing_in(durable):
    durable.reply("hello world")
    [rollout_id] = await durable.submit(prompt="Hi")
    await durable.ended(rollout_id)
    data = await exported(durable, rollout_id, {})
    packed = await exported(durable, rollout_id, MSGPACK)
    text = await exported(durable, rollout_id, JSON)
    answer = json.loads(text)

    def forged(**changes) -> bytes:
        return json.dumps({**answer, **changes}).encode()

    bad = [
        *[(data[:cut], "application/octet-stream") for cut in range(0, len(data), 37)],
        *[
            (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "application/octet-stream")
            for at in range(0, len(data), 37)
        ],
        *[(packed[:cut], "application/msgpack") for cut in range(0, len(packed), 37)],
        (b"", "application/octet-stream"),
        (b"EVST", "application/octet-stream"),
        (b"PK\x03\x04" + data, "application/octet-stream"),
        (text[:-1], "application/json"),
        (b"{}", "application/json"),
        (b"[]", "application/json"),
        (forged(output_ids=answer["output_ids"][:-1]), "application/json"),
        (forged(lp_sampled=answer["lp_sampled"][:-1]), "application/json"),
        (forged(lp_sampled=[1e300] * len(answer["lp_sampled"])), "application/json"),
        (forged(versions=[[7, 10**12]]), "application/json"),
        (forged(versions=[[7, -1], [7, len(answer["output_ids"]) + 1]]), "application/json"),
        (forged(flags=[300] * len(answer["flags"])), "application/json"),
        (forged(prompt_ids=[2**40]), "application/json"),
        (forged(prompt_ids=[-1]), "application/json"),
        (forged(prompt_ids=[]), "application/json"),
        (
            forged(routing={"shape": [], "ids": "!", "ids_dtype": "", "weights": ""}),
            "application/json",
        ),
        (forged(state="done"), "application/json"),
        (forged(state="running"), "application/json"),
        (forged(text=answer["text"] + "x"), "application/json"),
        (forged(extra=1), "application/json"),
        (forged(sampling={"temperature": -1}), "application/json"),
        (forged(seed=2**70), "application/json"),
        (forged(id=""), "application/json"),
        (forged(max_tokens=10**6), "application/json"),
    ]
    async with serve(journal=MemoryJournal()) as other:
        for content, kind in bad:
            response = await other.http.post(
                "/rollouts/import", content=content, headers={"content-type": kind}
            )
            assert response.status_code == 400, (content[:80], kind, response.text)
            assert "\n" not in response.json()["error"]["message"]
        assert (await other.http.get("/rollouts")).json()["data"] == []
        assert other.backend.adds == []
        # and what was not touched is taken
        sent = await other.http.post("/rollouts/import", content=text)
        assert sent.status_code == 202, sent.text


async def test_another_model_or_vocabulary_is_409(durable):
    [rollout_id] = await durable.submit(prompt="Hi")
    await durable.ended(rollout_id)
    trajectory = unseal(await exported(durable, rollout_id, {}))
    async with serve(journal=MemoryJournal()) as other:
        for name, value in (("vocab_size", 1000), ("tokenizer", "f" * 32)):
            changed = msgspec.structs.replace(trajectory, **{name: value})
            response = await other.http.post("/rollouts/import", content=seal(changed))
            assert response.status_code == 409, name
        other.backend.ready.digest = "other weights"
    async with serve(journal=MemoryJournal(), digest="other-weights") as other:
        data = encode(trajectory)
        headers = {"content-type": "application/msgpack"}
        response = await other.http.post("/rollouts/import", content=data, headers=headers)
        assert response.status_code == 409
        allowed = await other.http.post(
            "/rollouts/import?allow_other_weights=true", content=data, headers=headers
        )
        assert allowed.status_code == 202


def test_the_json_of_a_rollout_is_described_by_its_struct():
    schema = msgspec.json.schema(RolloutAnswer)
    assert "lp_sampled" in json.dumps(schema)
