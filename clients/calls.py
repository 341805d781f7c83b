"""Every call of a running server, once: its fields, its words, and the flow that carries it out.

`Client` and `AsyncClient` have them as methods, and differ only in how they wait.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import httpx
from msgspec import Struct

from ..engine.errors import ConfigError, EverstepError
from ..engine.journal.ops import Budget
from ..engine.messages import KVPolicy, Priority, Staged
from ..engine.rollout import Found, Record, Rollout, SamplingParams
from ..engine.trajectory import Trajectory
from ..server.rollouts.wire import BudgetRequest, ForkRequest, Submitted
from ..server.weights.wire import (
    FlipRequest,
    RollbackRequest,
    StageRequest,
    Updated,
    UpdateRequest,
    WeightsAnswer,
)
from . import flows
from .flows import READ_TIMEOUT_S, Call, Flow
from .patience import Patience

Sampling = SamplingParams | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
MethodT = TypeVar("MethodT", bound=Callable[..., Any])
DEFAULT_URL = "http://127.0.0.1:8000"


class Address(Struct, frozen=True):
    """Where the server is and what it asks for.

    `OPENAI_API_KEY` is sent only to where `OPENAI_BASE_URL` points: it is a secret of that server.
    """

    url: str
    api_key: str | None

    @classmethod
    def find(cls, base_url: str | None, api_key: str | None) -> "Address":
        """From the arguments, else EVERSTEP_BASE_URL and EVERSTEP_API_KEY, else OpenAI's two.

        Raises ConfigError.
        """
        url = base_url or os.environ.get("EVERSTEP_BASE_URL")
        key = api_key or os.environ.get("EVERSTEP_API_KEY")
        if url is None and (url := os.environ.get("OPENAI_BASE_URL")) is not None:
            key = key or os.environ.get("OPENAI_API_KEY")
        url = (url or DEFAULT_URL).rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url must begin with http:// or https://, got {url!r}")
        return cls(url, key)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}


class Calls:
    """What both clients say to a server, and how long they bear trouble with it."""

    def __init__(
        self, base_url: str | None, api_key: str | None, admin_key: str | None, retry_s: float
    ) -> None:
        self.address = Address.find(base_url, api_key)
        self.has_answered = False
        """The server did, once."""
        self.not_borne: tuple[type[EverstepError], ...] = ()
        """As `Patience`."""
        self._admin_key = admin_key or os.environ.get("EVERSTEP_ADMIN_KEY")
        self._patience_s = retry_s

    def patience(self) -> Patience:
        """For one call."""
        return Patience(
            self.address.url,
            self._patience_s,
            has_answered=self.has_answered,
            not_borne=self.not_borne,
        )

    def request(self, http: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
        return http.build_request(
            call.method,
            self.address.url + call.path,
            params=call.query,
            headers=self.address.headers | call.headers,
            content=call.content,
            timeout=httpx.Timeout(READ_TIMEOUT_S, read=call.read_s),
        )

    # --- rollouts ------------------------------------------------------------------------

    def submit(
        self,
        /,
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
    ) -> Flow[Submitted]:
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
        return flows.submit(fields, idempotency_key, self.patience())

    def submit_many(
        self, submissions: Sequence[Mapping[str, Any]]
    ) -> Flow[list[Submitted | EverstepError]]:
        """Several, each as `submit`'s arguments by name, in one request: what became of each.

        One that is refused stops no other. Raises JournalFull, Overloaded, EngineUnavailable: then
        the same ones may be sent again, if they have keys.
        """
        many = [flows.submission_fields(**submission) for submission in submissions]
        return flows.submit_many(many, self.patience())

    def get(self, rollout_id: str) -> Flow[Rollout]:
        """As it is now; raises UnknownRollout."""
        return flows.get(rollout_id, self.patience())

    def get_many(self, rollout_ids: Sequence[str]) -> Flow[Found]:
        """Several as they are now; `unknown` says why an id is not here."""
        return flows.get_many(rollout_ids, self.patience())

    def wait(self, rollout_id: str, *, timeout_s: float | None = None) -> Flow[Rollout]:
        """Once it has ended. Raises TimeoutError, after which it goes on all the same."""
        return flows.wait(rollout_id, timeout_s, self.patience())

    def wait_any(
        self, rollout_ids: Sequence[str], *, timeout_s: float | None = None
    ) -> Flow[Found]:
        """Those of several that have ended, once one has, or the time is up."""
        return flows.wait_any(rollout_ids, timeout_s, self.patience())

    def pause(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Flow[list[str]]:
        """Stop them where they are; the ids that it holds for. all: later ones too."""
        return self._control("pause", rollouts, group, all)

    def resume(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Flow[list[str]]:
        """Go on exactly where they stopped. Raises IllegalState for a named one that has ended."""
        return self._control("resume", rollouts, group, all)

    def cancel(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Flow[list[str]]:
        """End them now, with the tokens that they have."""
        return self._control("cancel", rollouts, group, all)

    def ack(
        self,
        rollouts: str | Sequence[str] | None = None,
        *,
        group: str | None = None,
        all: bool = False,
    ) -> Flow[list[str]]:
        """They are safe with you: the server may forget them. Raises IllegalState for live ones."""
        return self._control("ack", rollouts, group, all)

    def fork(
        self,
        rollout_id: str,
        at: int,
        *,
        samples: int = 1,
        seed: int | None = None,
        pool: str = "",
        idempotency_key: str | None = None,
    ) -> Flow[Submitted]:
        """New rollouts that begin with its first `at` output tokens.

        With one sample and no seed the noise is the source's, hence the very continuation.
        pool: whose token budget they count on; the source's only where it is named.
        """
        request = ForkRequest(at=at, samples=samples, seed=seed, pool=pool)
        return flows.fork(rollout_id, request, idempotency_key, self.patience())

    def export(self, rollout_id: str) -> Flow[bytes]:
        """A sealed copy for a file, or for another server's `import_`; the rollout stays."""
        return flows.export(rollout_id, self.patience())

    def import_(
        self,
        export: bytes | Trajectory,
        *,
        allow_other_weights: bool = False,
        idempotency_key: str | None = None,
    ) -> Flow[Submitted]:
        """Take an export over and go on with it. Raises InvalidTrajectory and Conflict."""
        return flows.import_(export, allow_other_weights, idempotency_key, self.patience())

    # --- token budgets of pools ----------------------------------------------------------

    def open_budget(
        self,
        pool: str,
        tokens: int,
        *,
        places: int | None = None,
        idempotency_key: str | None = None,
    ) -> Flow[Budget]:
        """Let the rollouts of a pool grow by so many output tokens in all, then stand still.

        From its first budget on a pool grows under an open one only; so open it, then submit.
        places: how many of them run at once, the first that came (None: any number). Raises
        Conflict while the pool has another open one.
        """
        request = BudgetRequest(pool=pool, tokens=tokens, places=places)
        return flows.open_budget(request, idempotency_key, self.patience())

    def wait_budget(self, budget_id: str, *, timeout_s: float | None = None) -> Flow[Budget]:
        """Once it is spent or closed, or as it is when the time is up. Raises UnknownBudget."""
        return flows.wait_budget(budget_id, timeout_s, self.patience())

    def close_budget(self, budget_id: str) -> Flow[Budget]:
        """End it where it stands; what was in flight is counted. An ended one stays as it is."""
        return flows.close_budget(budget_id, self.patience())

    def budgets(self, pool: str | None = None) -> Flow[list[Budget]]:
        """In order of opening, as they are now."""
        return flows.budgets(pool, self.patience())

    # --- weights -------------------------------------------------------------------------

    def weights(self) -> Flow[WeightsAnswer]:
        """Which version serves, what is staged, what served before."""
        return flows.weights(self._admin_key, self.patience())

    def stage_weights(
        self, path: str, *, priority: Priority = "background", rollback: int | None = None
    ) -> Flow[Staged]:
        """Load and check the version in a folder of the server's machine, beside what serves.

        priority  background: a stated share of the time of generation; full: a slice between every
                  two of its steps
        rollback  its number, where the flip is to be a rollback to it: it need not be newer then

        Raises WeightsRefused, StaleVersion, CheckpointError; what serves goes on serving.
        """
        request = StageRequest(path=path, priority=priority, rollback=rollback)
        return flows.stage_weights(request, self._admin_key, self.patience())

    def unstage_weights(self) -> Flow[WeightsAnswer]:
        """Give up what is staged or being staged, if anything is; what serves goes on."""
        return flows.unstage_weights(self._admin_key, self.patience())

    def flip_weights(self, version: int, *, kv: KVPolicy = "keep") -> Flow[Updated]:
        """Serve the staged version from the next step on. No rollout ends by it."""
        request = FlipRequest(version=version, kv=kv)
        return flows.change_weights("flip", request, self._admin_key, self.patience())

    def update_weights(
        self, path: str, *, kv: KVPolicy = "keep", priority: Priority = "background"
    ) -> Flow[Updated]:
        """`stage_weights`, then `flip_weights`."""
        request = UpdateRequest(path=path, kv=kv, priority=priority)
        return flows.change_weights("update", request, self._admin_key, self.patience())

    def rollback_weights(
        self,
        version: int,
        *,
        path: str | None = None,
        kv: KVPolicy = "keep",
        priority: Priority = "background",
    ) -> Flow[Updated]:
        """Serve a version again; what is published from then on has to name the new `lineage`."""
        request = RollbackRequest(version=version, path=path, kv=kv, priority=priority)
        return flows.change_weights("rollback", request, self._admin_key, self.patience())

    # --- parts of these ------------------------------------------------------------------

    def _control(
        self, verb: str, rollouts: str | Sequence[str] | None, group: str | None, every: bool
    ) -> Flow[list[str]]:
        selection = flows.selection_of(rollouts, group, every)
        return flows.control(verb, selection, self.patience())


def as_method(method: MethodT, call: Callable[..., Any]) -> MethodT:
    """`method` with the name, the words and the arguments of a call; it returns what the flow does."""
    functools.update_wrapper(method, call)
    signature = inspect.signature(call)
    _, _, result = get_args(signature.return_annotation)
    method.__dict__["__signature__"] = signature.replace(return_annotation=result)
    return method
