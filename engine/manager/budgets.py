"""Token budgets of pools, exact: what a pool may still grow by, and what it grew by.

    open    journaled; then the core may draw so many more tokens of the pool
    grow    news of the pool are taken when they are prepared, and used when they are shown, which
            for durable rollouts is once they are journaled
    close   the core may draw no more; what it drew comes in; then it is journaled

A core draws up to a limit and says how much it drew (`Meter`). What it drew and nobody took (of a
rollout that was cancelled, beyond a stop string, lost with the core) it may draw again, so a budget
is used to the token, and never beyond.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from msgspec.structs import replace

from ..errors import Conflict, InvalidRequest, UnknownBudget
from ..journal.ops import Budget, BudgetState, CloseBudget, OpenBudget, RequestKey
from ..messages import Meter, Metered
from ..metrics import Registry
from .keeping import Keeper
from .request_keys import RequestKeys
from .standing import Standing

T = TypeVar("T")
MAX_TOKENS = 2**53


class Lease:
    """The front's side of a pool: its open budget, and what the core was told of it.

    is_metered   it has, or had, a budget; one that could not be opened does not count
    drawn        by the core that runs now, as it said
    taken        tokens of the open budget that are used, or will be once they are journaled
    is_closing   the core gets no more of it
    lock         held while a budget is opened or closed
    """

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self.budget: Budget | None = None
        self.drawn = self.taken = 0
        self.is_metered = self.is_closing = False
        self.lock = asyncio.Lock()
        self.news = asyncio.Event()
        self._told: int | None = None
        self._num_unanswered = 0

    @property
    def limit(self) -> int | None:
        """What the core may draw, in all; None: any number."""
        if not self.is_metered:
            return None
        if self.budget is None or self.is_closing:
            return self.drawn
        return self.drawn + self.budget.tokens - self.taken

    @property
    def is_due(self) -> bool:
        """Whether the core may draw more than it knows."""
        limit, told = self.limit, self._told
        return limit is not None and told is not None and limit > told

    def tell(self) -> Meter:
        """For the core, which will answer."""
        self._told = self.limit
        self._num_unanswered += 1
        places = None if self.budget is None else self.budget.places
        return Meter(self.pool, self._told, places)

    def answer(self, drawn: int) -> None:
        self.drawn = drawn
        self._num_unanswered -= 1
        self.publish()

    def lose_core(self) -> None:
        self.drawn, self._told, self._num_unanswered = 0, None, 0
        self.publish()

    async def answered(self) -> None:
        """Return once the core has said that it does as told, or is gone: then all that it drew
        before has come in."""
        while self._num_unanswered:
            await self.news.wait()

    def publish(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class Budgets:
    """All budgets of this front, and a lease for each metered pool.

    send  tells the core, if there is one; False: there is none
    """

    def __init__(
        self,
        standing: Standing,
        keeper: Keeper | None,
        *,
        retain_keys_s: float,
        metrics: Registry,
    ) -> None:
        self.send: Callable[[Meter], bool] = lambda _: False
        self._standing = standing
        self._keeper = keeper
        self._retain_s = retain_keys_s
        self._keys = RequestKeys(retain_keys_s) if keeper is None else keeper.keys
        self._budgets: dict[str, Budget] = {}
        self._leases: dict[str, Lease] = {}
        labels = ["pool"]
        self._used = metrics.gauge(
            "everstep:budget_tokens_used", "tokens used of the pool's newest budget", labels
        )
        self._tokens = metrics.gauge(
            "everstep:budget_tokens", "tokens of the pool's newest budget", labels
        )

    def restore(self, budgets: Iterable[Budget]) -> None:
        """Take over what a journal has."""
        for budget in budgets:
            self._budgets[budget.id] = budget
            lease = self._leases.setdefault(budget.pool, Lease(budget.pool))
            lease.is_metered = True
            if budget.state is BudgetState.OPEN:
                lease.budget, lease.taken = budget, budget.used

    # --- what faces call -----------------------------------------------------------------

    async def open(
        self, pool: str, tokens: int, key: RequestKey | None = None, *, places: int | None = None
    ) -> Budget:
        """Let the rollouts of a pool grow by so many tokens in all, then stand still; the same key
        gives the same budget. From its first one on a pool grows under an open budget only.

        places  how many of them run at once, the first that came; the others stand by (None: any
                number)

        Raises InvalidRequest naming the field, Conflict where it has an open one, KeyReused,
        Draining, EngineUnavailable, JournalFull, JournalError.
        """
        self._standing.check_room(0)
        self._check_read()
        if not pool:
            raise InvalidRequest(
                "pool: the pool of all that names none has no budget; name one", field="pool"
            )
        for name, value in (("tokens", tokens), ("places", places)):
            if value is not None and not 1 <= value <= MAX_TOKENS:
                raise InvalidRequest(
                    f"{name} must be from 1 to {MAX_TOKENS}, got {value}", field=name
                )

        async def once(key: RequestKey | None) -> list[str]:
            return [await self._open(pool, tokens, places, key)]

        [budget_id], _ = await self._whole(self._keys.once(key, once))
        return self.get(budget_id)

    async def close(self, budget_id: str) -> Budget:
        """End it where it stands, all that was drawn under it counted; an ended one stays as it is.

        Raises UnknownBudget, JournalFull, JournalError.
        """
        budget = self._find(budget_id)
        if budget.state is BudgetState.OPEN:
            await self._whole(self._close(budget))
        return self.get(budget_id)

    async def wait(self, budget_id: str, timeout_s: float | None = None) -> Budget:
        """It once it has ended, or the time is up. Raises UnknownBudget, and why it has no news."""
        budget = self._find(budget_id)
        lease = self._leases[budget.pool]
        try:
            async with asyncio.timeout(timeout_s):
                while budget.state is BudgetState.OPEN:
                    error = self._standing.why_not_here()
                    if error is not None:
                        raise error
                    await lease.news.wait()
        except TimeoutError:
            pass
        return replace(budget)

    def get(self, budget_id: str) -> Budget:
        """As it is now; raises UnknownBudget."""
        return replace(self._find(budget_id))

    def of(self, pool: str | None = None) -> list[Budget]:
        """As they are now, in order of opening. Long ended ones are gone, but the newest of each
        pool."""
        self._check_read()
        return [replace(b) for b in self._budgets.values() if pool in (None, b.pool)]

    def is_metered(self, pool: str) -> bool:
        lease = self._leases.get(pool)
        return lease is not None and lease.is_metered

    def publish(self) -> None:
        """Let those who wait look again."""
        for lease in self._leases.values():
            lease.publish()

    def count(self) -> None:
        """Bring the gauges up to date; they are asked for now and then."""
        for budget in self._budgets.values():
            self._used.set(budget.used, budget.pool)
            self._tokens.set(budget.tokens, budget.pool)

    # --- what the core's side calls ------------------------------------------------------

    def take(self, pool: str, num_tokens: int) -> None:
        """News of the pool, which `use` will follow."""
        lease = self._leases.get(pool)
        if lease is not None and lease.budget is not None:
            lease.taken += num_tokens
            assert lease.taken <= lease.budget.tokens, f"pool {pool}: beyond its budget"

    def use(self, pool: str, num_tokens: int) -> None:
        """They are shown now."""
        lease = self._leases.get(pool)
        if lease is None or lease.budget is None:
            return
        budget = lease.budget
        budget.used += num_tokens
        if budget.used == budget.tokens:
            self._end(lease, budget, BudgetState.SPENT)

    def note_drawn(self, drawn: Mapping[str, int]) -> None:
        """What the core drew of pools so far, once all of it is taken that will be."""
        for pool, count in drawn.items():
            lease = self._leases.get(pool)
            if lease is not None:
                lease.drawn = count
                if lease.is_due:
                    self._tell(lease)

    def take_answer(self, metered: Metered) -> None:
        lease = self._leases.get(metered.pool)
        if lease is not None:
            lease.answer(metered.drawn)

    def lose_core(self) -> None:
        """The core is gone, and what it drew and had not told: its successor may draw it."""
        for lease in self._leases.values():
            lease.lose_core()

    def meters(self) -> list[Meter]:
        """What a new core is told before anything else."""
        return [lease.tell() for lease in self._leases.values() if lease.is_metered]

    # --- parts of these ------------------------------------------------------------------

    def _check_read(self) -> None:
        """Raise EngineUnavailable before those of the journal are here."""
        _ = self._standing.kept

    async def _open(
        self, pool: str, tokens: int, places: int | None, key: RequestKey | None
    ) -> str:
        lease = self._leases.setdefault(pool, Lease(pool))
        if lease.budget is not None or lease.lock.locked():
            raise Conflict(_taken(lease))
        if self._keeper is not None:
            self._keeper.check()
        is_first = not lease.is_metered
        budget = Budget(
            id=f"bud-{uuid.uuid4().hex}",
            pool=pool,
            tokens=tokens,
            places=places,
            created_s=time.time(),
        )
        async with lease.lock:
            try:
                if is_first:
                    # what it grew by without a budget goes into the journal before this one
                    lease.is_metered = True
                    self._tell(lease)
                    await lease.answered()
                if self._keeper is not None:
                    await self._keeper.commit(OpenBudget(replace(budget), key))
            except BaseException:
                if is_first:
                    lease.is_metered = False
                    self._tell(lease)
                raise
            self._forget_old()
            self._budgets[budget.id] = budget
            lease.budget, lease.taken = budget, 0
            self._tell(lease)
        return budget.id

    async def _close(self, budget: Budget) -> None:
        lease = self._leases[budget.pool]
        if self._keeper is not None:
            self._keeper.check()
        async with lease.lock:
            if budget.state is not BudgetState.OPEN:
                return
            lease.is_closing = True
            try:
                self._tell(lease)
                await lease.answered()
                if self._keeper is not None:
                    await self._keeper.commit(CloseBudget(budget.id))
                # what came in was journaled before, and may have been the last of it
                if budget.state is BudgetState.OPEN:
                    self._end(lease, budget, BudgetState.CLOSED)
            finally:
                lease.is_closing = False
                if lease.is_due:
                    self._tell(lease)

    def _end(self, lease: Lease, budget: Budget, state: BudgetState) -> None:
        budget.state, budget.ended_s = state, time.time()
        lease.budget = None
        lease.publish()

    def _tell(self, lease: Lease) -> None:
        message = lease.tell()
        if not self.send(message):
            # the next core is told with all else
            lease.lose_core()

    def _find(self, budget_id: str) -> Budget:
        self._check_read()
        budget = self._budgets.get(budget_id)
        if budget is None:
            raise UnknownBudget(f"no budget has the id {budget_id!r}")
        return budget

    def _forget_old(self) -> None:
        """As the journal does at its compaction."""
        old_s = time.time() - self._retain_s
        newest = {budget.pool: budget.id for budget in self._budgets.values()}
        self._budgets = {
            name: budget
            for name, budget in self._budgets.items()
            if budget.ended_s is None or budget.ended_s > old_s or newest[budget.pool] == name
        }

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """To its end, also where the one who asked for it has gone."""
        return await (work if self._keeper is None else self._keeper.whole(work))


def _taken(lease: Lease) -> str:
    budget = lease.budget
    if budget is None:
        return f"pool {lease.pool!r}: another budget is being opened; wait for its end, or close it"
    return (
        f"pool {lease.pool!r} has an open budget, {budget.id}, with {budget.used} of "
        f"{budget.tokens} tokens used; wait for its end, or close it"
    )
