"""Rewards in processes of their own, each sample under a deadline.

    async with RewardPool(config) as pool:          with Rewards(config) as rewards:
        outcome = await pool.score(sample)              outcomes = rewards.score(samples)

Whatever a reward does ends in one `RewardOutcome` for its sample and in nothing else: a worker
that hangs, crashes or is killed is replaced, and the samples that wait go on with the others.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import msgspec
from msgspec import Struct

from ...engine.errors import ConfigError, EverstepError, MissingExtra
from .rewards import RewardConfig, RewardError, RewardSample
from .worker import HEAD_BYTES, Failed, FromWorker, Ready, Scored, Unusable, frame, length_of

_DECODER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_MAX_FRAME_BYTES = 1 << 20


class RewardOutcome(Struct, frozen=True, kw_only=True):
    """What became of one sample.

    reward   None: it has none (`on_failure = "drop"`); the sample trains nothing
    failure  one line that names the reward and the sample; None: the reward is the reward's own
    """

    id: str
    reward: float | None
    failure: str | None = None
    seconds: float = 0.0


class RewardPool:
    """`config.workers` processes. One task each; to be used by one event loop."""

    def __init__(self, config: RewardConfig) -> None:
        config.check()
        self._config = config
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        self._workers: list[_Worker] = []
        self.num_replaced = 0
        """Workers that were killed or died, since the start."""

    async def start(self) -> None:
        """Start the first worker. Raises ConfigError or MissingExtra if the reward is unusable.

        The others start when there is work for them.
        """
        self._workers = [_Worker(self._config) for _ in range(self._config.workers)]
        try:
            await self._workers[0].start()
        except RewardError as error:
            raise ConfigError(f"{_name(self._config)} {error}") from None
        for worker in reversed(self._workers):
            self._idle.put_nowait(worker)

    async def score(self, sample: RewardSample) -> RewardOutcome:
        """The outcome of one sample; raises nothing that a reward did. Waits for a free worker."""
        worker = await self._idle.get()
        begun = time.perf_counter()
        try:
            reward = await worker.score(sample)
        except RewardError as error:
            return self._failed(sample, str(error), time.perf_counter() - begun)
        finally:
            # cancelled in mid-sample too: what it would answer belongs to nobody
            if worker.is_spoilt:
                worker.kill()
                self.num_replaced += 1
            self._idle.put_nowait(worker)
        return RewardOutcome(id=sample.id, reward=reward, seconds=time.perf_counter() - begun)

    async def score_all(self, samples: Sequence[RewardSample]) -> list[RewardOutcome]:
        """The outcomes, in order."""
        return list(await asyncio.gather(*map(self.score, samples)))

    async def close(self) -> None:
        """Kill the workers."""
        workers, self._workers = self._workers, []
        for worker in workers:
            await worker.close()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _failed(self, sample: RewardSample, message: str, seconds: float) -> RewardOutcome:
        reward = self._config.failure_reward if self._config.on_failure == "reward" else None
        failure = f"{_name(self._config)} {message}; rollout {sample.id} gets " + (
            f"{reward:g}" if reward is not None else "no reward"
        )
        return RewardOutcome(id=sample.id, reward=reward, failure=failure, seconds=seconds)


class Rewards:
    """A `RewardPool` for programs without an event loop."""

    def __init__(self, config: RewardConfig) -> None:
        self._pool = RewardPool(config)
        self._runner = asyncio.Runner()

    def score(self, samples: Sequence[RewardSample]) -> list[RewardOutcome]:
        """The outcomes, in order."""
        return self._runner.run(self._pool.score_all(samples))

    def close(self) -> None:
        """Kill the workers."""
        self._runner.run(self._pool.close())
        self._runner.close()

    def __enter__(self) -> Self:
        """Start. Raises ConfigError or MissingExtra if the reward is unusable."""
        try:
            self._runner.run(self._pool.start())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Worker:
    """One process at a time, started when it is needed."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self._ended: list[asyncio.subprocess.Process] = []
        self.is_spoilt = False
        """The process cannot be used for another sample."""

    async def start(self) -> None:
        """Raises RewardError, or what the worker says of its reward."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "everstep.trainer_bridge.rewards.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # killed with whatever it started
            start_new_session=True,
        )
        self.is_spoilt = True
        answer = await self._ask(self._config, self._config.start_deadline_s, "to be imported")
        if isinstance(answer, Unusable):
            raise _error_of(answer)
        if not isinstance(answer, Ready):
            raise RewardError(f"answered {answer!r} at its start")
        self.is_spoilt = False

    async def score(self, sample: RewardSample) -> float:
        """Raises RewardError; `is_spoilt` says whether the process is lost."""
        if self._process is None:
            try:
                await self.start()
            except EverstepError as error:
                raise RewardError(str(error)) from None
            except OSError as error:
                # no memory or no process to be had just now
                raise RewardError(f"has no worker: {error.strerror}") from None
        self.is_spoilt = True
        answer = await self._ask(sample, self._config.deadline_s, "for it")
        if isinstance(answer, Scored):
            self.is_spoilt = False
            return answer.reward
        if isinstance(answer, Failed):
            self.is_spoilt = False
            raise RewardError(answer.message)
        raise RewardError(f"answered {answer!r}")

    def kill(self) -> None:
        """End the process and its children; the next sample starts another."""
        process, self._process, self.is_spoilt = self._process, None, False
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._ended = [one for one in (*self._ended, process) if one.returncode is None]

    async def close(self) -> None:
        self.kill()
        for process in self._ended:
            await process.wait()
        self._ended.clear()

    async def _ask(self, message: object, deadline_s: float, what: str) -> FromWorker:
        assert self._process is not None
        try:
            async with asyncio.timeout(deadline_s):
                return await self._exchange(self._process, frame(message))
        except TimeoutError:
            raise RewardError(f"took more than {deadline_s:g} s {what}") from None

    async def _exchange(self, process: asyncio.subprocess.Process, data: bytes) -> FromWorker:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(data)
            await process.stdin.drain()
            length = length_of(await process.stdout.readexactly(HEAD_BYTES))
            if length > _MAX_FRAME_BYTES:
                raise RewardError("wrote between the frames of its worker")
            return _DECODER.decode(await process.stdout.readexactly(length))
        except (ConnectionError, asyncio.IncompleteReadError):
            code = await process.wait()
            raise RewardError(f"ended its worker: {_ending(code)}") from None
        except msgspec.DecodeError:
            raise RewardError("wrote between the frames of its worker") from None


def _name(config: RewardConfig) -> str:
    """`reward my.rewards:score`, as messages begin."""
    what = {"function": config.function.path, "http": config.http.url}
    return f"reward {what.get(config.name, config.name)}"


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _error_of(answer: Unusable) -> EverstepError:
    kind = MissingExtra if answer.code == MissingExtra.code else ConfigError
    error = kind.__new__(kind)
    error.args = (answer.message,)
    return error
