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
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from ..engine.errors import EverstepError
from ..engine.journal.ops import Budget
from ..engine.messages import KVPolicy, Priority, Staged
from ..engine.rollout import Record, Rollout, RolloutState
from ..engine.trajectory import Trajectory
from ..server.rollouts.wire import (
    BudgetRequest,
    ForkRequest,
    RolloutSummary,
    StreamEvent,
    Submitted,
)
from ..server.weights.wire import (
    FlipRequest,
    RollbackRequest,
    StageRequest,
    Updated,
    UpdateRequest,
    WeightsAnswer,
)
from . import client_flows as flows
from .client_base import PAGE, BaseClient, Messages, Sampling
from .client_flows import Flow, Pause, Reply, Step
from .client_stream import StreamReader

T = TypeVar("T")


class Client(BaseClient):
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
        super().__init__(base_url, api_key, admin_key, retry_s)
        self._owns_http = http is None
        self._http = http or httpx.Client(limits=httpx.Limits(max_connections=None))

    def submit(
        self,
        prompt: str | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        samples: int = 1,
        sampling: Sampling | None = None,
        record: Sequence[Record] = (),
        priority: int = 0,
        group_id: str | None = None,
        pool: str | None = None,
        attempt: int | None = None,
        metadata: Any = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Submitted:
        """`samples` rollouts of one prompt: text, token ids, or messages. Durable on return.

        idempotency_key  the same key gives the same rollouts again; default: a new one
        options          further fields of the request: tools, chat_template_kwargs, user, …

        Raises InvalidRequest (ContextTooLong), KeyReused, JournalFull, Overloaded.
        """
        fields = flows.submission_fields(
            sampling,
            record,
            prompt=prompt,
            prompt_ids=prompt_ids,
            messages=messages,
            samples=samples,
            priority=priority,
            group_id=group_id,
            pool=pool,
            attempt=attempt,
            metadata=metadata,
            **options,
        )
        return self._run(flows.submit(fields, idempotency_key, self._patience()))

    def get(self, rollout_id: str) -> Rollout:
        """As it is now; raises UnknownRollout."""
        return self._run(flows.get(rollout_id, self._patience()))

    def wait(self, rollout_id: str, *, timeout_s: float | None = None) -> Rollout:
        """Once it has ended. Raises TimeoutError, after which it goes on all the same."""
        return self._run(flows.wait(rollout_id, timeout_s, self._patience()))

    def stream(self, rollout_id: str, *, after: int = 0) -> Iterator[StreamEvent]:
        """Its tokens from `after` on as they come, each once, over any number of connections.

        Leaving the loop early ends nothing but the connection.
        """
        reader = StreamReader(rollout_id, after, self._patience())
        while not reader.has_ended:
            trouble: httpx.Response | httpx.TransportError | EverstepError
            try:
                request = self._request(self._http, reader.call())
                with contextlib.closing(self._http.send(request, stream=True)) as response:
                    self._has_answered = True
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
        query = flows.query_of(state, group, pool, PAGE)
        while True:
            page = self._run(flows.page(query, self._patience()))
            yield from page.data
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor

    def pause(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Sequence[str]:
        """Stop them where they are; the ids that it holds for. all: later ones too."""
        return self._control("pause", rollouts, group, all)

    def resume(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Sequence[str]:
        """Go on exactly where they stopped. Raises IllegalState for a named one that has ended."""
        return self._control("resume", rollouts, group, all)

    def cancel(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Sequence[str]:
        """End them now, with the tokens that they have."""
        return self._control("cancel", rollouts, group, all)

    def ack(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Sequence[str]:
        """They are safe with you: the server may forget them. Raises IllegalState for live ones."""
        return self._control("ack", rollouts, group, all)

    def fork(
        self,
        rollout_id: str,
        at: int,
        *,
        samples: int = 1,
        seed: int | None = None,
        idempotency_key: str | None = None,
    ) -> Submitted:
        """New rollouts that begin with its first `at` output tokens.

        With one sample and no seed the noise is the source's, hence the very continuation.
        """
        request = ForkRequest(at=at, samples=samples, seed=seed)
        return self._run(flows.fork(rollout_id, request, idempotency_key, self._patience()))

    def export(self, rollout_id: str) -> bytes:
        """A sealed copy for a file, or for another server's `import_`; the rollout stays."""
        return self._run(flows.export(rollout_id, self._patience()))

    def import_(
        self,
        export: bytes | Trajectory,
        *,
        allow_other_weights: bool = False,
        idempotency_key: str | None = None,
    ) -> Submitted:
        """Take an export over and go on with it. Raises InvalidTrajectory and Conflict."""
        return self._run(
            flows.import_(export, allow_other_weights, idempotency_key, self._patience())
        )

    def open_budget(
        self,
        pool: str,
        tokens: int,
        *,
        places: int | None = None,
        idempotency_key: str | None = None,
    ) -> Budget:
        """Let the rollouts of a pool grow by so many output tokens in all, then stand still.

        From its first budget on a pool grows under an open one only; so open it, then submit.
        places: how many of them run at once, the first that came (None: any number). Raises
        Conflict while the pool has another open one.
        """
        request = BudgetRequest(pool=pool, tokens=tokens, places=places)
        return self._run(flows.open_budget(request, idempotency_key, self._patience()))

    def wait_budget(self, budget_id: str, *, timeout_s: float | None = None) -> Budget:
        """Once it is spent or closed, or as it is when the time is up. Raises UnknownBudget."""
        return self._run(flows.wait_budget(budget_id, timeout_s, self._patience()))

    def close_budget(self, budget_id: str) -> Budget:
        """End it where it stands; what was in flight is counted. An ended one stays as it is."""
        return self._run(flows.close_budget(budget_id, self._patience()))

    def budgets(self, pool: str | None = None) -> Sequence[Budget]:
        """In order of opening, as they are now."""
        return self._run(flows.budgets(pool, self._patience()))

    def weights(self) -> WeightsAnswer:
        """Which version serves, what is staged, what served before."""
        return self._run(flows.weights(self._admin_key, self._patience()))

    def stage_weights(
        self, path: str, *, priority: Priority = "background", rollback: int | None = None
    ) -> Staged:
        """Load and check the version in a folder of the server's machine, beside what serves.

        priority  background: a stated share of the time of generation; full: a slice between every
                  two of its steps
        rollback  its number, where the flip is to be a rollback to it: it need not be newer then

        Raises WeightsRefused, StaleVersion, CheckpointError; what serves goes on serving.
        """
        request = StageRequest(path=path, priority=priority, rollback=rollback)
        return self._run(flows.stage_weights(request, self._admin_key, self._patience()))

    def unstage_weights(self) -> WeightsAnswer:
        """Give up what is staged or being staged, if anything is; what serves goes on."""
        return self._run(flows.unstage_weights(self._admin_key, self._patience()))

    def flip_weights(self, version: int, *, kv: KVPolicy = "keep") -> Updated:
        """Serve the staged version from the next step on. No rollout ends by it."""
        request = FlipRequest(version=version, kv=kv)
        return self._run(flows.change_weights("flip", request, self._admin_key, self._patience()))

    def update_weights(
        self, path: str, *, kv: KVPolicy = "keep", priority: Priority = "background"
    ) -> Updated:
        """`stage_weights`, then `flip_weights`."""
        request = UpdateRequest(path=path, kv=kv, priority=priority)
        return self._run(flows.change_weights("update", request, self._admin_key, self._patience()))

    def rollback_weights(
        self,
        version: int,
        *,
        path: str | None = None,
        kv: KVPolicy = "keep",
        priority: Priority = "background",
    ) -> Updated:
        """Serve a version again; what is published from then on has to name the new `lineage`."""
        request = RollbackRequest(version=version, path=path, kv=kv, priority=priority)
        return self._run(
            flows.change_weights("rollback", request, self._admin_key, self._patience())
        )

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

    def _control(
        self, verb: str, rollouts: str | Sequence[str] | None, group: str | None, every: bool
    ) -> Sequence[str]:
        selection = flows.selection_of(rollouts, group, every)
        return self._run(flows.control(verb, selection, self._patience()))

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
                reply = self._http.send(self._request(self._http, step))
                self._has_answered = True
            except httpx.TransportError as error:
                reply = error
