"""/v1 on the wire: every fault is a 400 that names its field, every extra does what it says."""

import base64
import gzip
import math
import threading

import pytest

from everstep.engine.errors import ConfigError
from everstep.engine.tokenizer import Tokenizer
from everstep.server.config import HttpConfig, ServeConfig

from .conftest import TOKENIZER, serve

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
BASE = {CHAT: {"messages": HI}, TEXT: {"prompt": "Hi"}}

BOTH = [
    ("temperature", [-0.1, 101, "1", True, [], 1e-9]),
    ("top_p", [0, 1.1, "a"]),
    ("top_k", [-2, 1.5, "a"]),
    ("min_p", [-0.1, 1.1]),
    ("presence_penalty", [-2.1, 2.1]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("repetition_penalty", [0, -1, 101, 1e-300, 0.009]),
    ("logit_bias", [[], {"a": 1}, {"5": 101}, {"5": "x"}, {"-1": 0}, {"9999": 1}]),
    ("seed", [1.5, "a", 2**63, -(2**63) - 1]),
    ("min_tokens", [-1, "a", 500]),
    ("stop", [1, "", [""], ["a", 1], ["a"] * 65, "a" * 8193, ["ab" * 2049] * 2]),
    ("stop_token_ids", ["a", [-1], ["a"], [9999]]),
    ("include_stop_str_in_output", ["yes", 1]),
    ("ignore_eos", [1]),
    ("skip_special_tokens", [0]),
    ("n", [0, -1, 1.5, "1", 1025, 5000, True]),
    ("stream", ["true", 1]),
    ("stream_options", [True, {"include_usage": 1}, {"include_usage": True}]),
    ("prompt_logprobs", [-1, 65, True]),
    ("logprobs_mode", ["processed", 1]),
    ("truncate_prompt_tokens", [-2, "a", 0]),
    ("return_token_ids", [1]),
    ("record", ["entropy", ["x"], 1]),
    ("priority", ["high", 1.5]),
    ("user", [1]),
    ("metadata", ["a", 1]),
    ("model", [1]),
    ("response_format", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, "x"]),
    ("structured_outputs", [{"regex": "a"}]),
    ("guided_json", [{"type": "object"}]),
    ("guided_regex", ["a"]),
    ("guided_choice", [["a"]]),
    ("guided_grammar", ["a"]),
    ("regex", ["a"]),
    ("ebnf", ["a"]),
    ("json_schema", ["{}"]),
    ("allowed_token_ids", [[1]]),
    ("bad_words", [["a"]]),
    ("use_beam_search", [True]),
    ("lora_path", ["a"]),
    ("modalities", [["audio"], ["text", "audio"], "text", 1]),
    ("sampling_seed", [5]),
    ("max_tokens", [10**12]),
    ("chat_template", ["{{ 1 }}"]),
]
TEXT_ONLY = [
    ("prompt", [None, 1, [], "", [[]], ["a", 1], [[1], "a"], [-1], [9999], [1.5], [True], {}]),
    ("max_tokens", [0, -1, "a", 1.5, 600]),
    ("best_of", [0, 2, "a"]),
    ("echo", ["yes"]),
    ("logprobs", [-1, 65, True, "a"]),
    ("suffix", ["a"]),
    ("prompt", ["long " * 60_000, ["a", "long " * 60_000]]),
    ("add_special_tokens", [1]),
]
CHAT_ONLY = [
    (
        "messages",
        [
            None,
            [],
            "a",
            [{"role": "user", "content": 1}],
            [{"content": "a"}],
            [{"role": "x", "content": "a"}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            [{"role": "user", "content": [{"type": "text"}]}],
            [{"role": "assistant", "tool_calls": [{"id": "a"}]}],
            [{"role": "user", "content": "long " * 600}],
            [{"role": "user", "content": "long " * 60_000}],
            [{"role": "user"}],
            [{"role": "user", "content": None}],
            [{"role": "user", "content": []}],
            [{"role": "user", "contents": "a"}],
            [{"role": "system"}],
            [{"role": "tool", "tool_call_id": "a"}],
            [{"role": "assistant"}],
        ],
    ),
    ("max_tokens", [0, -1, "a", 600]),
    ("max_completion_tokens", [0, -1, "a", 600]),
    ("logprobs", [1, "a"]),
    ("top_logprobs", [-1, 21, 3, True]),
    ("tools", ["a", [1], [{"type": "x"}], [{"function": {}}], [{"function": {"name": ""}}]]),
    ("tool_choice", ["required", "any", {"type": "function", "function": {"name": "f"}}, 1]),
    ("chat_template_kwargs", ["a", {"messages": []}, {"bos_token": "x"}, {"chat_template": "x"}]),
    ("continue_final_message", ["a", 1]),
    ("add_generation_prompt", ["a"]),
    ("documents", ["a", [1]]),
    ("reasoning_effort", [1]),
    ("input_ids", [[1]]),
    ("echo", [True]),
    ("parallel_tool_calls", ["no", 0]),
]
TABLE = [
    (path, name, value)
    for path, rows in (
        (TEXT, BOTH + TEXT_ONLY),
        (CHAT, BOTH + CHAT_ONLY),
    )
    for name, values in rows
    for value in values
]


async def test_every_bad_value_is_a_400_that_names_its_field(server):
    wrong = []
    for path, name, value in TABLE:
        response = await server.post(path, **{**BASE[path], name: value})
        error = response.json().get("error", {})
        param = str(error.get("param"))
        is_named = param == name or param.startswith((f"{name}.", f"{name}["))
        if response.status_code != 400 or not is_named or name not in error["message"]:
            wrong.append((path, name, value, response.status_code, error))
    assert not wrong
    # nothing of all this has reached the core
    assert server.backend.adds == []


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("temperature", 101, "from 0 to 100, got 101"),
        ("n", 0, "an integer from 1 to 1024, got 0"),
        ("logit_bias", {"a": 1}, 'an object with token ids for keys, got {"a":1}'),
        ("logprobs_mode", "x", "'raw', 'sampled', 'temp'"),
        ("messages", [{"role": "x"}], "'assistant', 'developer', 'system', 'tool', 'user'"),
        ("response_format", {"type": "x"}, "not supported yet"),
        ("tool_choice", "required", "'auto' and 'none'"),
        ("max_tokens", 10**12, "<= 2147483647"),
        ("messages", [{"role": "assistant"}], "of the role 'assistant' without tool_calls"),
    ],
)
async def test_the_message_gives_the_accepted_values(server, name, value, accepted):
    response = await server.post(CHAT, **{**BASE[CHAT], name: value})
    assert accepted in response.json()["error"]["message"]


