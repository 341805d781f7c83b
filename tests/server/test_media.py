"""Content-Type, Accept, names of fields, keys: what is read before anything is done."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from everstep.engine.errors import InvalidRequest
from everstep.server.decoding import decode_own, fields_of
from everstep.server.idempotency import request_key
from everstep.server.json_values import MAX_METADATA_BYTES, MAX_METADATA_DEPTH, check_metadata
from everstep.server.media import NotAcceptable, UnsupportedMedia, answer_media, body_media
from everstep.server.rollouts.wire import ForkRequest, Sampling, SubmitRequest


def request(path: str = "/rollouts", **headers: str) -> Request:
    pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": pairs,
        "server": ("test", 80),
        "scheme": "http",
    }
    return Request(scope)


@pytest.mark.parametrize(
    ("header", "media"),
    [
        ("application/json", "json"),
        ("application/json; charset=utf-8", "json"),
        ("APPLICATION/MSGPACK", "msgpack"),
        ("application/x-msgpack", "msgpack"),
        ("application/vnd.msgpack", "msgpack"),
        ("application/x-www-form-urlencoded", "json"),
        ("", "json"),
    ],
)
def test_a_body_is_what_its_content_type_says(header, media):
    assert body_media(request(content_type=header)) == media
    assert body_media(request()) == "json"


@pytest.mark.parametrize("header", ["text/plain", "application/octet-stream", "x", "\xe9"])
def test_a_body_of_another_type_is_415(header):
    with pytest.raises(UnsupportedMedia, match="application/json, application/msgpack"):
        body_media(request(content_type=header))


@pytest.mark.parametrize(
    ("header", "media"),
    [
        ("*/*", "json"),
        ("", "json"),
        ("application/*", "json"),
        ("application/msgpack", "msgpack"),
        ("application/x-msgpack, */*;q=0.1", "msgpack"),
        ("application/json;q=0.2, application/msgpack;q=0.9", "msgpack"),
        ("application/msgpack;q=0.2, application/json", "json"),
        ("application/json;q=0, */*", "msgpack"),
        ("text/html, application/xhtml+xml, */*;q=0.8", "json"),
    ],
)
def test_an_answer_is_what_is_wanted_most(header, media):
    assert answer_media(request(accept=header)) == media


@pytest.mark.parametrize(
    "header", ["text/html", "application/json;q=0", "application/json;q=x", "*/*;q=0", ";"]
)
def test_an_answer_that_nobody_wants_is_406(header):
    with pytest.raises(NotAcceptable):
        answer_media(request(accept=header))


@given(st.text(st.characters(max_codepoint=255), max_size=60))
def test_any_accept_header_has_an_answer_or_is_406(header):
    with contextlib.suppress(NotAcceptable):
        assert answer_media(request(accept=header)) in ("json", "msgpack")


@given(st.binary(max_size=64))
def test_any_bytes_are_fields_or_a_400(data):
    for media in ("json", "msgpack"):
        try:
            fields = fields_of(data, media)
        except InvalidRequest:
            continue
        assert all(isinstance(name, str) and v is not None for name, v in fields.items())


@pytest.mark.parametrize(
    ("body", "field", "near"),
    [
        ({"promt": "a"}, "promt", "did you mean prompt?"),
        ({"prompt": "a", "n": 2}, "n", "known: "),
        ({"sampling": {"max_token": 3}}, "sampling.max_token", "sampling.max_tokens?"),
        ({"sampling": {"record": []}}, "sampling.record", ""),
        ({"sampling": {"temperature": -1}}, "sampling.temperature", "from 0 to 100"),
        ({"samples": 0}, "samples", "from 1 to 1024"),
        ({"record": ["x"]}, "record[0]", ""),
        ({"prompt_ids": [-1]}, "prompt_ids[0]", ""),
        ({"prompt_ids": []}, "prompt_ids", ""),
        ({"group_id": "a b"}, "group_id", ""),
        ({"group_id": ""}, "group_id", ""),
        ({"pool": "x" * 129}, "pool", ""),
        ({"sampling": []}, "sampling", "an object"),
        ({"messages": []}, "messages", ""),
        ({"priority": 2**31}, "priority", ""),
    ],
)
def test_a_field_that_is_not_known_or_not_right_is_named(body, field, near):
    with pytest.raises(InvalidRequest) as caught:
        decode_own(body, SubmitRequest, inner=("sampling",))
    assert caught.value.field == field
    assert near in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nulls_mean_absent():
    body = {"prompt": "a", "sampling": {"temperature": None, "max_tokens": 3}, "metadata": None}
    found = decode_own(
        fields_of(msgspec.json.encode(body), "json"), SubmitRequest, inner=("sampling",)
    )
    assert found == SubmitRequest(prompt="a", sampling=msgspec.structs.replace(found.sampling))
    assert found.sampling.temperature == 1.0
    assert found.sampling.max_tokens == 3
    with pytest.raises(InvalidRequest, match="at is required"):
        decode_own({}, ForkRequest)


def test_integer_keys_of_logit_bias_come_as_text_or_as_integers():
    for key in ("7", 7):
        body = {"sampling": {"logit_bias": {key: 1.5}}}
        found = decode_own(body, SubmitRequest, inner=("sampling",))
        assert found.sampling.logit_bias == {7: 1.5}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
names = st.sampled_from([*SubmitRequest.__struct_fields__, "n", "max_tokens", ""])
sampling_names = st.sampled_from([*Sampling.__struct_fields__, "n", "record"])
submissions = st.dictionaries(names, anything, max_size=4) | st.fixed_dictionaries(
    {"sampling": st.dictionaries(sampling_names, anything, max_size=3)}
)


@given(submissions)
def test_any_submission_is_a_request_or_a_400_that_names_a_field(body):
    fault = None
    try:
        found = decode_own(body, SubmitRequest, inner=("sampling",))
    except InvalidRequest as error:
        fault = error
    if fault is None:
        assert isinstance(found, SubmitRequest)
        return
    assert "\n" not in str(fault)
    assert fault.field is not None
    assert fault.field.split(".")[0].split("[")[0] in [*body, fault.field]


# --- metadata

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_json_passes_and_comes_back_through_msgpack(value):
    check_metadata(value)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(value)) == value


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        2**64,
        -(2**63) - 1,
        float("nan"),
        [float("inf")],
        {"a": b"bytes"},
        {1: 2},
        {(): 2},
        [msgspec.msgpack.Ext(5, b"x")],
        nested(MAX_METADATA_DEPTH + 1),
        "x" * MAX_METADATA_BYTES,
    ],
)
def test_what_would_not_come_back_as_it_was_is_refused(value):
    with pytest.raises(InvalidRequest) as caught:
        check_metadata(value)
    assert caught.value.field == "metadata"


def test_the_limits_of_metadata_themselves_pass():
    check_metadata(nested(MAX_METADATA_DEPTH))
    check_metadata("x" * (MAX_METADATA_BYTES - 2))


# --- keys


def test_a_key_is_of_its_holder_route_and_content():
    def key(token: str = "", path: str = "/rollouts", **body):
        headers = {"idempotency_key": "k"} | ({"authorization": f"Bearer {token}"} if token else {})
        found = request_key(request(path, **headers), "/rollouts", body)
        assert found is not None
        return found.holder, found.route, found.key, found.body_digest

    assert request_key(request(), "/rollouts", {}) is None
    assert key(a=1, b=2) == key(b=2, a=1)
    assert key(a=1, stream=True, stream_options={}) == key(a=1)
    assert key(a=1)[-1] != key(a=2)[-1]
    assert key(path="/rollouts/1/fork")[-1] != key(path="/rollouts/2/fork")[-1]
    assert key("one")[0] != key("two")[0]
    assert key("one") == key("one")
    assert "one" not in key("one")[0]


@pytest.mark.parametrize("text", ["", "a b", "x" * 256, "\xe9", "a\tb"])
def test_a_key_that_is_none_is_400(text):
    with pytest.raises(InvalidRequest) as caught:
        request_key(request(idempotency_key=text), "/rollouts", {})
    assert caught.value.field == "Idempotency-Key"
