"""The controller over random histories, beside an engine and a referee that share no code with it.

The engine keeps the budget and runs what was submitted. The referee writes down every token, one
by one, and moves it by what it sees from outside: commands and endings. Whatever happens, each of
its tokens is in one account and the machine's books say the same.
"""

from collections import Counter
from dataclasses import dataclass, field

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from everstep.engine.errors import EverstepError
from everstep.trainer_bridge.c3po import words
from everstep.trainer_bridge.c3po.c3po import C3po
from everstep.trainer_bridge.c3po.config import C3poConfig
from everstep.trainer_bridge.c3po.words import Sample

ACCOUNTS = ("carried", "held", "delivered", "purged", "regenerated", "cancelled")

configs = st.builds(
    lambda admission, **values: C3poConfig(**values, **admission),
    mode=st.sampled_from(["generated", "generated", "completed"]),
    budget=st.integers(1, 12),
    capacity=st.integers(1, 5),
    standby=st.sampled_from([0, 0, 1, 4]),
    retention=st.integers(0, 2),
    group=st.integers(1, 3),
    max_lag=st.sampled_from([None, None, 0, 1, 2]),
    max_reissues=st.sampled_from([0, 1, 2, 8]),
    admission=st.sampled_from(
        [
            {},
            {},
            {"max_staleness": 0, "consumer_batch": 1},
            {"max_staleness": 1, "consumer_batch": 3},
        ]
    ),
)


@dataclass
class Tokens:
    """All tokens of one incarnation of a sample, in the order of sampling: which weights each is of."""

    weights: list[int] = field(default_factory=list)
    account: str = "carried"
    cuts: int = 0


