"""A rollout's event stream as a client reads it: parsed as bytes come, taken up where it broke."""

from collections.abc import Iterator

import httpx
import msgspec

from ..engine.errors import EngineUnavailable, EverstepError
from ..server.openai.wire import ErrorResponse
from ..server.rollouts.wire import StreamEvent
from .flows import Call, path_of
from .patience import Patience, error_from

# far beyond any event; a server that sends no line's end would fill memory
MAX_EVENT_BYTES = 256 * 2**20


class ServerEvents:
    """Bytes → (event name, data) of whole server-sent events; comments and the rest are skipped."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """Raises EngineUnavailable for an event that does not end."""
        self._buffer += data
        *blocks, rest = self._buffer.split(b"\n\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise EngineUnavailable(f"an event of more than {MAX_EVENT_BYTES} bytes")
        self._buffer = rest
        return [found for block in blocks if (found := _event(block)) is not None]


def _event(block: bytes | bytearray) -> tuple[str, bytes] | None:
    name, data = "message", []
    for line in bytes(block).split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            name = value.decode(errors="replace")
        elif field == b"data":
            data.append(value)
    return (name, b"\n".join(data)) if data else None


class StreamReader:
    """Where a reader is in a rollout. One per stream, over as many connections as it takes."""

    def __init__(self, rollout_id: str, after: int, patience: Patience) -> None:
        self._path = f"{path_of(rollout_id)}/stream"
        self._after = after
        self._patience = patience
        self._events = ServerEvents()
        self.has_ended = False

    def call(self) -> Call:
        """The next connection: from the first token on that was not seen."""
        self._events = ServerEvents()
        return Call(
            method="GET",
            path=self._path,
            query={"after": str(self._after)},
            # what is compressed comes late, and cannot be read when it was cut
            headers={"accept": "text/event-stream", "accept-encoding": "identity"},
        )

    def pause_after(self, trouble: httpx.Response | httpx.TransportError | EverstepError) -> float:
        """As `Patience.pause_after`."""
        return self._patience.pause_after(trouble)

    def take(self, data: bytes) -> Iterator[StreamEvent]:
        """The events in these bytes, each token once. Raises what the server says of itself."""
        self._patience.heard()
        for name, text in self._events.feed(data):
            if name == "error":
                raise _error(text)
            event = _decode(text)
            if event.start != self._after:
                raise EngineUnavailable(
                    f"the stream goes on at token {event.start}, expected {self._after}"
                )
            self._after = event.end
            self._patience.succeeded()
            self.has_ended = event.state.is_ended and event.finish_reason is not None
            yield event


def _decode(text: bytes) -> StreamEvent:
    try:
        return msgspec.json.decode(text, type=StreamEvent)
    except msgspec.MsgspecError as error:
        raise EngineUnavailable(f"an event that no Everstep server sends: {error}") from None


def _error(text: bytes) -> EverstepError:
    try:
        body = msgspec.json.decode(text, type=ErrorResponse).error
    except msgspec.MsgspecError as error:
        raise EngineUnavailable(f"an error that no Everstep server sends: {error}") from None
    return error_from(body.code, body.message, body.param)
