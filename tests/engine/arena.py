"""A scheduler between a fake front and a fake runner, checked at every step."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

from everstep.engine.config import BatchConfig, OnPause, ResolvedKV
from everstep.engine.core.plan import Row, StepPlan
from everstep.engine.core.scheduler import Scheduler
from everstep.engine.messages import Add, FromCore, KVPolicy, Meter, Tokens
from everstep.engine.rollout import Rollout, RolloutState, SamplingParams

from ..fakes import FakeFront, FakeRunner
from ..strategies import VOCAB_SIZE


def make_kv(
    *,
    block_size: int = 4,
    num_blocks: int = 33,
    max_model_len: int = 64,
    prefix_caching: bool = True,
    num_parking_blocks: int = 0,
    on_pause: OnPause = "keep",
) -> ResolvedKV:
    return ResolvedKV(
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        prefix_caching=prefix_caching,
        num_parking_blocks=num_parking_blocks,
        on_pause=on_pause,
    )


def make_batch(*, max_num_seqs: int = 8, max_num_batched_tokens: int = 64) -> BatchConfig:
    return BatchConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


def kept(plan: StepPlan) -> StepPlan:
    """The plan as it is now: its rows are views of lists that grow when it is committed."""
    return msgspec.structs.replace(plan, rows=[KeptRow(row) for row in plan.rows])


class KeptRow:
    """A row's values of this moment, under the same names."""

    def __init__(self, row: Row) -> None:
        names = [*Row.__struct_fields__, "start", "end", "token_ids", "samples", "position"]
        self.__dict__ = {name: getattr(row, name) for name in names}


