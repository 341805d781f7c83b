"""`everstep serve` as a process with a journal in a file: killed in mid-stream, started again."""

import threading
from pathlib import Path

import pytest

from everstep import Client
from everstep.engine.rollout import Rollout

from ..serving import Served

SAMPLING = {"max_tokens": 250, "ignore_eos": True, "seed": 5, "temperature": 1.0}


@pytest.fixture
def served(tiny_checkpoint: Path, tmp_path: Path):
    server = Served(tiny_checkpoint, tmp_path)
    try:
        yield server
    finally:
        server.end()


def columns(rollout: Rollout) -> tuple:
    return rollout.output_ids, rollout.lp_sampled, rollout.lp_temp, rollout.kept_mass, rollout.text


def test_a_stream_goes_on_through_kill_9_as_if_nothing_had_been(served):
    served.start()
    with Client(served.url) as client:
        body = {"prompt_ids": [5, 6, 7], "sampling": SAMPLING, "metadata": {"k": [1, None]}}
        # the same seed undisturbed, to compare with
        [calm] = client.submit(**body).rollout_ids
        calm_columns = columns(client.wait(calm))
        sent = client.submit(**body, idempotency_key="k")
        [rollout_id] = sent.rollout_ids
        seen, was_killed = [], False
        for event in client.stream(rollout_id):
            seen.append(event)
            if event.end >= 40 and not was_killed:
                assert event.end < 250
                served.kill()
                was_killed = True
                restart = threading.Thread(target=served.start)
                restart.start()
        restart.join()
        rollout = client.wait(rollout_id)
        assert [token for event in seen for token in event.output_ids] == rollout.output_ids
        assert [v for event in seen for v in event.lp_sampled] == rollout.lp_sampled
        assert "".join(event.text for event in seen) == rollout.text
        assert columns(rollout) == calm_columns
        assert rollout.metadata == {"k": [1, None]}
        assert len(rollout.segments) == 2
        assert client.submit(**body, idempotency_key="k") == sent
        assert client.export(rollout_id).startswith(b"EVST")
        client.ack([rollout_id, calm])
        assert [one.is_acked for one in client.list()] == [True, True]
    assert served.stop() == 0
