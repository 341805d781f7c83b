"""The driver of C3PO++ while weights change: trainers that go back, engines that are behind."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from everstep.engine.errors import EngineUnavailable, IllegalState
from everstep.trainer_bridge.run.parts import Groups, Taught
from everstep.trainer_bridge.run.state import RunState

from .rollout_world import FakeEngine, FakeLearner, Killed, World, digest, run
from .test_rollout_driver import check, config, in_memory, nothing_is_left


@pytest.fixture
def folder() -> Iterator[Path]:
    path = in_memory()
    yield path
    shutil.rmtree(path)


def long(seed: int, _: str) -> int:
    return 10 + digest("length", seed) % 30


def make(folder: Path, num_engines: int = 1, num_prompts: int = 12, **values: object) -> World:
    engines = [FakeEngine(f"e{i}", long, patience_s=0.5) for i in range(num_engines)]
    usual = config(**{"budget": 80, "capacity": 6, **values})
    world = World(folder, usual, engines, [f"p{i}" for i in range(num_prompts)])
    world.learner = FakeLearner(engines)
    return world


def check_trained(world: World, state: RunState) -> None:
    """Every delivered group was trained once."""
    assert world.learner is not None
    names = [name for found in world.learner.trained.values() for name in found]
    assert len(names) == len(set(names))
    assert set(names) == {one.sample.prompt for one in world.sink.lines}
    assert all(one.reward == 1.0 for one in world.sink.lines)


def test_versions_go_up_with_iterations_on_every_engine(folder: Path) -> None:
    world = make(folder, num_engines=2)
    state = run(world.live())
    check(world, state)
    check_trained(world, state)
    nothing_is_left(world)
    assert state.machine.version == state.machine.iteration
    for one in world.sink.lines:
        assert all(spell.version == spell.iteration for spell in one.spells)
    assert world.learner is not None
    assert world.learner.is_over


def test_a_trainer_that_goes_back_in_mid_iteration_takes_the_engines_with_it(folder: Path) -> None:
    world = make(folder, num_engines=2, max_lag=9)
    learner = world.learner
    assert learner is not None

    async def story() -> RunState:
        async def weather() -> None:
            while learner.version < 3:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            learner.go_back_to(1)

        storm = asyncio.create_task(weather())
        state = await world.live()
        await storm
        return state

    state = run(story())
    check(world, state)
    check_trained(world, state)
    assert state.machine.version == state.machine.iteration
    back = [
        one for one in world.sink.lines if (3, 1) in {(s.iteration, s.version) for s in one.spells}
    ]
    assert back
    # under way when it happened, and going on: the order of its versions is what was
    assert any(
        [s.version for s in one.spells] != sorted(s.version for s in one.spells) for one in back
    )
    # the iteration after it is sampled under what it came to
    later = {s.version for one in world.sink.lines for s in one.spells if s.iteration == 4}
    assert later == {4}


def test_a_lower_version_is_taken_of_a_new_lineage_alone(folder: Path) -> None:
    class Lower(FakeLearner):
        is_turned = False

        async def train(self, iteration: int, groups: Groups, engines: object) -> Taught:
            taught = await super().train(iteration, groups, list(self.engines))
            version = 1 if iteration == 3 else taught.version
            return Taught(version, {}, self.is_turned and iteration == 3)

    world = make(folder)
    world.learner = Lower(world.engines)
    with pytest.raises(IllegalState, match="version 1 after 3: versions never decrease"):
        run(world.live())
    world.learner.is_turned = True
    state = run(world.live())
    assert state.machine.phase == "done"
    assert state.machine.version == state.machine.iteration


def test_an_engine_that_was_away_is_given_what_the_others_serve_before_it_takes_part(
    folder: Path,
) -> None:
    world = make(folder, num_engines=2, num_prompts=60)
    learner, (_, other) = world.learner, world.engines
    assert learner is not None

    async def story() -> RunState:
        async def weather() -> None:
            while learner.version < 1:
                await asyncio.sleep(0.01)
            # while the next version is given, it is not there
            other.is_down = True
            await asyncio.sleep(8.0)
            other.is_down = False

        storm = asyncio.create_task(weather())
        state = await world.live()
        await storm
        return state

    learner.seconds = 1.0
    state = run(story())
    check(world, state)
    check_trained(world, state)
    assert any(note.startswith("e1 stays away") for note in world.notes)
    assert "e1 is back" in world.notes
    mine = [s for one in world.sink.lines if one.engine == "e1" for s in one.spells]
    assert all(spell.version == spell.iteration for spell in mine)
    assert max(spell.iteration for spell in mine) > 4


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    commit=st.integers(1, 60),
    is_behind=st.booleans(),
    num_engines=st.integers(1, 2),
    turns=st.lists(
        st.tuples(st.sampled_from([0.03, 0.2, 0.7, 1.5]), st.integers(1, 3)), max_size=3
    ),
    storms=st.lists(
        st.tuples(st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([0.1, 2.0])), max_size=2
    ),
    max_lag=st.none() | st.integers(0, 3),
)
def test_kills_and_ways_back_at_any_moment(
    commit: int,
    is_behind: bool,
    num_engines: int,
    turns: list[tuple[float, int]],
    storms: list[tuple[float, float]],
    max_lag: int | None,
) -> None:
    folder = in_memory()
    world = make(folder, num_engines, num_prompts=10, max_lag=max_lag, max_reissues=1000)
    world.crash = (commit, is_behind)
    learner = world.learner
    assert learner is not None

    async def ways_back() -> None:
        for wait_s, steps in turns:
            await asyncio.sleep(wait_s)
            if learner.version > steps:
                learner.go_back_to(learner.version - steps)

    async def weather() -> None:
        for wait_s, down_s in storms:
            await asyncio.sleep(wait_s)
            world.engines[-1].is_down = True
            await asyncio.sleep(down_s)
            world.engines[-1].is_down = False

    async def story() -> RunState:
        workers = [asyncio.create_task(engine.work()) for engine in world.engines]
        others = [asyncio.create_task(ways_back()), asyncio.create_task(weather())]
        while True:
            try:
                state = await world.drive()
            except (Killed, EngineUnavailable):
                await asyncio.sleep(0.3)
            else:
                await asyncio.gather(*others)
                for worker in workers:
                    worker.cancel()
                return state

    try:
        state = run(story())
        check(world, state)
        check_trained(world, state)
        event(f"went back {learner.num_backs} times")
    finally:
        shutil.rmtree(folder)
