"""The loop on a thread of its own."""

import asyncio
import threading

from everstep.clients.loop_thread import LoopThread


def test_what_an_interrupted_call_does_at_its_end_is_waited_for() -> None:
    loop, is_ending, ended = LoopThread(), threading.Event(), []

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            is_ending.set()
            await asyncio.sleep(0.05)
            ended.append("as it should")

    future = loop.submit(work())
    loop.submit(asyncio.sleep(0)).result()
    future.cancel()
    assert is_ending.wait(10)
    loop.stop()
    assert ended == ["as it should"]
