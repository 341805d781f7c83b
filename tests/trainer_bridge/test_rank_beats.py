"""Who is gone when ranks stop answering, and what is said of it."""

from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore

from everstep.trainer_bridge.trainer import rank_beats
from everstep.trainer_bridge.trainer.rank_beats import Beats

from .training_runs import free_port, make_run, start, write_config


@pytest.fixture
def met(monkeypatch):
    """Three ranks that beat, and the store that the first of them hosts: ([Beats], [store])."""
    monkeypatch.setattr(rank_beats, "BEAT_S", 0.05)
    monkeypatch.setattr(rank_beats, "SILENCE_S", 0.8)
    port = free_port()
    store = [TCPStore("127.0.0.1", port, is_master=True, timeout=timedelta(seconds=5))]
    ranks = [Beats("127.0.0.1", port, rank, 3) for rank in range(3)]
    yield ranks, store
    for rank in ranks:
        rank.close()


def test_the_rank_that_stopped_is_named(met):
    ranks, _ = met
    assert ranks[0].missing() == []
    ranks[2].close()
    assert ranks[0].missing() == [2]
    ranks[1].close()
    assert ranks[0].missing() == [1, 2]


def test_the_first_rank_is_named_where_its_store_is_gone(met):
    ranks, store = met
    store.clear()
    assert ranks[1].missing() == [0]


def test_another_rank_is_named_where_the_first_has_ended_because_of_it(met, monkeypatch):
    ranks, store = met
    ranks[2].close()
    count, calls = ranks[1]._count, []

    def counted(rank):
        calls.append(rank)
        if len(calls) == 16:
            store.clear()
        return count(rank)

    monkeypatch.setattr(ranks[1], "_count", counted)
    assert ranks[1].missing() == [2]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_never_meet_are_said_in_one_line(tmp_path, rank):
    config = write_config(make_run(tmp_path, groups=1), "alone", timeout_s=1.0)
    process = start(config, rank=rank, size=2, port=free_port())
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith("error: the 2 ranks did not meet at 127.0.0.1:"), said
    assert "Traceback" not in said
