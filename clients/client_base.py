"""What the blocking and the async client both are: an address, and a way to make requests."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from ..engine.rollout import SamplingParams
from .client_flows import READ_TIMEOUT_S, Address, Call, Patience

Sampling = SamplingParams | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
PAGE = 500


class BaseClient:
    """What both clients know: where the server is, and how long trouble is borne."""

    def __init__(
        self, base_url: str | None, api_key: str | None, admin_key: str | None, retry_s: float
    ) -> None:
        self._address = Address.find(base_url, api_key)
        self._admin_key = admin_key or os.environ.get("EVERSTEP_ADMIN_KEY")
        self._patience_s = retry_s
        self._has_answered = False

    @property
    def base_url(self) -> str:
        return self._address.url

    def _patience(self) -> Patience:
        return Patience(self._address.url, self._patience_s, has_answered=self._has_answered)

    def _request(self, http: Any, call: Call) -> httpx.Request:
        request: httpx.Request = http.build_request(
            call.method,
            self._address.url + call.path,
            params=call.query,
            headers=self._address.headers | call.headers,
            content=call.content,
            timeout=httpx.Timeout(READ_TIMEOUT_S, read=call.read_s),
        )
        return request
