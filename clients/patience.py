"""How long trouble with a server is borne, and which error it is raised as in the end."""

import time
from collections.abc import Callable

import httpx
import msgspec

from ..engine.errors import (
    EngineUnavailable,
    EverstepError,
    InvalidRequest,
    Overloaded,
    WeightsRefused,
)
from ..server.openai.wire import ErrorResponse

Clock = Callable[[], float]
# an address that never answered is more likely wrong than restarting
FIRST_CONTACT_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
# answers of proxies whose server is away for a moment
_AWAY = frozenset({502, 503, 504})
_FOREIGN = "unexpected_answer"


class Patience:
    """How long trouble is borne: `retry_s` from the first failure after the last success.

    has_answered  whether the server ever did, in an earlier call
    not_borne     errors that are raised at once: somebody else waits until they pass
    """

    def __init__(
        self,
        url: str,
        retry_s: float,
        *,
        has_answered: bool = False,
        not_borne: tuple[type[EverstepError], ...] = (),
        clock: Clock = time.monotonic,
    ) -> None:
        self._url = url
        self._retry_s = retry_s
        self._clock = clock
        self._since: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._has_answered = has_answered
        self._not_borne = not_borne

    def heard(self) -> None:
        """A sign of life, if only a heartbeat: whoever is silent for long may go on for long."""
        self._has_answered = True
        self._since = None

    def succeeded(self) -> None:
        """Trouble that comes later is new trouble."""
        self._has_answered = True
        self._since, self._pause_s = None, FIRST_PAUSE_S

    def pause_after(self, trouble: httpx.Response | httpx.TransportError | EverstepError) -> float:
        """Seconds to the next try. Raises the trouble as an EverstepError where none is due."""
        is_silent = isinstance(trouble, httpx.TransportError)
        error = self._error_of(trouble)
        now = self._clock()
        self._since = now if self._since is None else self._since
        self._has_answered |= not is_silent
        limit = self._retry_s if self._has_answered else min(self._retry_s, FIRST_CONTACT_S)
        pause_s = max(self._pause_s, _retry_after_s(trouble))
        is_borne = _may_pass(error) and not isinstance(error, self._not_borne)
        if not is_borne or now + pause_s > self._since + limit:
            raise error
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s

    def _error_of(
        self, trouble: httpx.Response | httpx.TransportError | EverstepError
    ) -> EverstepError:
        if isinstance(trouble, EverstepError):
            return trouble
        if isinstance(trouble, httpx.Response):
            return error_of(trouble)
        words = str(trouble) or type(trouble).__name__
        return EngineUnavailable(f"no answer from {self._url}: {words}")


def _may_pass(error: EverstepError) -> bool:
    """Whether the same request may succeed later."""
    return error.retryable or (error.code == _FOREIGN and error.status in _AWAY)


def _retry_after_s(trouble: object) -> float:
    """What the server asks for; 0 where it does not."""
    if not isinstance(trouble, httpx.Response):
        return 0.0
    try:
        return max(0.0, float(trouble.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0


# --- errors of the server, as the classes that it raised


def error_of(response: httpx.Response) -> EverstepError:
    """The error in an answer of 400 and more."""
    try:
        body = msgspec.json.decode(response.content, type=ErrorResponse).error
    except msgspec.MsgspecError:
        words = response.text[:200].strip() or response.reason_phrase
        error = EverstepError(f"HTTP {response.status_code}: {words}")
        error.code, error.status = _FOREIGN, response.status_code
        return error
    error = error_from(body.code, body.message, body.param)
    error.status = response.status_code
    if isinstance(error, Overloaded):
        error.retry_after_s = _retry_after_s(response)
    return error


def error_from(code: str | None, message: str, field: str | None) -> EverstepError:
    """An instance of the class in engine/errors.py that has this code."""
    kind = _classes().get(code or "")
    if kind is None:
        error = EverstepError(message)
        error.code = code or error.code
        return error
    if issubclass(kind, InvalidRequest):
        return kind(message, field=field)
    return kind(message, tensor=field) if issubclass(kind, WeightsRefused) else kind(message)


def _classes() -> dict[str, type[EverstepError]]:
    """code → class; where several share one, the most general."""
    found: dict[str, type[EverstepError]] = {}
    level: list[type[EverstepError]] = [EverstepError]
    while level:
        for kind in level:
            if kind.__module__ == EverstepError.__module__:
                found.setdefault(kind.code, kind)
        level = [child for kind in level for child in kind.__subclasses__()]
    return found
