"""Batches over a journal: a line goes on at its last token, and nothing stays behind."""

import asyncio
from pathlib import Path

import pytest

from everstep.engine.config import RestartConfig
from everstep.engine.errors import EngineDied
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.ops import Query
from everstep.engine.journal.thread import JournalThread
from everstep.engine.manager.manager import RolloutManager
from everstep.engine.messages import Add
from everstep.engine.rollout import SamplingParams
from everstep.server.batches.lines import Defaults
from everstep.server.batches.output import BatchOutput
from everstep.server.batches.run import BatchRun

from .batch_backend import FakeBackend
from .test_batch_run import prompts, records, write_lines

DEFAULTS = Defaults(sampling=SamplingParams(max_tokens=12))


class Noting(FakeBackend):
    """Notes what it was asked to continue, and how many tokens it drew."""

    def __init__(self, steps_to_die: int | None = None) -> None:
        super().__init__(steps_to_die=steps_to_die)
        self.given: list[int] = []
        self.num_drawn = 0

    def send(self, messages):
        self.given += [len(m.output_ids) for m in messages if isinstance(m, Add)]
        super().send(messages)

    def _step(self, add):
        self.num_drawn += 1
        return super()._step(add)


class Kept(MemoryJournal):
    """What a file is: closing ends nothing."""

    def close(self) -> None:
        pass


def run(source: Path, output: BatchOutput, backend: FakeBackend, journal: MemoryJournal) -> None:
    async def go() -> None:
        manager = RolloutManager(
            backend,
            None,
            restarts=RestartConfig(attempts=0),
            journal=JournalThread(journal),
        )
        await manager.start()
        try:
            batch = BatchRun(
                manager, None, source, output, defaults=DEFAULTS, window=4, scope="batch"
            )
            await batch.run()
        finally:
            await manager.close()

    asyncio.run(go())


@pytest.mark.parametrize("steps", [1, 5, 11, 13, 30])
def test_a_killed_batch_goes_on_at_its_last_tokens(tmp_path: Path, steps: int) -> None:
    source = write_lines(tmp_path / "in", [*prompts(9), {"prompt": [999]}])
    output = BatchOutput(tmp_path / "whole")
    run(source, output, Noting(), Kept())
    output.close()
    journal, first, second = Kept(), Noting(steps_to_die=steps), Noting()
    output = BatchOutput(tmp_path / "out")
    with pytest.raises(EngineDied):
        run(source, output, first, journal)
    run(source, output, second, journal)
    output.close()
    assert records(tmp_path / "out") == records(tmp_path / "whole")
    # no token was drawn twice that a journal could know of: at most one step of four lines
    assert 9 * 12 <= first.num_drawn + second.num_drawn <= 9 * 12 + 4
    if steps % 12 > 1:
        assert any(second.given), "nothing was gone on with"
    assert all(summary.is_acked for summary in journal.list(Query(limit=1000)))


def test_every_parameter_of_a_line_can_be_journaled(tmp_path: Path) -> None:
    line = {
        "custom_id": "x",
        "prompt": [5],
        "logit_bias": {"7": -100, "3": 2.5},
        "stop_token_ids": [9],
    }
    source = write_lines(tmp_path / "in", [line, *prompts(2)])
    output = BatchOutput(tmp_path / "out")
    run(source, output, Noting(), Kept())
    output.close()
    assert [r["error"] for r in records(tmp_path / "out").values()] == [None] * 3


def test_lines_that_changed_or_went_leave_nothing_running(tmp_path: Path) -> None:
    journal = Kept()
    source = write_lines(tmp_path / "in", prompts(4))
    output = BatchOutput(tmp_path / "out")
    with pytest.raises(EngineDied):
        run(source, output, Noting(steps_to_die=5), journal)
    write_lines(source, [{"custom_id": "p0", "prompt": [3, 3]}, prompts(4)[1]])
    run(source, output, Noting(), journal)
    output.close()
    assert sorted(records(tmp_path / "out")) == ["p0", "p1"]
    assert all(summary.is_acked for summary in journal.list(Query(limit=1000)))


def test_a_record_that_was_taken_away_is_made_again(tmp_path: Path) -> None:
    journal = Kept()
    source = write_lines(tmp_path / "in", prompts(3))
    for name in ("one", "two"):
        output = BatchOutput(tmp_path / name)
        run(source, output, Noting(), journal)
        output.close()
    assert records(tmp_path / "one") == records(tmp_path / "two")