class Tree:
    """All weights that ever were: each but the first comes from another, by one update."""

    def __init__(self) -> None:
        self.parents: list[int] = [-1]
        self.now = 0

    def train(self) -> None:
        self.parents.append(self.now)
        self.now = len(self.parents) - 1

    def line(self, node: int) -> list[int]:
        """It and all that it comes from."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return found

    def number(self, node: int) -> int:
        return len(self.line(node)) - 1

    def distance(self, one: int, other: int) -> int:
        """Updates on the way from one to the other."""
        return len(set(self.line(one)) ^ set(self.line(other)))


class Referee:
    """Every token that was ever sampled."""

    def __init__(self) -> None:
        self.current: dict[Sample, Tokens] = {}
        self.all: list[Tokens] = []

    def submitted(self, sample: Sample) -> None:
        assert sample not in self.current, f"{sample} was submitted before and was not lost"
        self.current[sample] = Tokens()
        self.all.append(self.current[sample])

    def move(self, sample: Sample, account: str) -> None:
        tokens = self.current[sample]
        assert tokens.account in ("carried", "held"), f"{sample} moves from {tokens.account}"
        tokens.account = account

    def counts(self) -> dict[str, int]:
        found = Counter()
        for tokens in self.all:
            found[tokens.account] += len(tokens.weights)
        return {account: found[account] for account in ACCOUNTS}


class C3poMachine(RuleBasedStateMachine):
    @initialize(config=configs)
    def start(self, config):
        self.config = config
        self.machine = C3po(config)
        self.referee = Referee()
        self.engine: set[Sample] = set()  # submitted, not ended, not cancelled
        self.ghosts: set[Sample] = set()  # cancelled in mid-iteration: tokens may be on their way
        self.is_open = False
        self.budget: int | None = None
        self.sampled = 0  # in this iteration
        self.finished = 0  # tokens of those that ended well in this iteration
        self.last_ended = 0
        self.tree = Tree()
        self.late: int | None = None  # weights that were gone back from, since the last training
        self.may_be_late: set[Sample] = set()
        self.has_turned = False  # in this iteration
        self.num_prompts = 0
        self.is_stream_ended = False
        self.extended: set[str] = set()
        self.delivered: list[str] = []
        self.abandoned: list[str] = []
        self.batch: tuple[words.TrainGroup, ...] | None = None
        self.is_done = False
        self.saved = self.machine.snapshot()
        self.since: list[tuple[words.Event, list[words.Command]]] = []
        self.extend(4)

    # the driver ---------------------------------------------------------------------------------

    def tell(self, event: words.Event) -> list[words.Command]:
        before = set(self.machine.pool)
        commands = self.machine.apply(event)
        self.since.append((event, commands))
        for command in commands:
            self.carry_out(command, event, before)
        return commands

    def carry_out(self, command, event, before):
        match command:
            case words.Open(iteration, tokens):
                assert not self.is_open
                assert iteration == self.machine.iteration
                self.is_open, self.budget, self.sampled = True, tokens, 0
                self.finished = self.last_ended = 0
            case words.Submit(sample):
                assert self.is_open, "a submission outside of a budget"
                spent = self.sampled if self.config.mode == "generated" else self.finished
                assert spent < self.config.budget, "a submission when all is spent"
                self.engine.add(sample)
                self.referee.submitted(sample)
                assert self.admissible() >= 0
            case words.Purge(sample, reason):
                self.referee.move(sample, "cancelled" if reason == "abandoned" else "purged")
                if sample in self.engine:
                    self.engine.discard(sample)
                    self.ghosts |= {sample} if self.is_open else set()
                    assert reason != "lag" or self.referee.current[sample].weights
                if reason == "age":
                    assert self.reissued(sample)
            case words.Stop():
                assert self.is_open
            case words.Train(_, groups):
                self.batch = groups
                self.check_batch(groups)
            case words.Abandoned(prompt, sample):
                assert prompt == sample.prompt
                assert prompt not in self.machine.hold
                self.abandoned.append(prompt)
            case words.Done():
                self.is_done = True

    def reissued(self, sample: Sample) -> bool:
        if sample.prompt not in self.machine.hold:
            return True  # abandoned
        again = Sample(sample.prompt, sample.index, sample.attempt + 1)
        return again in self.machine.pool or again in self.machine.stream

    def admissible(self) -> int:
        """How many more samples the admission bound lets in."""
        if self.config.max_staleness is None:
            return 10**9
        accepted = sum(tokens.account in ("held", "delivered") for tokens in self.referee.all)
        bound = self.config.max_staleness + self.machine.iteration + 1
        return bound * self.config.consumer_batch - len(self.engine) - accepted

    def check_batch(self, groups):
        for group in groups:
            assert [s.sample.index for s in group.samples] == list(range(self.config.group))
            for member in group.samples:
                tokens = self.referee.current[member.sample]
                assert tokens.account == "held"
                assert self.lags(member.spans) == self.distances(tokens)
                if self.config.max_lag is not None and not self.has_turned:
                    assert max(self.distances(tokens), default=0) <= self.config.max_lag

    @property
    def version(self) -> int:
        return self.tree.number(self.tree.now)

    def lags(self, spans) -> list[int]:
        return [self.version - span.standing for span in spans for _ in range(span.count)]

    def distances(self, tokens: Tokens) -> list[int]:
        return [self.tree.distance(node, self.tree.now) for node in tokens.weights]

    # what happens -------------------------------------------------------------------------------

    @precondition(lambda self: not self.is_stream_ended)
    @rule(count=st.integers(1, 3))
    def extend(self, count):
        names = tuple(f"p{self.num_prompts + i}" for i in range(count))
        self.num_prompts += count
        self.extended |= set(names)
        self.tell(words.Extend(names))

    @precondition(lambda self: self.num_prompts > 7)
    @rule()
    def end_stream(self):
        self.is_stream_ended = True
        self.tell(words.EndStream())

    @precondition(lambda self: self.is_open)
    @rule(
        steps=st.lists(
            st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 2)),
            min_size=1,
            max_size=6,
        )
    )
    def work(self, steps):
        """Some rollouts grow, some of them end."""
        for pick, count, ends in steps:
            alive = sorted(self.engine | self.ghosts)
            if self.budget is not None:
                count = min(count, self.budget - self.sampled)
            # in mode completed the engine draws on for a while after the stop; so it may here
            if alive and count:
                sample = alive[pick % len(alive)]
                self.grow(sample, count, late=count > 2)
                if not ends and sample in self.engine:
                    self.end(sample, "length" if pick % 2 else "stop")

    @precondition(lambda self: self.is_open)
    @rule(steps=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), min_size=2, max_size=9))
    def work_on(self, steps):
        """Many grow, few end."""
        self.work([(pick, count, pick > 1) for pick, count in steps])

    def grow(self, sample, count, *, late):
        """late: sampled before the trainer went back, and told after it."""
        node = self.tree.now
        if late and sample in self.may_be_late:
            node = self.late
        else:
            self.may_be_late.discard(sample)
        self.referee.current[sample].weights += [node] * count
        self.sampled += count
        self.tell(words.Grew(sample, count, self.tree.number(node)))

    def end(self, sample, reason):
        self.engine.discard(sample)
        self.referee.move(sample, "held")
        self.last_ended = len(self.referee.current[sample].weights)
        self.finished += self.last_ended
        self.tell(words.Ended(sample, reason, self.last_ended))

    @precondition(lambda self: self.engine)
    @rule(data=st.data(), trouble=st.sampled_from(["error", "abort", "lost", "held lost"]))
    def trouble(self, data, trouble):
        given = {group.prompt for group in self.batch or ()}
        held = sorted(
            sample
            for sample, tokens in self.referee.current.items()
            if tokens.account == "held" and sample.prompt not in given
        )
        if trouble == "held lost":
            if held:
                self.lose(data.draw(st.sampled_from(held)))
            return
        sample = data.draw(st.sampled_from(sorted(self.engine)))
        self.engine.discard(sample)
        if trouble == "lost":
            self.lose(sample)
        else:
            self.fail(sample, trouble)

    @precondition(lambda self: self.machine.hold)
    @rule(data=st.data(), doubt=st.integers(0, 9))
    def reject(self, data, doubt):
        given = {group.prompt for group in self.batch or ()}
        prompts = sorted(set(self.machine.hold) - given)
        if not doubt and prompts:
            sample = Sample(data.draw(st.sampled_from(prompts)), 0)
            commands = self.tell(words.Reject(sample, "too long"))
            assert words.Abandoned(sample.prompt, sample, "too long") in commands

    def fail(self, sample, reason):
        tokens = self.referee.current[sample]
        commands = self.tell(words.Ended(sample, reason, len(tokens.weights)))
        is_abandoned = any(isinstance(command, words.Abandoned) for command in commands)
        is_regenerated = reason == "error" and not is_abandoned
        self.referee.move(sample, "regenerated" if is_regenerated else "cancelled")

    def lose(self, sample):
        # it may be submitted again in the same breath
        tokens = self.referee.current.pop(sample)
        tokens.account = "regenerated"
        self.may_be_late.discard(sample)
        commands = self.tell(words.Lost(sample))
        if any(isinstance(command, words.Abandoned) for command in commands):
            tokens.account = "cancelled"

    @precondition(lambda self: self.ghosts)
    @rule(data=st.data())
    def ghost_ends(self, data):
        sample = data.draw(st.sampled_from(sorted(self.ghosts)))
        self.ghosts.discard(sample)
        self.tell(words.Ended(sample, "abort", len(self.referee.current[sample].weights)))

    @precondition(lambda self: self.machine.phase in ("idle", "stopping", "training"))
    @rule(step=st.sampled_from([0, 1, 1, 1]))
    def go_on(self, step):
        """The next thing that the driver does by itself."""
        if self.machine.phase == "stopping":
            self.settle()
        elif self.machine.phase == "training":
            self.train(step)
        else:
            self.begin()

    @rule()
    def go_on_by_one(self):
        if self.machine.phase in ("idle", "stopping", "training"):
            self.go_on(1)

    @precondition(lambda self: self.machine.version)
    @rule(data=st.data())
    def turn(self, data):
        """The trainer goes back to a version that led to the one that serves."""
        _, *line = self.tree.line(self.tree.now)
        self.late, self.may_be_late = self.tree.now, self.engine | self.ghosts
        self.tree.now = data.draw(st.sampled_from(line))
        self.has_turned = True
        self.tell(words.Turned(self.version))

    def begin(self):
        self.has_turned = False
        self.tell(words.Begin())
        for live in self.machine.pool.values():
            assert live.retention <= self.config.retention
        if self.config.max_lag is not None:
            members = [*self.machine.pool.values()]
            members += (one for held in self.machine.hold.values() for one in held.values())
            for member in members:
                assert max(self.lags(member.spans), default=0) <= self.config.max_lag

    def settle(self):
        ran_out = not self.machine.pool
        if self.config.mode == "generated":
            assert self.sampled == self.config.budget or ran_out
        else:
            assert self.finished >= self.config.budget or ran_out
        self.close()

    @precondition(lambda self: self.machine.phase == "open")
    @rule(is_done=st.sampled_from([False, False, True]))
    def close_early(self, is_done):
        if is_done:
            self.close()

    def close(self):
        self.is_open = False
        self.ghosts.clear()
        for sample in self.engine:
            self.referee.current[sample].cuts += bool(self.referee.current[sample].weights)
        self.tell(words.Settled())
        assert not self.machine.snapshot().leaving

    def train(self, step):
        for group in self.batch:
            self.delivered.append(group.prompt)
            for member in group.samples:
                self.referee.move(member.sample, "delivered")
        self.batch = None
        if step:
            self.tree.train()
        self.late, self.may_be_late = None, set()
        self.tell(words.Trained(self.version))
        row = self.machine.last_books
        row.check()
        assert (row.iteration, row.sampled) == (self.machine.iteration - 1, self.sampled)

    # crashes ------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.since) > 5)
    @rule()
    def save(self):
        self.saved, self.since = self.machine.snapshot(), []

    @precondition(lambda self: self.since)
    @rule()
    def crash(self):
        """A driver restores its last state and replays what the journal tells it since."""
        wire = msgspec.json.encode(self.saved)
        other = C3po.restore(msgspec.json.decode(wire, type=words.C3poState))
        for event, commands in self.since:
            assert other.apply(event) == commands
        assert other.snapshot() == self.machine.snapshot()
        assert other.outstanding() == self.machine.outstanding()
        self.machine = other

    @rule(data=st.data())
    def nonsense(self, data):
        """An event that contradicts what is known changes nothing."""
        before = self.machine.snapshot()
        stranger = Sample("stranger", 0)
        prompts = sorted(self.machine.hold)
        events = [
            words.Grew(stranger, 1, self.version),
            words.Ended(stranger, "stop", 0),
            words.Ended(stranger, "abort", 0),
            words.Lost(stranger),
            words.Reject(stranger, "unknown"),
            words.Extend(("new", "new")),
            words.Turned(self.version if self.machine.version is None else self.machine.version),
        ]
        events += [words.Extend(("new", prompt)) for prompt in prompts[:1]]
        for sample, live in list(self.machine.pool.items())[:2]:
            events += [
                words.Grew(sample, 0, self.version),
                words.Ended(sample, "stop", live.length + 1),
                words.Ended(sample, "error", live.length + 1),
            ]
            if live.spans:
                events.append(words.Grew(sample, 1, live.spans[-1].version - 1))
            if self.config.mode == "generated":
                over = self.config.budget - self.machine.counted + 1
                events.append(words.Grew(sample, over, self.version))
            if not self.is_open:
                events += [
                    words.Grew(sample, 1, self.version),
                    words.Ended(sample, "stop", live.length),
                ]
        if self.machine.phase not in ("idle", "done"):
            events.append(words.Begin())
        if not self.is_open:
            events.append(words.Settled())
        if self.batch is None:
            events.append(words.Trained(self.version))
        elif self.machine.version is not None:
            events.append(words.Trained(self.machine.version - 1))
        event = data.draw(st.sampled_from(events))
        with pytest.raises(EverstepError):
            self.machine.apply(event)
        assert self.machine.snapshot() == before

    # what always holds --------------------------------------------------------------------------

    @invariant()
    def every_token_is_in_one_account(self):
        total = self.machine.total
        assert {account: getattr(total, account) for account in ACCOUNTS} == self.referee.counts()
        assert total.sampled == sum(len(tokens.weights) for tokens in self.referee.all)
        self.machine.books.check()

    @invariant()
    def the_budget_is_kept(self):
        if self.config.mode == "generated":
            assert self.machine.counted == self.sampled <= self.config.budget
        else:
            assert self.machine.counted == self.finished
            is_over = self.machine.counted >= self.config.budget
            assert not (is_over and self.machine.phase == "open")

    @invariant()
    def the_pool_is_what_runs(self):
        assert set(self.machine.pool) == self.engine
        assert len(self.machine.pool) <= self.config.capacity + self.config.standby
        for sample, live in self.machine.pool.items():
            assert self.lags(live.spans) == self.distances(self.referee.current[sample])
            assert live.retention == self.referee.current[sample].cuts

    @invariant()
    def no_place_stays_empty_without_reason(self):
        machine, config = self.machine, self.config
        if machine.phase == "open":
            is_full = len(machine.pool) == config.capacity + config.standby
            assert is_full or not machine.stream or not self.admissible()

    @invariant()
    def every_prompt_is_delivered_once_or_abandoned_or_under_way(self):
        ends = self.delivered + self.abandoned
        assert len(ends) == len(set(ends))
        assert set(ends) | set(self.machine.hold) == self.extended
        if self.is_done:
            assert not self.machine.hold
            assert self.machine.total.carried == self.machine.total.held == 0

    @invariant()
    def no_sample_is_issued_more_often_than_allowed(self):
        for live in self.machine.pool.values():
            assert live.sample.attempt + live.losses <= self.config.max_reissues


C3poMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, print_blob=True
)
test_controller = C3poMachine.TestCase
