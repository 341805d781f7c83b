"""The engine's side of the bridge without sockets: any order of restarts and lost messages."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from everstep.engine.errors import BridgeError
from everstep.trainer_bridge.protocol import (
    PROTOCOL_VERSION,
    Bye,
    Credit,
    Durable,
    Hello,
    IterationEnd,
    Refused,
    ToRank,
    Trained,
    Welcome,
)
from everstep.trainer_bridge.trajectories.dealing import Dealer, Next, deal


def hello(**fields: object) -> Hello:
    known = {"protocol": PROTOCOL_VERSION, "software": "test", "run": "run", "lineage": "a"}
    return Hello(**{**known, "rank": 0, "world": 1, **fields})  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 10**6)), st.integers(1, 9))
def test_every_group_goes_to_one_rank(sizes: list[int], world: int) -> None:
    shares = deal(sizes, world)
    assert len(shares) == world
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    assert shares == deal(list(sizes), world)


@given(st.lists(st.integers(1, 1000), min_size=1), st.integers(1, 5))
def test_ranks_differ_by_no_more_than_the_largest_group(sizes: list[int], world: int) -> None:
    loads = [sum(sizes[index] for index in share) for share in deal(sizes, world)]
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"protocol": 7}, "speaks bridge protocol 7, this side 1"),
        ({"run": "other"}, "serves the run 'run', not 'other'"),
        ({"rank": 2, "world": 2}, "rank 2 does not exist in a world of 2"),
        ({"at": 9}, "iteration 9 was never announced"),
        (
            {"checkpoint": "00000004", "done_through": 3},
            "its checkpoint '00000004' holds iterations up to 3, and this run has come to -1",
        ),
    ],
)
def test_who_cannot_be_served_is_told_why(fields: dict[str, object], reason: str) -> None:
    [(_, answer)] = Dealer("run").take(b"peer", hello(**fields), 0.0)
    assert isinstance(answer, Refused)
    assert answer.is_final
    assert reason in answer.reason


def test_a_lineage_has_one_world_and_never_comes_back() -> None:
    dealer = Dealer("run")
    dealer.take(b"a0", hello(world=2), 0.0)
    [(_, answer)] = dealer.take(b"a1", hello(rank=1, world=3), 0.0)
    assert isinstance(answer, Refused)
    assert "has a world of 2, not 3" in answer.reason
    gone, welcome = dealer.take(b"b0", hello(lineage="b"), 0.0)
    assert gone[0] == b"a0"
    assert isinstance(gone[1], Refused)
    assert isinstance(welcome[1], Welcome)
    [(_, answer)] = dealer.take(b"a0", hello(world=2), 0.0)
    assert isinstance(answer, Refused)
    assert "lineage 'a' was replaced by 'b'" in answer.reason


def test_strangers_are_asked_for_a_hello() -> None:
    [(_, answer)] = Dealer("run").take(b"peer", Credit(1, 10, 10), 0.0)
    assert answer == Refused("say Hello first", is_final=False)


def test_who_is_missing_is_named() -> None:
    dealer = Dealer("run")
    assert dealer.missing(0.0, 10.0) == ["no rank of the trainer has said hello"]
    dealer.take(b"1", hello(rank=1, world=2), 0.0)
    assert dealer.missing(5.0, 10.0) == ["rank 0 of 2 has not said hello"]
    dealer.take(b"0", hello(rank=0, world=2), 20.0)
    assert dealer.missing(20.0, 10.0) == ["rank 1 of 2 is silent for 20 s"]
    dealer.take(b"0", Bye(), 20.0)
    assert "rank 0 of 2 has not said hello" in dealer.missing(20.0, 10.0)


def test_credit_bounds_what_is_on_its_way() -> None:
    dealer = Dealer("run")
    dealer.announce(0, [5, 5, 5, 5])
    [(_, welcome)] = dealer.take(b"0", hello(), 0.0)
    assert isinstance(welcome, Welcome)
    assert dealer.next() is None
    dealer.take(b"0", Credit(welcome.session, 2, 1000), 0.0)
    for place in range(2):
        what = dealer.next()
        assert isinstance(what, Next)
        assert what.place == place
        assert dealer.delivered(what, 100)
    assert dealer.next() is None
    dealer.take(b"0", Credit(welcome.session, 9, 200), 0.0)
    assert dealer.next() is None
    dealer.take(b"0", Credit(welcome.session, 9, 201), 0.0)
    assert isinstance(dealer.next(), Next)
    # of an older session
    dealer.take(b"0", Credit(welcome.session - 1, 0, 0), 0.0)
    assert isinstance(dealer.next(), Next)


def test_announcements_are_in_order_and_final() -> None:
    dealer = Dealer("run")
    dealer.announce(3, [1, 2])
    dealer.announce(3, [1, 2])
    with pytest.raises(BridgeError, match="iteration 3 was announced with other groups"):
        dealer.announce(3, [1])
    with pytest.raises(BridgeError, match="iteration 5 after 3"):
        dealer.announce(5, [1])


def test_it_is_acknowledged_when_every_rank_holds_it() -> None:
    dealer = Dealer("run")
    dealer.announce(0, [1])
    for rank in range(2):
        dealer.take(bytes([rank]), hello(rank=rank, world=2), 0.0)
    dealer.take(b"\0", Durable("step-1", 0), 0.0)
    assert dealer.pending == [0]
    dealer.take(b"\1", Durable("step-1", 10**6), 0.0)
    assert dealer.pending == []
    assert dealer.acked == 0
    dealer.announce(0, [1])
    assert dealer.pending == []


def test_a_trainer_that_begins_with_other_weights_than_are_served_is_sent_away() -> None:
    dealer = Dealer("run", serving="b" * 64)
    [(_, refused)] = dealer.take(b"0", hello(base="a" * 64), 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason == dealer.stranger
    assert f"begins with weights {'a' * 12}, the engines serve {'b' * 12}: serve" in refused.reason
    assert not dealer.num_seated
    # one that says nothing of it, and one with the same
    for peer, base in ((b"1", ""), (b"2", "b" * 64)):
        [*_, (_, welcome)] = dealer.take(peer, hello(lineage=peer.decode(), base=base), 0.0)
        assert isinstance(welcome, Welcome)
    # once a trainer's own are served, one that begins anew is given what it lacks
    dealer.serving = ""
    [*_, (_, welcome)] = dealer.take(b"3", hello(lineage="c", base="a" * 64), 0.0)
    assert isinstance(welcome, Welcome)


def test_what_an_older_checkpoint_lacks_is_kept_until_nobody_can_come_back_to_it() -> None:
    dealer = Dealer("run")
    for iteration in range(6):
        dealer.announce(iteration, [1])
    dealer.take(b"0", hello(oldest_through=-1), 0.0)
    dealer.take(b"0", Durable("2", 1, -1), 0.0)
    assert dealer.pending == [0, 1, 2, 3, 4, 5]
    dealer.take(b"0", Durable("4", 3, 1), 0.0)
    assert (dealer.pending, dealer.done_through, dealer.acked) == ([2, 3, 4, 5], 3, 1)
    # the newest is lost
    first = Trained(1, 2, "digest", "/v2")
    back = hello(lineage="b", checkpoint="2", done_through=1, oldest_through=-1, trained=first)
    [_, (_, welcome)] = dealer.take(b"1", back, 0.0)
    assert isinstance(welcome, Welcome)
    assert (welcome.at, dealer.begun, dealer.done_through) == (2, first, 1)
    dealer.take(b"1", Durable("4", 3, 1), 0.0)
    dealer.take(b"1", Durable("6", 5, 3), 0.0)
    assert dealer.pending == [4, 5]
    dealer.take(b"1", Bye(), 0.0)
    dealer.forget()
    assert (dealer.pending, dealer.acked) == ([], 5)


def test_a_version_that_was_trained_and_never_said_is_said_by_the_next_life() -> None:
    dealer = Dealer("run")
    dealer.announce(0, [1])
    dealer.take(b"0", hello(), 0.0)
    said = Trained(0, 1, "digest", "/v1")
    dealer.take(b"1", hello(lineage="b", done_through=0, trained=said), 0.0)
    assert dealer.trained == {0: said}


class Rank:
    """A rank as docs/reference/bridge.md describes it: what it has got, in order."""

    def __init__(self, lineage: str, rank: int, world: int, done_through: int) -> None:
        self.lineage, self.rank, self.world = lineage, rank, world
        self.done_through = done_through
        self.at, self.place, self.session = -1, 0, 0
        self.got: list[tuple[int, int]] = []
        self.shares: dict[int, int] = {}
        self.taken = 0
        self.trained: Trained | None = None

    @property
    def peer(self) -> bytes:
        return f"{self.lineage}/{self.rank}".encode()

    def hello(self) -> Hello:
        return hello(
            lineage=self.lineage,
            rank=self.rank,
            world=self.world,
            done_through=self.done_through,
            at=self.at,
            place=self.place,
            trained=self.trained,
        )


class Bridge(RuleBasedStateMachine):
    """Messages are lost with a connection; ranks reconnect, trainers restart from checkpoints."""

    @initialize(world=st.integers(1, 3))
    def start(self, world: int) -> None:
        self.draw = random.Random(0)
        self.dealer = Dealer("run")
        self.sizes: list[list[int]] = []
        self.num_lineages = 0
        self.checkpoints = [-1]
        self.begin(world, -1)

    def begin(self, world: int, done_through: int) -> None:
        self.num_lineages += 1
        name = f"life {self.num_lineages}"
        self.first = max(done_through, self.dealer.acked) + 1
        self.ranks = [Rank(name, rank, world, done_through) for rank in range(world)]
        for rank in self.ranks:
            self.connect(rank)

    def connect(self, rank: Rank) -> None:
        answers = dict(self.dealer.take(rank.peer, rank.hello(), 0.0))
        welcome = answers[rank.peer]
        assert isinstance(welcome, Welcome)
        if rank.at < 0:
            rank.at, rank.place = welcome.at, welcome.place
        assert (welcome.at, welcome.place) == (rank.at, rank.place)
        rank.session, rank.taken = welcome.session, 0

    @rule(sizes=st.lists(st.integers(0, 50), max_size=5))
    def announce(self, sizes: list[int]) -> None:
        self.dealer.announce(len(self.sizes), sizes)
        self.sizes.append(sizes)

    @rule(number=st.integers(0, 2), groups=st.integers(1, 3))
    def grant(self, number: int, groups: int) -> None:
        rank = self.ranks[number % len(self.ranks)]
        self.dealer.take(rank.peer, Credit(rank.session, rank.taken + groups, 10**9), 0.0)

    @rule(is_lost=st.booleans(), most=st.integers(1, 4))
    def send(self, is_lost: bool, most: int) -> None:
        for _ in range(most):
            what = self.dealer.next()
            if what is None:
                return
            if isinstance(what, Next):
                rank = self.ranks[what.seat.rank]
                assert self.dealer.delivered(what, 1)
                if not is_lost:
                    self.receive(rank, what.iteration, what.place, what.index)
            else:
                rank = next(r for r in self.ranks if r.peer == what[0])
                if not is_lost:
                    self.receive_end(rank, what[1])
            if is_lost:
                self.connect(rank)

    def receive(self, rank: Rank, iteration: int, place: int, index: int) -> None:
        assert (iteration, place) == (rank.at, rank.place)
        rank.got.append((iteration, index))
        rank.place += 1
        rank.taken += 1

    def receive_end(self, rank: Rank, end: ToRank) -> None:
        assert isinstance(end, IterationEnd)
        assert (end.iteration, end.num_groups) == (rank.at, rank.place)
        assert end.num_groups_in_all == len(self.sizes[end.iteration])
        assert end.num_tokens_in_all == sum(self.sizes[end.iteration])
        rank.shares[end.iteration] = end.num_groups
        rank.at, rank.place = rank.at + 1, 0

    @rule()
    def train(self) -> None:
        """All ranks take part in an iteration that all have; then a checkpoint is durable."""
        done = min(rank.at for rank in self.ranks) - 1
        for rank in self.ranks:
            self.dealer.take(rank.peer, Trained(done, done + 1, "d"), 0.0)

    @rule(is_told=st.booleans())
    def save(self, is_told: bool) -> None:
        done = min(rank.at for rank in self.ranks) - 1
        if done < 0:
            return
        self.checkpoints.append(done)
        for rank in self.ranks:
            rank.done_through = done
            if is_told:
                self.dealer.take(rank.peer, Durable(f"step-{done}", done), 0.0)

    @rule(number=st.integers(0, 2))
    def reconnect(self, number: int) -> None:
        self.connect(self.ranks[number % len(self.ranks)])

    @rule(world=st.integers(1, 3), data=st.data())
    def restart(self, world: int, data: st.DataObject) -> None:
        self.begin(world, data.draw(st.sampled_from(self.checkpoints)))

    @rule(world=st.integers(1, 3))
    def restart_engine(self, world: int) -> None:
        """It knows what was acknowledged, and announces anew."""
        self.dealer = Dealer("run", acked=self.dealer.acked)
        for iteration, sizes in enumerate(self.sizes):
            self.dealer.announce(iteration, sizes)
        for rank in self.ranks:
            self.connect(rank)

    @invariant()
    def every_group_once(self) -> None:
        """Within a lineage: exactly once, to one rank, for every iteration that is complete."""
        if not hasattr(self, "ranks"):
            return
        got = [entry for rank in self.ranks for entry in rank.got]
        assert len(set(got)) == len(got)
        complete = min(rank.at for rank in self.ranks)
        for iteration in range(self.first, complete):
            wanted = {(iteration, index) for index in range(len(self.sizes[iteration]))}
            assert wanted <= set(got)

    @invariant()
    def nothing_is_forgotten_that_a_checkpoint_lacks(self) -> None:
        if hasattr(self, "dealer"):
            assert self.dealer.acked <= max(self.checkpoints)
            assert self.dealer.pending == list(range(self.dealer.acked + 1, len(self.sizes)))

    @precondition(lambda self: hasattr(self, "ranks"))
    @rule()
    def catch_up(self) -> None:
        """With credit and no more losses everybody gets everything."""
        for rank in self.ranks:
            self.dealer.take(rank.peer, Credit(rank.session, 10**9, 10**9), 0.0)
        self.send(False, 10**6)
        assert all(rank.at == len(self.sizes) for rank in self.ranks)


TestBridge = Bridge.TestCase