class Arena:
    """Calls as a core makes them. After each, the books agree; at each ending, the tokens are
    those of the rollout alone; at each read, the KV is what it should be (FakeRunner)."""

    def __init__(self, kv: ResolvedKV, batch: BatchConfig) -> None:
        self.scheduler = Scheduler(kv, batch)
        self.runner = FakeRunner(kv, vocab_size=VOCAB_SIZE)
        self.scheduler.set_version(self.runner.digest)
        self.front = FakeFront()
        self.batch = batch
        self.plans: list[StepPlan] = []
        self.limits: dict[str, int | None] = {}
        self.places: dict[str, int | None] = {}
        # of each pool, from its limit on: a count of our own
        self.drawn: dict[str, int] = {}

    @property
    def live(self) -> list[str]:
        return [r.id for r in self.front.rollouts.values() if not r.state.is_ended]

    def rollout(self, rollout_id: str) -> Rollout:
        return self.front.rollouts[rollout_id]

    def state(self, rollout_id: str) -> str:
        """The state that the front knows once all events have come."""
        self.settle()
        return self.rollout(rollout_id).state.value

    def add(self, add: Add) -> str:
        if not add.rollout_id:
            add = msgspec.structs.replace(add, rollout_id=f"r{len(self.front.rollouts)}")
        self.scheduler.add(add)
        self.front.add(add)
        self.scheduler.check_invariants()
        return add.rollout_id

    def ask(
        self,
        prompt_ids: Sequence[int],
        rollout_id: str = "",
        *,
        max_tokens: int = 4,
        seed: int = 0,
        priority: int = 0,
        client: str = "",
        pool: str = "",
        sampling: SamplingParams | None = None,
        stop_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
        start_paused: bool = False,
    ) -> str:
        """Add one rollout; returns its id."""
        return self.add(
            Add(
                rollout_id=rollout_id,
                prompt_ids=list(prompt_ids),
                output_ids=list(output_ids),
                sampling=sampling or SamplingParams(),
                seed=seed,
                max_tokens=max_tokens,
                stop_ids=list(stop_ids),
                banned_ids=list(stop_ids),
                priority=priority,
                client=client,
                pool=pool,
                start_paused=start_paused,
            )
        )

    def step(self, count: int = 1, *, in_flight: Callable[[], object] | None = None) -> StepPlan:
        """Steps; `in_flight` is called between the plan and its results. Returns the last plan."""
        for _ in range(count):
            plan = self.scheduler.schedule()
            self.plans.append(kept(plan))
            assert len(plan.rows) <= self.batch.max_num_seqs
            num_tokens = sum(len(row.token_ids) for row in plan.rows)
            assert num_tokens <= self.batch.max_num_batched_tokens
            self.check_meters()
            self.check_places(plan)
            if in_flight is not None:
                in_flight()
            if plan.has_work:
                result = self.runner.run(plan)
                read = {r.rollout_id: self.runner.digests(r) for r in plan.rows if r.samples}
                self.receive(self.scheduler.commit(plan, result))
                self._check_kv(read)
            else:
                assert in_flight or not self.scheduler.has_unpaused
                self.settle()
            self.scheduler.check_invariants()
        return self.plans[-1]

    def _check_kv(self, read: dict[str, list[str]]) -> None:
        """What rows that drew had read is what the front was told of their KV."""
        now = self.runner.digest
        for rollout_id, digests in read.items():
            match self.front.kv.get(rollout_id, "computed"):
                case "computed":
                    assert set(digests) <= {now}, f"{rollout_id}: not computed by {now}: {digests}"
                case "recompute-prompt":
                    prompt = digests[: len(self.rollout(rollout_id).prompt_ids)]
                    assert set(prompt) <= {now}, f"{rollout_id}: prompt not by {now}: {digests}"

    def run(self, max_steps: int = 3000) -> int:
        """Steps until nothing unpaused is left; returns their number."""
        for number in range(max_steps):
            if not self.step().has_work:
                return number
        raise AssertionError(f"not done after {max_steps} steps: {self.live}")

    def meter(self, pool: str, limit: int | None, places: int | None = None) -> None:
        """As a front does it: the answer says what was drawn, and nothing of it is on its way."""
        self.settle()
        self.places[pool] = places
        metered = self.scheduler.meter(Meter(pool, limit, places))
        if self.limits.get(pool) is not None:
            assert metered.drawn == self.drawn[pool]
        self.limits[pool], self.drawn[pool] = limit, metered.drawn
        self.scheduler.check_invariants()

    def check_meters(self) -> None:
        """In the plan just made: of a limited pool as many are in play as there is room for."""
        for meter in self.scheduler._roster.meters.limited:
            assert meter.num_in_play == min(meter.room, len(meter.members))

    def check_places(self, plan: StepPlan) -> None:
        """No more rows of a pool draw than it has places."""
        drawing = [row.rollout_id for row in plan.rows if row.samples]
        rows = Counter(self.front.adds[rollout_id].pool for rollout_id in drawing)
        for pool, places in self.places.items():
            assert places is None or rows[pool] <= places, f"pool {pool}: {rows[pool]} of {places}"

    def count_draws(self, tokens: Tokens) -> None:
        """No pool draws beyond its limit, and each says what it drew."""
        counts: Counter[str] = Counter()
        for news in tokens.each():
            counts[self.front.adds[news.rollout_id].pool] += len(news.ids)
        for pool, limit in self.limits.items():
            if not counts[pool]:
                continue
            self.drawn[pool] += counts[pool]
            if limit is not None:
                assert self.drawn[pool] <= limit, f"pool {pool}: {self.drawn[pool]} of {limit}"
                assert tokens.drawn[pool] == self.drawn[pool]
        assert all(self.limits.get(pool) is not None and counts[pool] for pool in tokens.drawn)

    def receive(self, messages: Sequence[FromCore]) -> None:
        before = self.live
        self.front.receive(messages)
        for message in messages:
            if isinstance(message, Tokens):
                self.count_draws(message)
        for rollout_id in set(before) - set(self.live):
            self.front.check(rollout_id, VOCAB_SIZE)

    def settle(self) -> None:
        self.receive(self.scheduler.take_events())

    def cancel(self, rollout_ids: Iterable[str]) -> None:
        """As a front does it: the rollout has ended for it at once."""
        self.settle()
        for rollout_id in rollout_ids:
            if not self.rollout(rollout_id).state.is_ended:
                self.scheduler.cancel([rollout_id, "unknown"])
                self.rollout(rollout_id).move(RolloutState.ABORTED)
                self.front.check(rollout_id, VOCAB_SIZE)
        self.scheduler.check_invariants()

    def flip(self, version: int, policy: KVPolicy = "keep") -> None:
        """Flipping to the weights that serve is not for a core to see: the manager answers."""
        if version != self.runner.version:
            self.runner.set_version(version, f"v{version}")
            self.scheduler.flip(f"v{version}", policy)
        self.scheduler.check_invariants()

    def finish(self) -> None:
        """Once all are resumed, and no pool is limited, all end, and nothing is left behind."""
        for pool in self.limits:
            self.meter(pool, None)
        self.scheduler.resume()
        self.run()
        assert not self.live, f"never ended: {self.live}"
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_paused) == (0, 0, 0)
        assert stats.num_blocks_used == 0
        assert self.runner.num_parked_blocks == 0
