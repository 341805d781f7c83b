"""Typed clients of a running server's rollouts, blocking and async.

    with Client("http://127.0.0.1:8000") as client:
        group = client.submit("Once upon a time", samples=4, sampling={"max_tokens": 64})
        for rollout_id in group.rollout_ids:
            rollout = client.wait(rollout_id)
            print(rollout.text, rollout.lp_sampled)
        client.ack(group.rollout_ids)

What was submitted lives in the server's journal: a lost connection, a restarted server and a
restarted client (that knows the ids, or the idempotency key) cost time and nothing else. Every
call is sent again after trouble on the way, and none has its effect twice. An error of the
server is raised as its class in `everstep.engine.errors`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import httpx

from ..engine.errors import EverstepError
from ..engine.rollout import RolloutState
from ..server.rollouts.wire import RolloutSummary, StreamEvent
from . import flows
from .calls import Calls, as_method
from .event_stream import StreamReader
from .flows import Flow, Pause, Reply, Step

T = TypeVar("T")
P = ParamSpec("P")


def blocking(
    call: Callable[Concatenate[Calls, P], Flow[T]],
) -> Callable[Concatenate["Client", P], T]:
    """The call as a method that returns what its flow does."""

    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return client._run(call(client._calls, *args, **kwargs))

    return as_method(method, call)


class Client:
    """Blocking; one for any number of threads. Use it as a context manager, or call `close()`.

    base_url  of the server; default: EVERSTEP_BASE_URL, else OPENAI_BASE_URL, else this machine
    api_key   default: EVERSTEP_API_KEY, or OPENAI_API_KEY together with OPENAI_BASE_URL
    admin_key for calls that change the weights; default: EVERSTEP_ADMIN_KEY
    retry_s   how long an absent, loading or overloaded server is borne before its error is raised
    http      an httpx.Client of your own (proxies, certificates); it is not closed here
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        retry_s: float = 120.0,
        http: httpx.Client | None = None,
    ) -> None:
        self._calls = Calls(base_url, api_key, admin_key, retry_s)
        self._owns_http = http is None
        self._http = http or httpx.Client(limits=httpx.Limits(max_connections=None))

    @property
    def base_url(self) -> str:
        return self._calls.address.url

    submit = blocking(Calls.submit)
    submit_many = blocking(Calls.submit_many)
    get = blocking(Calls.get)
    get_many = blocking(Calls.get_many)
    wait = blocking(Calls.wait)
    wait_any = blocking(Calls.wait_any)
    pause = blocking(Calls.pause)
    resume = blocking(Calls.resume)
    cancel = blocking(Calls.cancel)
    ack = blocking(Calls.ack)
    fork = blocking(Calls.fork)
    export = blocking(Calls.export)
    import_ = blocking(Calls.import_)
    open_budget = blocking(Calls.open_budget)
    wait_budget = blocking(Calls.wait_budget)
    close_budget = blocking(Calls.close_budget)
    budgets = blocking(Calls.budgets)
    weights = blocking(Calls.weights)
    stage_weights = blocking(Calls.stage_weights)
    unstage_weights = blocking(Calls.unstage_weights)
    flip_weights = blocking(Calls.flip_weights)
    update_weights = blocking(Calls.update_weights)
    rollback_weights = blocking(Calls.rollback_weights)

    def stream(self, rollout_id: str, *, after: int = 0) -> Iterator[StreamEvent]:
        """Its tokens from `after` on as they come, each once, over any number of connections.

        Leaving the loop early ends nothing but the connection.
        """
        reader = StreamReader(rollout_id, after, self._calls.patience())
        while not reader.has_ended:
            trouble: httpx.Response | httpx.TransportError | EverstepError
            try:
                request = self._calls.request(self._http, reader.call())
                with contextlib.closing(self._http.send(request, stream=True)) as response:
                    self._calls.has_answered = True
                    if response.status_code == 200:
                        for data in response.iter_raw():
                            yield from reader.take(data)
                        trouble = httpx.RemoteProtocolError("the stream ended early")
                    else:
                        response.read()
                        trouble = response
            except (httpx.TransportError, EverstepError) as error:
                trouble = error
            if not reader.has_ended:
                time.sleep(reader.pause_after(trouble))

    def list(
        self,
        *,
        state: RolloutState | str | None = None,
        group: str | None = None,
        pool: str | None = None,
    ) -> Iterator[RolloutSummary]:
        """All that match, in order of acceptance, a page at a time."""
        query = flows.query_of(state, group, pool, flows.PAGE)
        while True:
            page = self._run(flows.page(query, self._calls.patience()))
            yield from page.data
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor

    def close(self) -> None:
        """End the connections. Idempotent."""
        if self._owns_http:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, flow: Flow[T]) -> T:
        reply: Reply = None
        while True:
            try:
                step: Step = flow.send(reply)
            except StopIteration as done:
                result: T = done.value
                return result
            reply = None
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                continue
            try:
                reply = self._http.send(self._calls.request(self._http, step))
                self._calls.has_answered = True
            except httpx.TransportError as error:
                reply = error
