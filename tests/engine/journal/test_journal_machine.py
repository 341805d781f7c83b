"""The journal in a file against the one in memory: any history, with reopening, equal answers."""

import copy

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from everstep.engine.config import JournalConfig
from everstep.engine.errors import EverstepError
from everstep.engine.journal.journal import Journal
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.ops import (
    Accept,
    Ack,
    Append,
    Budget,
    CloseBudget,
    End,
    Flip,
    OpenBudget,
    Pause,
    Query,
    RequestKey,
    Resume,
)
from everstep.engine.rollout import RolloutState
from tests.engine.journal.disk import Disk
from tests.engine.journal.drawn import ORIGINS, end, grown, rollouts
from tests.engine.journal.workloads import PATH, vfs
from tests.fakes import FakeClock

NAMES = [f"ro-{number}" for number in range(6)]
RECORDING = NAMES[::2]
CONFIG = JournalConfig(retain_acked_s=10, retain_keys_s=20, durability="process")


KINDS = [
    *["accept"] * 3,
    *["append"] * 8,
    *["end"] * 3,
    *("pause", "resume", "ack", "ack", "flip"),
    *("open_budget", "open_budget", "close_budget"),
]


class JournalMachine(RuleBasedStateMachine):
    """Both stores are told the same and asked the same; whoever refuses, refuses in both."""

    @initialize(data=st.data())
    def open(self, data):
        self.clock = FakeClock()
        self.disk = Disk()
        self.memory = MemoryJournal(CONFIG, clock=self.clock)
        self.file = self.reopened()
        first = [
            data.draw(rollouts(rollout_id=n, state=RolloutState.QUEUED, records=n in RECORDING))
            for n in NAMES[:2]
        ]
        self.tell([Accept(first)])

    def reopened(self):
        vfs.disk = self.disk
        return Journal.open(PATH, CONFIG, vfs=vfs.NAME, clock=self.clock)

    def tell(self, ops):
        outcomes = []
        for store in (self.memory, self.file):
            try:
                store.commit(copy.deepcopy(ops))
                outcomes.append("done")
            except EverstepError as error:
                outcomes.append(type(error).__name__)
        event(outcomes[0])
        assert outcomes[0] == outcomes[1]

    @rule(data=st.data(), kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))
    def commit(self, data, kinds):
        live = {
            name: summary.num_output_tokens
            for name in NAMES
            if (summary := self.memory.summary(name)) is not None and not summary.state.is_ended
        }
        self.tell([self.draw_op(data, kind, live) for kind in kinds])

    def draw_op(self, data, kind, live):
        """live: name → tokens, as the ops before it leave them."""
        some = st.lists(st.sampled_from(NAMES), max_size=3)
        key = st.builds(
            RequestKey,
            *(st.just("h"), st.just("/r"), st.sampled_from("klm"), st.just("d")),
            st.just(self.clock()),
        )
        keys = st.one_of(st.none(), st.none(), key)
        match kind:
            case "accept":
                free = [name for name in NAMES if self.memory.summary(name) is None] or NAMES
                name = data.draw(
                    st.sampled_from([name for name in free if name not in live] or NAMES)
                )
                rollout = data.draw(rollouts(rollout_id=name, records=name in RECORDING))
                if not rollout.state.is_ended:
                    live[name] = len(rollout.output_ids)
                return Accept([rollout], data.draw(keys), data.draw(st.integers(0, 9)))
            case "append":
                origin, news = data.draw(st.sampled_from(ORIGINS)), []
                for name in data.draw(st.lists(st.sampled_from(sorted(live) or NAMES), max_size=3)):
                    records = name in RECORDING
                    start = live.get(name, 0) + (data.draw(st.integers(0, 20)) == 20)
                    news.append(data.draw(grown(name, start, records=records)))
                    live[name] = start + len(news[-1].ids)
                return Append(origin, news, data.draw(st.sampled_from([0.0, self.clock()])))
            case "end":
                name = data.draw(st.sampled_from(sorted(live) or NAMES))
                live.pop(name, None)
                rollout = data.draw(rollouts(rollout_id=name, records=name in RECORDING))
                return End(rollout if rollout.state.is_ended else end(rollout))
            case "pause":
                return Pause(data.draw(st.none() | some))
            case "resume":
                return Resume(data.draw(st.none() | some))
            case "ack":
                ended = [name for name in NAMES if name not in live]
                return Ack(data.draw(st.lists(st.sampled_from(ended or NAMES), max_size=3)))
            case "open_budget":
                name, tokens = data.draw(st.sampled_from("wxyz")), data.draw(st.integers(1, 20))
                pool = data.draw(st.sampled_from(["train", "train", "eval"]))
                return OpenBudget(
                    Budget(
                        id=name,
                        pool=pool,
                        tokens=tokens,
                        created_s=self.clock(),
                        places=data.draw(st.none() | st.integers(1, 9)),
                    ),
                    data.draw(keys),
                )
            case "close_budget":
                return CloseBudget(data.draw(st.sampled_from("wxyz")))
        number = data.draw(st.integers(0, 3))
        return Flip(number, "digest", f"/folder/{number}", lineage=data.draw(st.text(max_size=2)))

    @rule(is_thorough=st.booleans())
    def compact(self, is_thorough):
        self.memory.compact()
        self.file.compact(is_thorough=is_thorough)

    @rule(seconds=st.sampled_from([1, 9, 15]))
    def wait(self, seconds):
        self.clock.advance(seconds)

    @rule()
    def reopen(self):
        self.file.close()
        self.file = self.reopened()

    @rule()
    def kill(self):
        """What it had not told anybody is in the disk's cache, and stays."""
        self.disk = Disk.of(self.disk.snapshot())
        self.file = self.reopened()

    @rule(
        state=st.none() | st.sampled_from(list(RolloutState)),
        group_id=st.sampled_from([None, "grp-1"]),
        pool=st.sampled_from([None, "train"]),
        after=st.integers(0, 6),
        limit=st.integers(1, 4),
    )
    def ask(self, **fields):
        query = Query(**fields)
        assert self.file.list(query) == self.memory.list(query)

    @invariant()
    def answers_are_equal(self):
        assert self.file.recover() == self.memory.recover()
        assert self.file.num_rollouts == self.memory.num_rollouts
        for name in NAMES:
            assert self.file.summary(name) == self.memory.summary(name)
            assert self.file.read(name) == self.memory.read(name)

    def teardown(self):
        if hasattr(self, "file"):
            assert self.file.check() == []
            self.file.close()


TestJournalMachine = pytest.mark.timeout(1200)(JournalMachine.TestCase)
TestJournalMachine.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