async def test_falsy_values_of_refused_fields_ask_for_nothing(server):
    body = {"guided_json": None, "regex": "", "use_beam_search": False, "suffix": None}
    response = await server.post(TEXT, prompt="Hi", response_format={"type": "text"}, **body)
    assert response.status_code == 200
    assert "x-everstep-ignored-fields" not in response.headers


async def test_unknown_fields_are_accepted_and_named(server):
    body = {**BASE[CHAT], "store": True, "weird näme\r\n": 1, "modalities": ["text"]}
    for stream in (False, True):
        response = await server.post(CHAT, **body, stream=stream)
        assert response.status_code == 200
        names = response.headers["x-everstep-ignored-fields"]
        assert names == "store,weird%20n%C3%A4me%0D%0A"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "JSON object"),
        (b'{"prompt": NaN}', "not JSON"),
        (b"[" * 100_000, "nested"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b'{"prompt": "\\ud800"}', ""),
    ],
)
async def test_broken_bodies_are_400(server, body, words):
    response = await server.http.post(TEXT, content=body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_packed_body_is_415(server):
    for path in (TEXT, "/rollouts"):
        body = gzip.compress(b'{"prompt": "Hi"}')
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        response = await server.http.post(path, content=body, headers=headers)
        assert response.status_code == 415
        assert "gzip" in response.json()["error"]["message"]
    assert server.backend.adds == []


async def test_a_body_too_large_is_413_declared_or_not(anyio_backend):
    async with serve(http={"max_body_bytes": 2000}) as server:

        async def chunks():
            for _ in range(10):
                yield b" " * 1000

        for content in (b" " * 2001, chunks()):
            response = await server.http.post(TEXT, content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        assert (await server.post(TEXT, prompt="Hi")).status_code == 200


async def test_unknown_routes_and_methods_answer_in_the_same_shape(server):
    missing = await server.http.get("/v1/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"
    wrong = await server.http.get(TEXT)
    assert wrong.status_code == 405
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


async def test_request_ids_are_echoed_or_made(server):
    for headers, is_kept in ({"x-request-id": "mine-1"}, True), ({"x-request-id": "a b"}, False):
        response = await server.http.get("/v1/models", headers=headers)
        assert (response.headers["x-request-id"] == headers["x-request-id"]) is is_kept
        assert response.headers["x-request-id"]


async def test_defaults_are_16_tokens_for_text_and_the_context_for_chat(server):
    await server.post(TEXT, prompt="Hi")
    await server.post(CHAT, messages=HI)
    await server.post(CHAT, messages=HI, max_tokens=9, max_completion_tokens=5)
    text, chat, both = server.backend.adds
    assert text.max_tokens == 16
    assert chat.max_tokens == 512 - len(chat.prompt_ids)
    assert both.max_tokens == 5


async def test_parameters_reach_the_core_as_sent(server):
    await server.post(
        TEXT,
        prompt="Hi",
        temperature=0.5,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        min_tokens=2,
        stop="x",
        stop_token_ids=[9],
        logit_bias={"7": -100},
        no_stop_trim=True,
        ignore_eos=True,
        priority=3,
        user="me",
        seed=-5,
    )
    add = server.backend.adds[0]
    s = add.sampling
    assert (s.temperature, s.top_k, s.min_p, s.repetition_penalty) == (0.5, 5, 0.1, 1.1)
    assert (s.stop, s.stop_token_ids, s.logit_bias) == (("x",), (9,), {7: -100.0})
    assert (s.include_stop_str_in_output, s.ignore_eos, s.min_tokens) == (True, True, 2)
    assert (add.priority, add.client, add.seed, add.stop_ids) == (3, "me", -5, [9])


async def test_the_same_prompt_twice_never_samples_twice_the_same(server):
    await server.post(TEXT, prompt=["a", "b", "a"], seed=1)
    await server.post(TEXT, prompt="a", seed=1, n=2)
    a, b, again, first, second = (add.seed for add in server.backend.adds)
    assert a == b == 1
    assert again != a
    assert first != second


async def test_ids_are_returned_on_request_whole_and_streamed(server):
    ids = server.replies[0]
    body = (await server.post(CHAT, messages=HI, return_token_ids=True)).json()
    prompt_ids = server.backend.adds[0].prompt_ids
    assert body["choices"][0]["token_ids"] == ids
    assert body["choices"][0]["prompt_token_ids"] == body["prompt_token_ids"] == prompt_ids
    chunks = await server.events(CHAT, messages=HI, return_token_ids=True)
    streamed = [i for c in chunks for i in c["choices"][0].get("token_ids", [])]
    assert streamed == ids
    assert chunks[0]["prompt_token_ids"] == prompt_ids
    chunks = await server.events(TEXT, prompt="Hi", return_token_ids=True)
    assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == ids
    assert "token_ids" not in (await server.post(TEXT, prompt="Hi")).json()["choices"][0]


async def test_tokens_as_ids_and_prompt_logprobs(server):
    body = (
        await server.post(
            TEXT,
            prompt=[5, 3],
            logprobs=1,
            return_tokens_as_token_ids=True,
            prompt_logprobs=2,
        )
    ).json()
    choice = body["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in server.replies[0]]
    lp = server.backend.lp
    assert choice["prompt_logprobs"] == [
        None,
        {
            "2": {"logprob": lp(2), "rank": 1, "decoded_token": "token_id:2"},
            "3": {"logprob": lp(3), "rank": 2, "decoded_token": "token_id:3"},
        },
    ]


@pytest.mark.parametrize(("mode", "share"), [("raw", 1), ("temp", 2), ("sampled", 4)])
async def test_the_mode_says_which_distribution_logprobs_are_of(server, mode, share):
    body = (await server.post(TEXT, prompt="Hi", logprobs=0, logprobs_mode=mode)).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [server.backend.lp(i) / share for i in server.replies[0]]
    assert [len(top) for top in logprobs["top_logprobs"]] == [1] * len(server.replies[0])


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e30])
async def test_logprobs_are_never_null_or_infinite(server, value):
    server.backend.lp = lambda token_id: value
    body = (await server.post(TEXT, prompt="Hi", logprobs=2, echo=True, record=["lp_raw"])).json()
    choice = body["choices"][0]
    assert set(choice["logprobs"]["token_logprobs"][1:]) == {-9999.0}
    assert all(set(top.values()) == {-9999.0} for top in choice["logprobs"]["top_logprobs"][1:])
    assert set(choice["everstep"]["lp_raw"]) == {-9999.0}
    body = (await server.post(CHAT, messages=HI, logprobs=True, top_logprobs=1)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert {t["logprob"] for t in content} == {-9999.0}


async def test_the_extension_has_what_a_trainer_needs(server):
    record = ["entropy", "kept_ids", "routing"]
    body = (await server.post(CHAT, messages=HI, record=record, seed=3)).json()
    ids = server.replies[0]
    part = body["choices"][0]["everstep"]
    assert part["id"].startswith("ro-")
    assert part["seed"] == 3
    assert part["versions"] == [[7, len(ids)]]
    assert part["finish_reason"] == {"type": "stop", "matched": ids[-1]}
    lengths = {
        len(part[name]) for name in ("lp_sampled", "lp_temp", "kept_mass", "flags", "entropy")
    }
    assert lengths == {len(ids)}
    assert part["kept_ids"] == [[i] for i in ids]
    routing = part["routing"]
    num_rows = len(server.backend.adds[0].prompt_ids)
    assert routing["shape"] == [num_rows, 2, 2]
    assert base64.b64decode(routing["ids"]) == bytes(range(4)) * num_rows
    chunks = await server.events(TEXT, prompt="Hi", return_meta_info=True)
    assert chunks[-1]["choices"][0]["everstep"]["versions"] == [[7, len(ids)]]
    assert all("everstep" not in chunk["choices"][0] for chunk in chunks[:-1])


async def test_a_text_that_no_context_could_hold_is_not_encoded(server, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("it was encoded"))
    for path, body in (
        (TEXT, {"prompt": "a b " * 50_000}),
        (CHAT, {"messages": [{"role": "user", "content": "a b " * 50_000}]}),
    ):
        error = (await server.post(path, **body)).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == next(iter(body))


async def test_what_only_an_assistant_may_leave_out(server):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for said in ({"tool_calls": [call]}, {"reasoning_content": "so"}, {"content": ""}):
        messages = [*HI, {"role": "assistant", "content": None, **said}, *HI]
        assert (await server.post(CHAT, messages=messages)).status_code == 200


async def test_versions_and_fingerprint_of_every_answer(server):
    response = await server.post(CHAT, messages=HI)
    assert response.headers["x-everstep-versions"] == "7-7"
    assert response.json()["system_fingerprint"] == "fake@0123456789ab"


async def test_stop_strings_and_stop_tokens_say_what_matched(server):
    body = (await server.post(TEXT, prompt="Hi", stop=["wor", "zzz"])).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        "hello ",
        "stop",
        "wor",
    )
    body = (
        await server.post(TEXT, prompt="Hi", stop="wor", include_stop_str_in_output=True)
    ).json()
    assert body["choices"][0]["text"] == "hello wor"
    token = server.replies[0][1]
    body = (await server.post(TEXT, prompt="Hi", stop_token_ids=[token])).json()
    assert body["choices"][0]["stop_reason"] == token
    body = (await server.post(TEXT, prompt="Hi")).json()
    assert body["choices"][0]["stop_reason"] is None
    body = (await server.post(TEXT, prompt="Hi", max_tokens=1)).json()
    assert body["choices"][0]["finish_reason"] == "length"


async def test_a_prompt_can_be_scored_without_an_answer(server):
    body = (await server.post(TEXT, prompt="hello", echo=True, logprobs=0, max_tokens=0)).json()
    choice = body["choices"][0]
    assert choice["text"] == "hello"
    assert len(choice["logprobs"]["tokens"]) == len(TOKENIZER.encode("hello"))
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0


async def test_the_last_message_can_be_continued(server):
    messages = [*HI, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "continue_final_message": True}
    assert (await server.post(CHAT, **body)).status_code == 200
    text = TOKENIZER.decode(server.backend.adds[0].prompt_ids)
    assert text == "<role>USER</role>Hi<role>ASSISTANT</role>Well, "
    both = await server.post(CHAT, **body, add_generation_prompt=True)
    assert both.json()["error"]["param"] == "continue_final_message"


async def test_a_message_cut_inside_its_reasoning_goes_on_in_it(server):
    server.reply("more</think>done")
    messages = [*HI, {"role": "assistant", "content": "<think>some "}]
    body = await server.post(CHAT, messages=messages, continue_final_message=True)
    message = body.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("more", "done")


async def test_long_prompts_keep_their_end_on_request(server):
    await server.post(TEXT, prompt=[5] * 600 + [6], truncate_prompt_tokens=3)
    await server.post(TEXT, prompt=[5] * 600 + [6], truncate_prompt_tokens=-1, max_tokens=12)
    assert server.backend.adds[0].prompt_ids == [5, 5, 6]
    assert len(server.backend.adds[1].prompt_ids) == 500


async def test_many_long_texts_are_encoded_beside_the_event_loop_and_too_many_not_at_all(
    server, monkeypatch
):
    threads = []
    encode = Tokenizer.encode

    def spy(self, *arguments):
        threads.append(threading.current_thread())
        return encode(self, *arguments)

    monkeypatch.setattr(Tokenizer, "encode", spy)
    texts = ["a" * 15_000, "b" * 15_000]
    await server.post(TEXT, prompt=texts, truncate_prompt_tokens=2, max_tokens=1)
    error = (await server.post(TEXT, prompt=["a"] * 4097)).json()["error"]
    monkeypatch.undo()
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    assert [add.prompt_ids for add in server.backend.adds] == [
        TOKENIZER.encode(text)[-2:] for text in texts
    ]
    assert error["param"] == "n"
    assert "at most 4096" in error["message"]


async def test_without_a_tokenizer_ids_go_in_and_out(anyio_backend):
    async with serve(tokenizer=None) as server:
        ids = server.replies[0]
        choice = (await server.post(TEXT, prompt=[5, 6], logprobs=0)).json()["choices"][0]
        assert (choice["text"], choice["token_ids"]) == ("", ids)
        assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]
        chunks = await server.events(TEXT, prompt=[5, 6])
        assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == ids
        for path, name, body in [
            (TEXT, "prompt", {"prompt": "Hi"}),
            (CHAT, "messages", {"messages": HI}),
            (TEXT, "stop", {"prompt": [5], "stop": "x"}),
        ]:
            response = await server.post(path, **body)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == name
            assert "tokenizer" in response.json()["error"]["message"]


async def test_usage_on_every_chunk_counts_what_was_sent(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await server.events(CHAT, messages=HI, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == len(server.replies[0])


async def test_nothing_is_kept_once_the_answer_is_out(server):
    await server.post(TEXT, prompt=["a", "b"], n=2)
    await server.events(CHAT, messages=HI)
    bad = await server.post(TEXT, prompt=[[5], [9999]])
    assert bad.status_code == 400
    assert list(server.manager._holdings) == []
    assert server.manager.num_live == 0


async def test_a_rejected_rollout_is_an_error_not_an_answer(server):
    server.backend.reject = "prompt needs 99 blocks, this core has 10"
    for stream in (False, True):
        response = await server.post(TEXT, prompt="Hi", stream=stream)
        assert response.status_code == 500
        assert "99 blocks" in response.json()["error"]["message"]
        assert response.headers["x-should-retry"] == "false"


async def test_reasoning_can_be_on_or_off_for_all(anyio_backend):
    async with serve(reasoning="always") as server:
        message = (await server.post(CHAT, messages=HI)).json()["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("", "hello world")
    async with serve(reasoning="off") as server:
        server.reply("<think>a</think>b")
        message = (await server.post(CHAT, messages=HI)).json()["choices"][0]["message"]
        assert message["content"] == "<think>a</think>b"
        assert "reasoning_content" not in message


async def test_names_of_the_model(anyio_backend):
    async with serve(served_model_name=("ring", "gpt-4")) as server:
        listed = (await server.http.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["ring", "gpt-4"]
        assert listed[0]["max_model_len"] == 512
        body = (await server.post(TEXT, model="gpt-4", prompt="Hi")).json()
        assert body["model"] == "gpt-4"
        assert (await server.post(TEXT, prompt="Hi")).json()["model"] == "ring"
        assert (await server.post(TEXT, model="org/ring", prompt="Hi")).status_code == 404


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_no_key(host):
    ServeConfig(http=HttpConfig(host=host)).check()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org"])
def test_other_machines_need_one(host):
    with pytest.raises(ConfigError, match="api_key"):
        ServeConfig(http=HttpConfig(host=host)).check()
    ServeConfig(http=HttpConfig(host=host, api_key="k")).check()
