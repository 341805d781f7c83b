"""Web pages: those that are allowed may call, others may not where no key stops them."""

import pytest

from .conftest import serve

pytestmark = pytest.mark.anyio
PAGE, OTHER = "https://chat.example.org", "https://evil.example.org"
HI = {"prompt": "Hi", "max_tokens": 2}
ASKS = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}
# what a page may send without asking first
SIMPLE = {"content-type": "application/x-www-form-urlencoded"}


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/rollouts", "/rollouts/cancel", "/weights/unstage"]
)
@pytest.mark.parametrize("origin", [OTHER, "null", "http://127.0.0.1:8000"])
async def test_without_a_key_no_page_changes_anything(anyio_backend, path, origin):
    async with serve(http={"allowed_origins": (PAGE,)}) as server:
        response = await server.http.post(
            path, content=b'{"prompt": "Hi"}', headers={"origin": origin, **SIMPLE}
        )
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in response.headers
        assert server.backend.adds == []
        asked = await server.http.options(path, headers={"origin": origin, **ASKS})
        assert asked.status_code == 403
        # whoever is no browser names no page
        assert (await server.http.get("/v1/models")).status_code == 200
        assert (await server.http.get("/health", headers={"origin": origin})).status_code == 200


async def test_a_page_that_is_allowed_may_ask_call_and_read(anyio_backend):
    async with serve(http={"allowed_origins": (PAGE, "http://localhost:3000")}) as server:
        for origin in (PAGE, "http://localhost:3000"):
            asked = await server.http.options("/v1/completions", headers={"origin": origin, **ASKS})
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == origin
            assert "POST" in asked.headers["access-control-allow-methods"]
            wanted = asked.headers["access-control-allow-headers"]
            assert wanted == "authorization,content-type"
            for stream in (False, True):
                body = {**HI, "stream": stream}
                response = await server.http.post(
                    "/v1/completions", json=body, headers={"origin": origin}
                )
                assert response.status_code == 200
                assert response.headers["access-control-allow-origin"] == origin
                assert "x-request-id" in response.headers["access-control-expose-headers"]
                assert response.headers["vary"] == "Origin"
        refused = await server.http.post("/v1/completions", json={}, headers={"origin": PAGE})
        assert refused.status_code == 400
        assert refused.headers["access-control-allow-origin"] == PAGE


async def test_any_page_may_call_where_any_is_allowed(anyio_backend):
    async with serve(http={"allowed_origins": ("*",)}) as server:
        response = await server.http.post("/v1/completions", json=HI, headers={"origin": "null"})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "null"


async def test_a_key_stops_pages_by_itself(anyio_backend):
    async with serve(http={"api_key": "secret"}) as server:
        headers = {"origin": OTHER, "authorization": "Bearer secret"}
        response = await server.http.post("/v1/completions", json=HI, headers=headers)
        assert response.status_code == 200
        assert "access-control-allow-origin" not in response.headers
        without = await server.http.post("/v1/completions", json=HI, headers={"origin": OTHER})
        assert without.status_code == 401
        # that key does not guard the weights
        response = await server.http.post("/weights/unstage", headers=headers)
        assert response.json()["error"]["code"] == "origin_not_allowed"


async def test_a_page_that_is_allowed_needs_the_key_all_the_same(anyio_backend):
    async with serve(http={"api_key": "secret", "allowed_origins": (PAGE,)}) as server:
        asked = await server.http.options("/v1/completions", headers={"origin": PAGE, **ASKS})
        assert asked.status_code == 200
        response = await server.http.post("/v1/completions", json=HI, headers={"origin": PAGE})
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == PAGE


async def test_without_a_page_options_is_what_it_was(server):
    response = await server.http.options("/v1/completions", headers=ASKS)
    assert response.status_code == 405
