"""The driver of C3PO++ over engines that die, come back and stay away, and kills of its own."""

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from everstep.engine.errors import ConfigError, EngineUnavailable, JournalFull
from everstep.engine.rollout import RolloutState
from everstep.trainer_bridge.c3po.config import C3poConfig
from everstep.trainer_bridge.c3po.words import Sample
from everstep.trainer_bridge.run.state import RunState
from everstep.trainer_bridge.run.words import KeptPrompt
from everstep.trainer_bridge.trajectories.record import trajectory_of

from .rollout_world import STEP_S, FakeEngine, FakeSource, Killed, World, digest, run, token_of


def in_memory() -> Path:
    """A folder whose syncs cost nothing, where there is one."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="everstep-", dir=shared if shared.is_dir() else None))


@pytest.fixture
def folder() -> Iterator[Path]:
    path = in_memory()
    yield path
    shutil.rmtree(path)


def short(seed: int, _: str) -> int:
    return 1 + digest("length", seed) % 12


def config(**values: object) -> C3poConfig:
    usual = {"budget": 40, "capacity": 5, "retention": 50, "group": 2}
    return C3poConfig(**{**usual, **values})  # type: ignore[arg-type]


def check(world: World, state: RunState, *, ids: list[str] | None = None) -> None:
    """Exactly one line per sample of each prompt that was not given up, groups whole and in one
    piece, tokens those of the seed, books balanced, budgets kept."""
    lines = world.sink.lines
    group = world.config.group
    pieces = [lines[i : i + group] for i in range(0, len(lines), group)]
    for piece in pieces:
        assert [one.sample.index for one in piece] == list(range(group))
        assert len({one.sample.prompt for one in piece}) == 1
    names = [piece[0].sample.prompt for piece in pieces]
    wanted = [f"{i}@{e}" for e in range(world.epochs) for i in (world.ids if ids is None else ids)]
    assert len(set(names)) == len(names)
    assert set(names) == set(wanted) - set(state.abandoned)
    for one in lines:
        rollout = one.rollout
        length = len(rollout.output_ids)
        assert length == world.engines[0].length_of(rollout.seed, one.prompt_id)
        assert rollout.output_ids == [token_of(rollout.seed, i) for i in range(length)]
        assert sum(spell.count for spell in one.spells) == length
        assert [s.iteration for s in one.spells] == sorted(s.iteration for s in one.spells)
        assert one.spells[-1].iteration <= one.iteration
        assert trajectory_of(one).retention <= world.config.retention
    assert len({one.rollout.seed for one in lines}) == len(lines)
    total = state.machine.total
    assert total.delivered == sum(len(one.rollout.output_ids) for one in lines)
    assert sum(books.sampled for books in state.books) == total.sampled
    assert total.sampled == total.delivered + total.wasted + total.carried + total.held
    assert sum(engine.unmetered for engine in world.engines) == 0
    if world.config.mode == "generated":
        used = Counter[int]()
        for engine in world.engines:
            used.update(engine.used())
        for books in state.books:
            assert books.sampled <= used[books.iteration] <= world.config.budget
    # the meter aside, which lets nobody run
    leases = [b for engine in world.engines for b in engine.budgets_.values() if b.places]
    assert {lease.places for lease in leases} <= {world.config.capacity}
    in_all = sum(b.used for engine in world.engines for b in engine.budgets_.values())
    # of an engine that stays away nobody is told what it still sampled
    assert total.sampled <= in_all if world.notes else total.sampled == in_all


def nothing_is_left(world: World) -> None:
    for engine in world.engines:
        for fake in engine.rollouts.values():
            assert fake.rollout.state.is_ended
            assert fake.is_acked
        assert not any(budget.is_open for budget in engine.budgets_.values())


@pytest.mark.parametrize("mode", ["generated", "completed"])
@pytest.mark.parametrize("num_engines", [1, 3])
def test_every_prompt_is_delivered_once_and_the_books_balance(folder, mode, num_engines):
    engines = [FakeEngine(f"e{i}", short) for i in range(num_engines)]
    world = World(folder, config(mode=mode), engines, [f"p{i}" for i in range(9)], epochs=2)
    state = run(world.live())
    check(world, state)
    nothing_is_left(world)
    assert all(engine.rollouts for engine in engines)


def test_an_iteration_samples_its_budget_to_the_token_until_work_runs_out(folder):
    world = World(folder, config(), [FakeEngine("e", short)], [f"p{i}" for i in range(12)])
    state = run(world.live())
    sampled = [books.sampled for books in state.books]
    assert len(sampled) > 2
    assert set(sampled[:-1]) == {40}
    assert 0 < sampled[-1] <= 40


def test_several_engines_share_a_budget_to_the_token(folder):
    engines = [FakeEngine(f"e{i}", short, slots=1 + i) for i in range(3)]
    world = World(folder, config(capacity=9), engines, [f"p{i}" for i in range(20)])
    state = run(world.live())
    check(world, state)
    assert {books.sampled for books in state.books[:-1]} == {40}
    leases = [len(engine.budgets_) for engine in engines]
    assert min(leases) > 2


@pytest.mark.parametrize("standby", [0, 12])
def test_who_stands_by_takes_a_free_place_in_the_same_step(folder, standby):
    engine = FakeEngine("e", short)
    # a word with the engine takes three steps
    engine.delay_s = 3 * STEP_S
    world = World(
        folder,
        config(budget=300, capacity=6, standby=standby),
        [engine],
        [f"p{i}" for i in range(100)],
    )
    state = run(world.live(limit=4))
    full = sum(rows == 6 for rows in engine.rows)
    if standby:
        # 300 tokens are 50 steps of 6
        assert [rows for rows in engine.rows if rows < 6] == []
        assert full == 200
    else:
        assert full < 0.7 * len(engine.rows)
    assert [books.sampled for books in state.books] == [300] * 4
    check(world, run(world.live()))
    nothing_is_left(world)


def test_nobody_overtakes_whoever_stands_by(folder):
    engine = FakeEngine("e", short)
    # calls arrive in the order in which they are made
    engine.delay_s = 0.0
    world = World(
        folder, config(group=1, capacity=2, standby=3), [engine], [f"p{i}" for i in range(30)]
    )
    check(world, run(world.live()))
    names = [fake.rollout.metadata["n"] for fake in engine.rollouts.values()]
    assert names == sorted(names)


def test_capacity_holds_when_a_second_engine_joins_a_run_whose_rollouts_stand_by(folder):
    engines = [FakeEngine(f"e{i}", short) for i in range(2)]
    world = World(folder, config(standby=7, budget=60), engines[:1], [f"p{i}" for i in range(30)])
    run(world.live(limit=2))
    world.engines, world.config = engines, config(budget=60)

    async def watched() -> tuple[RunState, int]:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                await asyncio.sleep(STEP_S / 2)
                most = max(most, sum(engine.num_begun for engine in engines))

        watcher = asyncio.create_task(watch())
        state = await world.live()
        watcher.cancel()
        return state, most

    state, most = run(watched())
    check(world, state)
    assert most == world.config.capacity
    assert all(engine.rows for engine in engines)


def test_purged_samples_are_drawn_anew_and_named_in_the_line(folder):
    engine = FakeEngine("e", lambda seed, _: 3 + digest(seed) % 15)
    # who is purged takes nothing of the budget, however long it takes to go
    engine.cancel_s = 0.1
    usual = config(retention=0, budget=30, capacity=6)
    world = World(folder, usual, [engine], [f"p{i}" for i in range(6)])
    state = run(world.live())
    check(world, state)
    aborted = [f.rollout for f in engine.rollouts.values() if f.rollout.state == "aborted"]
    assert sum(len(rollout.output_ids) for rollout in aborted) == state.tally.fallen["age"][1]
    assert state.machine.total.purged > 0
    fallen = [f for one in world.sink.lines for f in one.earlier]
    assert sum(f.tokens for f in fallen if f.reason == "age") <= state.machine.total.purged
    for one in world.sink.lines:
        assert [f.sample.attempt for f in one.earlier] == list(range(one.sample.attempt))
    assert state.tally.fallen["age"][1] == state.machine.total.purged


def test_a_limit_of_iterations_stops_it_and_a_larger_one_goes_on(folder):
    world = World(folder, config(), [FakeEngine("e", short)], [f"p{i}" for i in range(12)])
    state = run(world.live(limit=2))
    assert state.machine.iteration == 2
    assert state.machine.phase == "idle"
    some = len(world.sink.lines)
    assert run(world.live(limit=2)).machine.iteration == 2
    assert len(world.sink.lines) == some
    check(world, run(world.live()))


def test_a_run_that_dies_before_its_engines_are_told_tells_them_later(folder):
    class Deaf(FakeEngine):
        is_deaf = False

        async def known(self, pool):
            if self.is_deaf:
                raise EngineUnavailable(f"no answer from {self.name}")
            return await super().known(pool)

    engine = Deaf("e", lambda seed, _: 3 + digest(seed) % 15)
    # what is purged ends aborted, and nobody acknowledges it before the end
    world = World(folder, config(retention=0, budget=30), [engine], [f"p{i}" for i in range(6)])

    async def story() -> None:
        async def weather() -> None:
            await asyncio.sleep(0.1)
            engine.is_deaf = True

        storm = asyncio.create_task(weather())
        with pytest.raises(EngineUnavailable):
            await world.live()
        await storm

    run(story())
    left = world.open()
    assert left.machine.phase == "done"
    assert not left.is_over
    left.close()
    lines = list(world.sink.lines)
    engine.is_deaf = False
    state = run(world.live())
    assert state.is_over
    assert world.sink.lines == lines
    check(world, state)
    nothing_is_left(world)


def test_an_answer_of_an_engine_that_was_given_up_names_nothing_at_another(folder):
    """Both news may wait in one inbox (the simulation's seed 10618 of its day)."""
    engines = [FakeEngine("e0", short), FakeEngine("e1", short)]
    world = World(folder, config(), engines, ["p0", "p1"])
    state = world.open()
    state.engines = ["e0", "e1"]
    kept, _, position = FakeSource(world.ids).read(2)
    state.extend(kept, position)
    state.begin()
    place = next(place for place in state.places.values() if place.engine == "e0")
    state.engines = ["e1"]
    state.leave("e0")
    state.submitted([(place, "e0-0")])
    again = state.places[place.sample]
    assert (again.engine, again.rollout_id) == ("e1", None)
    state.submitted([(again, "e1-7")])
    assert again.rollout_id == "e1-7"
    state.close()


def test_done_is_done(folder):
    world = World(folder, config(), [FakeEngine("e", short)], ["p0", "p1"])
    run(world.live())
    lines, rollouts = list(world.sink.lines), len(world.engines[0].rollouts)
    state = run(world.live())
    assert state.machine.phase == "done"
    assert world.sink.lines == lines
    assert len(world.engines[0].rollouts) == rollouts


def test_bad_prompts_are_named_and_good_ones_are_not_lost(folder):
    engine = FakeEngine("e", short)
    engine.refused = {"p3"}
    world = World(folder, config(), [engine], ["p0", "bad", "p2", "p3", "p4"])
    state = run(world.live())
    check(world, state, ids=["p0", "p2", "p3", "p4"])
    assert state.bad_lines == {2: "prompt is empty", 4: "prompt: too long"}
    assert set(state.abandoned) == {"p3@0"}
    assert {one.prompt_id for one in world.sink.lines} == {"p0", "p2", "p4"}


def test_a_sample_that_fails_is_drawn_anew(folder):
    world = World(folder, config(), [FakeEngine("e", lambda *_: 5)], ["p0", "p1"])
    state = world.open()
    state.prompts["p1@0"] = KeptPrompt("p1@0", 2, 0, b"p1")
    world.engines[0].failing = {state.seed_of(Sample("p1@0", 1), "p1")}
    state.close()
    state = run(world.live())
    check(world, state)
    [line] = [one for one in world.sink.lines if one.earlier]
    assert (line.sample.prompt, line.sample.index, line.sample.attempt) == ("p1@0", 1, 1)
    assert [(f.reason, f.tokens) for f in line.earlier] == [("error", 1)]
    assert state.machine.total.regenerated == 1


def test_who_is_given_up_in_the_last_step_of_an_iteration_is_cancelled_before_the_next(folder):
    class Late(FakeEngine):
        """Whoever waits for an ending hears of it when the iteration is over."""

        async def ended(self, rollout_id):
            rollout = await super().ended(rollout_id)
            await asyncio.sleep(0.5)
            return rollout

    engine = Late("e", lambda *_: 30)
    world = World(
        folder,
        config(budget=2, capacity=2, max_reissues=0),
        [engine],
        [f"p{i}" for i in range(3)],
    )
    state = world.open()
    state.prompts["p0@0"] = KeptPrompt("p0@0", 1, 0, b"p0")
    engine.failing = {state.seed_of(Sample("p0@0", 0), "p0")}
    state.close()
    state = run(world.live())
    check(world, state)
    nothing_is_left(world)
    assert set(state.abandoned) == {"p0@0"}
    assert state.machine.total.cancelled == 2


def test_a_server_that_comes_back_goes_on_and_one_that_stays_away_is_booked(folder):
    engines = [FakeEngine(f"e{i}", lambda *_: 20, patience_s=2.0) for i in range(3)]
    world = World(folder, config(budget=120), engines, [f"p{i}" for i in range(12)])

    async def story() -> RunState:
        async def weather() -> None:
            await asyncio.sleep(0.1)
            engines[0].is_down = True
            await asyncio.sleep(1.0)
            engines[0].is_down = False
            await asyncio.sleep(0.05)
            # it goes on, unseen: what it holds of the budget must not be dealt again
            engines[1].is_cut_off = True

        storm = asyncio.create_task(weather())
        state = await world.live()
        await storm
        return state

    state = run(story())
    check(world, state)
    [note] = world.notes
    assert note.startswith("e1 stays away (no answer from e1)")
    assert "e0" not in note
    assert state.tally.lost_budget > 0
    assert state.tally.fallen["lost"][0] > 0
    assert {one.engine for one in world.sink.lines} >= {"e0", "e2"}


def test_an_engine_that_returns_is_swept_and_takes_part_again(folder):
    engines = [FakeEngine(f"e{i}", lambda *_: 90, patience_s=0.5) for i in range(2)]
    world = World(folder, config(budget=400, capacity=8), engines, [f"p{i}" for i in range(40)])

    async def story() -> RunState:
        async def weather() -> None:
            await asyncio.sleep(0.3)
            engines[0].is_down = True
            await asyncio.sleep(3.0)
            engines[0].is_down = False

        storm = asyncio.create_task(weather())
        state = await world.live()
        await storm
        return state

    state = run(story())
    check(world, state)
    assert any(note == "e0 is back" for note in world.notes)
    nothing_is_left(world)


def test_the_last_engine_is_not_given_up_and_the_run_goes_on_later(folder):
    engine = FakeEngine("e", lambda *_: 20, patience_s=0.5)
    world = World(folder, config(), [engine], [f"p{i}" for i in range(6)])

    async def story() -> None:
        async def weather() -> None:
            await asyncio.sleep(0.3)
            engine.is_down = True

        storm = asyncio.create_task(weather())
        with pytest.raises(EngineUnavailable, match="what is done is kept"):
            await world.live()
        await storm

    run(story())
    engine.is_down = False
    state = run(world.live())
    check(world, state)
    assert state.machine.total.regenerated == 0


def test_a_server_without_its_journal_loses_rollouts_and_they_are_sampled_again(folder):
    engine = FakeEngine("e", lambda *_: 20)
    world = World(folder, config(budget=90), [engine], [f"p{i}" for i in range(6)])
    run(world.live(limit=1))
    gone = {rid for rid, f in engine.rollouts.items() if not f.rollout.state.is_ended}
    assert gone
    for rollout_id in gone:
        engine.rollouts[rollout_id].rollout.state = RolloutState.FINISHED
        engine.rollouts[rollout_id].is_acked = True
    state = run(world.live())
    check(world, state)
    assert state.tally.fallen["lost"][0] == len(gone)
    assert state.machine.total.regenerated == state.tally.fallen["lost"][1] > 0
    # the same attempt, so the same seed: crashes must not favour short ones
    assert {one.sample.attempt for one in world.sink.lines} == {0}


class FillingEngine(FakeEngine):
    """Of each kind of call that needs room two of three find its disk full."""

    calls: Counter[str]

    def _room(self, verb: str) -> None:
        self.calls[verb] += 1
        if self.calls[verb] % 3:
            raise JournalFull("journal: no space left")

    async def submit(self, work):
        self._room("submit")
        return await super().submit(work)

    async def cancel(self, rollout_ids):
        self._room("cancel")
        await super().cancel(rollout_ids)

    async def acknowledge(self, rollout_ids):
        self._room("acknowledge")
        await super().acknowledge(rollout_ids)

    async def open_budget(self, pool, tokens, key, places=None):
        self._room("open_budget")
        return await super().open_budget(pool, tokens, key, places)

    async def close_budget(self, budget_id):
        self._room("close_budget")
        await super().close_budget(budget_id)


def test_a_run_waits_for_room_in_its_engines_and_says_so(folder):
    engine = FillingEngine("e", lambda seed, _: 3 + digest(seed) % 15)
    engine.calls = Counter()
    usual = config(retention=0, budget=30, capacity=6)
    world = World(folder, usual, [engine], [f"p{i}" for i in range(6)])
    state = run(world.live())
    assert state.machine.phase == "done"
    nothing_is_left(world)
    assert set(engine.calls) == {
        *("submit", "cancel", "acknowledge", "open_budget", "close_budget")
    }
    full = "e: journal: no space left; the run waits until there is room"
    assert set(world.notes[::2]) == {full}
    assert set(world.notes[1::2]) == {"e: there is room again; the run goes on"}


def test_a_loss_that_is_told_twice_loses_no_other_rollout(folder):
    ids = [f"p{i}" for i in range(6)]
    world = World(folder, config(budget=90), [FakeEngine("e", lambda *_: 20)], ids)
    run(world.live(limit=1))
    state = world.open()
    state.engines = ["e"]
    sample, place = next((s, p) for s, p in state.places.items() if p.rollout_id)
    state.begin()
    state.lost([(sample, place.rollout_id)])
    again = state.places[sample]
    assert again.key != place.key
    state.submitted([(again, "another")])
    state.lost([(sample, place.rollout_id)])
    assert state.places[sample] is again
    state.close()


def test_engines_with_other_weights_are_refused(folder):
    class Other(FakeEngine):
        async def start(self):
            facts = await super().start()
            return type(facts)(0, "e" * 64, facts.numerics)

    world = World(folder, config(), [FakeEngine("e0", short), Other("e1", short)], ["p0"])
    with pytest.raises(ConfigError, match="e0 serves dddddddddddd fake, e1 serves eeeeeeeeeeee"):
        run(world.live())
    world.engines = world.engines[:1]
    run(world.live(limit=1))
    world.engines = [Other("e0", short)]
    with pytest.raises(ConfigError, match="begun with weights"):
        run(world.live())


def test_versions_come_from_the_engine(folder):
    engine = FakeEngine("e", lambda *_: 20)
    world = World(folder, config(), [engine], [f"p{i}" for i in range(6)])
    run(world.live(limit=1))
    engine.version = 7
    state = run(world.live())
    check(world, state)
    assert state.machine.version == 7
    crossed = [one for one in world.sink.lines if len({s.version for s in one.spells}) > 1]
    assert crossed
    for one in crossed:
        assert [s.version for s in one.spells] == sorted(s.version for s in one.spells)


def test_two_processes_may_not_have_one_run(folder):
    world = World(folder, config(), [FakeEngine("e", short)], ["p0"])
    state = world.open()
    with pytest.raises(ConfigError, match="another process"):
        world.open()
    state.close()


@pytest.mark.parametrize(
    ("change", "word"),
    [({"seed": 1}, "seed 0, now it is 1"), ({"epochs": 3}, "epochs 1, now it is 3")],
)
def test_another_command_on_the_same_run_is_refused(folder, change, word):
    world = World(folder, config(), [FakeEngine("e", short)], ["p0"])
    run(world.live(limit=1))
    for name, value in change.items():
        setattr(world, name, value)
    with pytest.raises(ConfigError, match=word):
        world.open()


def test_budget_and_retention_may_change_between_iterations_and_the_group_may_not(folder):
    world = World(folder, config(), [FakeEngine("e", short)], [f"p{i}" for i in range(9)])
    run(world.live(limit=1))
    world.config = config(group=3)
    with pytest.raises(ConfigError, match=r"out.run: group is 3.*accepted: 2"):
        world.open()
    world.config = config(budget=25, retention=2)
    state = run(world.live(limit=2))
    assert state.books[-1].sampled == 25


@pytest.mark.parametrize("is_behind", [False, True])
@pytest.mark.parametrize(
    ("budget", "num_more", "stride", "standby"), [(17, 2, 1, 0), (4000, 40, 9, 0), (17, 4, 2, 3)]
)
def test_a_kill_at_any_commit_is_harmless(is_behind, budget, num_more, stride, standby):
    """Of a run with purges, bad prompts and two engines; of one long iteration; of one engine in
    which rollouts stand by."""
    commits, is_killed = 1 - stride, True
    while is_killed:
        commits += stride
        folder = in_memory()
        names = ["e0"] if standby else ["e0", "e1"]
        engines = [FakeEngine(name, lambda seed, _: 2 + digest(seed) % 9) for name in names]
        for engine in engines:
            engine.refused = {"p2"}
        more = [f"q{i}" for i in range(num_more)]
        ids = ["p0", "p1", "bad", "p2", "p3", *more]
        usual = config(budget=budget, capacity=4, retention=1, standby=standby)
        world = World(folder, usual, engines, ids)
        world.crash = (commits, is_behind)

        async def story(world: World = world, commits: int = commits) -> tuple[RunState, bool]:
            # the engines go on while the run is dead, as servers do
            workers = [asyncio.create_task(engine.work()) for engine in world.engines]
            is_killed = False
            try:
                await world.drive()
            except Killed:
                is_killed = True
                await asyncio.sleep(0.03 * (commits % 3))
            state = await world.drive()
            for worker in workers:
                worker.cancel()
            return state, is_killed

        try:
            state, is_killed = run(story())
            check(world, state, ids=["p0", "p1", "p2", "p3", *more])
            assert set(state.bad_lines) == {3, 4}
            nothing_is_left(world)
        finally:
            shutil.rmtree(folder)
    assert commits > 15


@st.composite
def stories(draw) -> dict:
    num_engines = draw(st.integers(1, 3))
    return {
        "mode": draw(st.sampled_from(["generated", "generated", "completed"])),
        "budget": draw(st.integers(1, 60)),
        "capacity": draw(st.integers(1, 8)),
        "standby": draw(st.sampled_from([0, 1, 5])) if num_engines == 1 else 0,
        "retention": draw(st.integers(0, 3)),
        "group": draw(st.integers(1, 3)),
        "num_engines": num_engines,
        "num_prompts": draw(st.integers(1, 8)),
        "epochs": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 1000)),
        "kills": draw(st.lists(st.sampled_from([0.004, 0.02, 0.07, 0.2, 0.6]), max_size=4)),
        "storms": draw(
            st.lists(
                st.tuples(
                    st.sampled_from([0.01, 0.05, 0.3]),
                    st.integers(0, num_engines - 1),
                    st.sampled_from([0.05, 0.5, 4.0, 9.0]),
                    st.booleans(),
                ),
                max_size=3,
            )
        ),
    }


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@example(
    # a lease is over, and its tokens cannot be read any more
    {
        "mode": "generated",
        "budget": 60,
        "capacity": 7,
        "standby": 0,
        "retention": 0,
        "group": 3,
        "num_engines": 2,
        "num_prompts": 4,
        "epochs": 1,
        "seed": 551,
        "kills": [],
        "storms": [(0.01, 0, 0.5, False), (0.01, 1, 4.0, False)],
    }
)
@given(stories())
def test_whatever_dies_nothing_is_lost_nothing_is_doubled(story):
    """Kills of the driver at any moment, servers that go and come, several engines or one."""
    folder = in_memory()
    names = ("mode", "budget", "capacity", "standby", "retention", "group")
    values = {name: story[name] for name in names}
    engines = [FakeEngine(f"e{i}", short) for i in range(story["num_engines"])]
    world = World(
        folder,
        C3poConfig(**values, max_reissues=1000),
        engines,
        [f"p{i}" for i in range(story["num_prompts"])],
        epochs=story["epochs"],
        seed=story["seed"],
    )

    async def weather() -> None:
        for wait_s, number, down_s, is_cut in story["storms"]:
            await asyncio.sleep(wait_s)
            engine = engines[number]
            engine.is_cut_off, engine.is_down = is_cut, not is_cut
            await asyncio.sleep(down_s)
            engine.is_cut_off = engine.is_down = False

    async def live() -> RunState:
        storm = asyncio.create_task(weather())
        kills = story["kills"]
        while True:
            try:
                state = await world.live(kills)
            except EngineUnavailable:
                # the last one: the user starts it again when the server is there
                kills = ()
                await asyncio.sleep(1.0)
            else:
                await storm
                return state

    try:
        state = run(live())
        check(world, state)
        event(f"purged {state.machine.total.purged > 0}")
        event(f"lost budget {state.tally.lost_budget > 0}")
        event(f"regenerated {state.machine.total.regenerated > 0}")
    finally:
        shutil.rmtree(folder)
