"""The journal's thread: order, group commit, a full disk, a fault, the end."""

import asyncio
import threading

import pytest

from everstep.engine.errors import Conflict, IllegalState, JournalError, JournalFull
from everstep.engine.journal.memory import MemoryJournal
from everstep.engine.journal.ops import Accept, Append, End, Flip, Pause, Query
from everstep.engine.journal.thread import JournalThread
from everstep.engine.metrics import Registry
from tests.engine.journal.drawn import ORIGINS, end, make_grown, make_rollout


class SlowStore(MemoryJournal):
    """A store whose commits wait until they are let through, and fail as told."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(10**6)
        self.errors = []
        self.num_compacted = 0
        self.has_more = False

    def hold(self):
        self.gate = threading.Semaphore(0)

    def commit(self, ops):
        self.entered.release()
        assert self.gate.acquire(timeout=30)
        self.batches.append(list(ops))
        if self.errors:
            error = self.errors[0](ops) if callable(self.errors[0]) else self.errors[0]
            if error is not None:
                if not callable(self.errors[0]):
                    self.errors.pop(0)
                raise error
        super().commit(ops)

    def compact(self):
        self.num_compacted += 1
        super().compact()
        return self.has_more


def run(body, **options):
    async def managed():
        store = SlowStore()
        thread = JournalThread(store, **options)
        try:
            await asyncio.wait_for(body(thread, store), 30)
        finally:
            store.gate.release(10**6)
            await thread.close()
            assert not thread._thread.is_alive()

    asyncio.run(managed())


def accept(name):
    return Accept([make_rollout(name)])


def append(name, start, num=1):
    return Append(ORIGINS[0], [make_grown(name, start, num)])


def is_full(ops):
    return JournalFull("disk full") if ops else None


def test_what_arrives_during_a_commit_goes_into_the_next_in_order():
    async def body(thread, store):
        store.hold()
        first = thread.commit(accept("a"))
        await asyncio.to_thread(store.entered.acquire)
        done = []
        later = [thread.commit(append("a", t)) for t in range(5)]
        for number, future in enumerate([first, *later]):
            future.add_done_callback(lambda _, number=number: done.append(number))
        read = asyncio.ensure_future(thread.read("a"))
        await asyncio.sleep(0)
        assert not first.done()
        store.gate.release(2)
        rollout = await read
        assert [len(batch) for batch in store.batches] == [1, 5]
        assert done == list(range(6))
        assert rollout.output_ids == make_grown("a", 0, 5).ids

    run(body)


def test_the_loop_goes_on_while_the_disk_is_slow():
    async def body(thread, store):
        store.hold()
        future = thread.commit(accept("a"))
        await asyncio.to_thread(store.entered.acquire)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not future.done()
        store.gate.release()
        await future

    run(body)


def test_one_bad_op_fails_alone():
    async def body(thread, store):
        store.hold()
        futures = [thread.commit(accept("a"))]
        await asyncio.to_thread(store.entered.acquire)
        futures += [thread.commit(op) for op in (accept("b"), accept("a"), append("b", 3))]
        futures += [thread.commit(op) for op in (append("b", 0), Flip(1, "aa"))]
        store.gate.release(10)
        results = await asyncio.gather(*futures, return_exceptions=True)
        kinds = [type(result) for result in results]
        assert kinds == [type(None), type(None), Conflict, IllegalState, type(None), type(None)]
        recovered = await thread.recover()
        assert [len(r.output_ids) for r in recovered.live] == [0, 1]
        assert recovered.flip == (1, "aa")
        assert thread.failure is None

    run(body)


def test_a_full_journal_refuses_new_rollouts_and_takes_the_rest():
    async def body(thread, store):
        await thread.commit(accept("a"))
        store.errors = [
            lambda ops: JournalFull("full") if any(isinstance(op, Accept) for op in ops) else None
        ]
        store.hold()
        futures = [thread.commit(append("a", 0))]
        await asyncio.to_thread(store.entered.acquire)
        futures += [thread.commit(op) for op in (accept("b"), append("a", 1), accept("c"))]
        store.gate.release(100)
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(r) for r in results] == [type(None), JournalFull, type(None), JournalFull]
        assert thread.stalled is None
        assert len((await thread.read("a")).output_ids) == 2

    run(body)


def test_a_full_disk_stalls_keeps_what_must_not_be_lost_and_goes_on():
    async def body(thread, store):
        reasons = []
        thread.on_stall = reasons.append
        await thread.commit(accept("a"))
        store.errors = [is_full]
        futures = [thread.commit(append("a", 0))]
        while not reasons:
            await asyncio.sleep(0.001)
        assert (reasons, thread.stalled) == (["disk full"], "disk full")
        futures += [thread.commit(append("a", 1)), thread.commit(End(end(make_rollout("a"))))]
        with pytest.raises(JournalFull, match="disk full"):
            await thread.commit(accept("b"))
        # readers see what is durable, and are not made to wait
        assert (await thread.read("a")).output_ids == []
        assert not any(future.done() for future in futures)
        store.errors = []
        await asyncio.gather(*futures)
        assert (reasons, thread.stalled) == (["disk full", None], None)
        assert (await thread.read("a")).state == "finished"
        await thread.commit(accept("b"))

    run(body)


def test_closing_during_a_stall_fails_what_was_not_written():
    async def body(thread, store):
        await thread.commit(accept("a"))
        store.errors = [is_full]
        future = thread.commit(append("a", 0))
        await thread.close(timeout_s=0.05)
        with pytest.raises(JournalError, match="disk full"):
            await future

    run(body)


@pytest.mark.parametrize("error", [JournalError("fsync: EIO"), ZeroDivisionError("ours")])
def test_a_fault_ends_it_for_good(error):
    async def body(thread, store):
        await thread.commit(accept("a"))
        store.errors = [error]
        store.hold()
        futures = [thread.commit(append("a", 0))]
        await asyncio.to_thread(store.entered.acquire)
        futures += [thread.commit(append("a", 1)), thread.flush(), thread.read("a")]
        store.gate.release(10)
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert {type(result) for result in results} == {JournalError}
        assert thread.failure
        with pytest.raises(JournalError):
            await thread.commit(Pause(None))
        assert len(store.batches) == 2

    run(body)


def test_close_writes_what_was_given_and_then_refuses():
    async def body(thread, store):
        futures = [thread.commit(accept("a")), thread.commit(append("a", 0))]
        await thread.close()
        await asyncio.gather(*futures)
        for use in (thread.commit(Pause(None)), thread.list(Query()), thread.flush()):
            with pytest.raises(JournalError, match="closed"):
                await use
        await thread.close()

    run(body)


def test_a_waiter_that_gave_up_hurts_nobody():
    async def body(thread, store):
        store.hold()
        futures = [thread.commit(accept("a")), thread.commit(append("a", 0))]
        futures[0].cancel()
        store.gate.release(10)
        await futures[1]

    run(body)


def test_it_is_compacted_beside_its_work():
    async def body(thread, store):
        while store.num_compacted < 2:
            await asyncio.sleep(0.001)
        await thread.commit(accept("a"))

    run(body, compact_every_s=0.01)


def test_it_is_compacted_again_soon_while_there_is_more():
    async def body(thread, store):
        store.has_more = True
        while store.num_compacted < 3:
            await asyncio.sleep(0.001)

    run(body, compact_every_s=0.5)


def test_its_metrics_follow():
    registry = Registry()

    async def body(thread, store):
        await thread.commit(accept("a"))
        by_name = {m.name: m for m in registry.metrics}
        assert sum(by_name["everstep:journal_fsync_seconds"].counts) == 1
        assert by_name["everstep:journal_rows"].values[()] == 1
        assert by_name["everstep:journal_bytes"].values[()] == store.num_bytes

    run(body, metrics=registry)
