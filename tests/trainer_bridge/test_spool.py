"""The spool: what was added is there after any end, and what was not is not."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.engine.errors import BridgeError
from everstep.trainer_bridge.trajectories.spool import Serving, Spool

from .bridge_groups import group


# it waits for the disk
@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), max_size=4), max_size=5), st.integers(-1, 5))
def test_groups_come_back_in_another_life(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], released: int
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder)
    added = [[group(f"{i}:{n}", [n, 3]) for n in sizes] for i, sizes in enumerate(lengths)]
    for iteration, groups in enumerate(added):
        spool.add(iteration, groups)
        spool.add(iteration, [])
    asyncio.run(spool.release(released))
    again = Spool(folder)
    # the newest stays, for an engine that is killed before it knows what came of it
    first = max(0, min(released + 1, len(lengths) - 1))
    assert again.iterations == list(range(first, len(lengths)))
    for iteration in again.iterations:
        assert list(again.sizes(iteration)) == [g.num_tokens for g in added[iteration]]
        for index, wanted in enumerate(added[iteration]):
            assert asyncio.run(again.load(iteration, index)) == wanted


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_file_that_was_cut_is_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    Spool(folder).add(7, [group("a", [2, 3])])
    file = folder / "iteration-00000007.groups"
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(BridgeError, match=r"iteration-00000007\.groups"):
        Spool(folder)


def test_half_a_write_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "iteration-00000003.partial").write_bytes(b"half")
    assert Spool(tmp_path).iterations == []
    assert not list(tmp_path.iterdir())


def test_what_serves_is_there_in_another_life(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    assert Spool(folder).serving is None
    for version in (3, 4):
        serving = Serving(version, "d" * 64, f"/versions/v{version}", "lineage")
        Spool(folder).serve(serving)
        assert Spool(folder).serving == serving
    (folder / "serving.json").write_text("{")
    with pytest.raises(BridgeError, match=r"serving\.json"):
        Spool(folder)


def test_what_was_released_goes_when_the_next_one_comes(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.add(4, [group("a", [2])])
    asyncio.run(spool.release(4))
    assert Spool(tmp_path).iterations == [4]
    spool.add(5, [group("b", [2])])
    assert Spool(tmp_path).iterations == spool.iterations == [5]


def test_a_run_that_is_over_leaves_no_folder(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.serve(Serving(1, "d", "/v1", "a"))
    spool.add(0, [group("a", [2])])
    # something that nobody has released is not thrown away
    spool.remove()
    assert Spool(tmp_path / "spool").iterations == [0]
    asyncio.run(spool.release(0))
    spool.remove()
    assert not (tmp_path / "spool").exists()
