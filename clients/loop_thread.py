"""An event loop on a thread of its own, for blocking callers."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads until `stop`, which leaves no thread behind."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # one worker, ended with the loop, so that no thread outlives it
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._loop.set_default_executor(self._executor)
        self._thread = threading.Thread(target=self._run, name="everstep-llm", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run and wait; if the waiting is interrupted, the coroutine is cancelled and awaited."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # stopped before
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                # a second cancellation would end what the first one has begun to wait for
                if not task.cancelling():
                    task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        finally:
            self._executor.shutdown(wait=True)
            self._loop.close()
