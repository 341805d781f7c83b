"""Offline batches: a file of lines in, a file of records out, resumable after any kill.

The input is read as a stream and a bounded window of it is in flight, so memory does not grow
with the file. Exactly one record per custom_id; a line that cannot be run gets an error record.
Over a journal (`scope`) a line goes on at the token where a kill found it.

Ids: `custom_id` (a plain line may say `id`), else `line-N`. The second line with an id that was
taken is an error, recorded as `line-N` of its own number.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import Struct

from ...engine.errors import ConfigError, EverstepError, InvalidRequest
from ...engine.manager.manager import RolloutManager
from ...engine.rollout import RolloutState
from ...engine.tokenizer import Tokenizer
from ..config import OpenAIConfig, ServeConfig
from ..service import Service
from .jobs import Jobs
from .lines import Defaults, Job, explicit_id, job_of, parse_line
from .output import BatchOutput, IdSet
from .records import Recorder, refusal

# lines in flight per running rollout: enough that the core never waits for the front
WINDOW = 4
MAX_LINE_BYTES = 256 * 2**20
PROGRESS_EVERY_S = 0.5
# skipped lines between two chances for the rest of the loop
YIELD_EVERY = 256


class Counts(Struct):
    """How far a run is. Bytes are of the input: its number of lines is not known before its end."""

    bytes_done: int = 0
    bytes_total: int = 0
    bytes_skipped: int = 0
    num_answered: int = 0
    num_errors: int = 0
    num_skipped: int = 0
    """Lines that an earlier run has done."""
    num_in_flight: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    """Of the records written by this run."""
    tokens_per_s: float = 0.0
    elapsed_s: float = 0.0

    @property
    def fraction(self) -> float:
        return self.bytes_done / self.bytes_total if self.bytes_total else 1.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at this run's own pace; None while nothing is known."""
        done = self.bytes_done - self.bytes_skipped
        if done <= 0 or self.elapsed_s <= 0:
            return None
        return (self.bytes_total - self.bytes_done) / done * self.elapsed_s


OnCounts = Callable[[Counts], None]


def _ignore(_: Counts) -> None:
    return None


class Line(Struct, frozen=True):
    """A line of the input with its number, from 1. `raw` is empty if it is too long to read."""

    number: int
    raw: bytes
    num_bytes: int

    @property
    def is_blank(self) -> bool:
        return not self.raw.strip() and self.num_bytes <= MAX_LINE_BYTES

    def parse(self) -> dict[str, Any]:
        """Its JSON object; raises InvalidRequest."""
        if self.num_bytes > MAX_LINE_BYTES:
            raise InvalidRequest(
                f"the line has {self.num_bytes} bytes, at most {MAX_LINE_BYTES} are read"
            )
        return parse_line(self.raw)


class BatchRun:
    """One pass over the input. `output` is open and locked; it stays open.

    scope  names the batch in the manager's journal; None: nothing is journaled
    """

    def __init__(
        self,
        manager: RolloutManager,
        tokenizer: Tokenizer | None,
        source: Path,
        output: BatchOutput,
        *,
        defaults: Defaults,
        window: int = WINDOW * 128,
        scope: str | None = None,
        priority: int = 0,
        on_counts: OnCounts = _ignore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = manager
        self._jobs = Jobs(manager, scope, priority=priority)
        config = ServeConfig(openai=defaults.openai)
        self._service = Service(manager, tokenizer, config, created=0)
        self._source = source
        self._output = output
        self._defaults = defaults
        self._window = window
        self._on_counts = on_counts
        self._clock = clock
        self._seen = IdSet()
        self._in_flight: dict[asyncio.Task[None], Job] = {}
        self._done: asyncio.Queue[asyncio.Task[None]] = asyncio.Queue()
        self._num_rollouts = 0
        self.counts = Counts()

    async def run(self) -> Counts:
        """Answer every line that has no record yet.

        Raises ConfigError where input or output cannot be used, EngineUnavailable where the
        engine is gone for good: what is written stays, and the same command goes on from there.
        """
        started = self._clock()
        try:
            with open(self._source, "rb", buffering=1 << 20) as source:
                stat = os.fstat(source.fileno())
                self.counts.bytes_total = stat.st_size
                self._recorder = self._make_recorder(int(stat.st_mtime))
                ticker = asyncio.create_task(self._tick(started))
                try:
                    await self._pass(source)
                    self._output.sync()
                    await self._jobs.finish()
                finally:
                    ticker.cancel()
                    await self._stop()
        except OSError as error:
            raise ConfigError(f"{self._source} cannot be read: {error.strerror}") from None
        self._report(started)
        return self.counts

    def _make_recorder(self, created: int) -> Recorder:
        fingerprint = fingerprint_of(self._manager, self._defaults)
        earlier = self._output.fingerprint
        if earlier is not None and earlier != fingerprint:
            raise ConfigError(
                f"{self._output.path} was written with another model, seed or sampling "
                f"({earlier}, now {fingerprint}); repeat the first command, or name another output"
            )
        tokenizer = self._service.tokenizer
        return Recorder(
            model=self._defaults.model_names[0],
            created=created,
            fingerprint=fingerprint,
            tokenizer=tokenizer,
            openai=self._defaults.openai,
            eos_ids=tokenizer.eos_ids if tokenizer else tuple(self._manager.info.eos_ids),
        )

    async def _pass(self, source: BinaryIO) -> None:
        for line in read_lines(source):
            await self._admit(line)
            if line.number % YIELD_EVERY == 0:
                await asyncio.sleep(0)
        while self._in_flight:
            await self._reap()

    async def _admit(self, line: Line) -> None:
        """Skip, refuse or start one line."""
        if line.is_blank:
            self.counts.bytes_done += line.num_bytes
            return
        problem, data = None, {}
        try:
            data = line.parse()
            wanted = explicit_id(data)
        except InvalidRequest as error:
            wanted, problem = None, error
        if wanted is not None and not self._seen.add(wanted):
            problem = InvalidRequest(
                f"custom_id {wanted!r} is that of an earlier line", field="custom_id"
            )
            wanted = None
        custom_id = self._derived_id(line.number) if wanted is None else wanted
        if custom_id in self._output.ids:
            self.counts.num_skipped += 1
            self.counts.bytes_done += line.num_bytes
            self.counts.bytes_skipped += line.num_bytes
            return
        try:
            if problem is not None:
                raise problem
            job = await job_of(data, custom_id, self._defaults, self._service)
            await self._start(line, job)
        except InvalidRequest as error:
            self._write_error(line, custom_id, error)

    def _derived_id(self, number: int) -> str:
        """`line-N`; where another line took that name, the next free one. The same in each run."""
        name, count = f"line-{number}", 1
        while not self._seen.add(name):
            count += 1
            name = f"line-{number}-{count}"
        return name

    async def _start(self, line: Line, job: Job) -> None:
        while self._in_flight and self._num_rollouts + job.num_rollouts > self._window:
            await self._reap()
        self._num_rollouts += job.num_rollouts
        task = asyncio.create_task(self._finish(line, job))
        task.add_done_callback(self._done.put_nowait)
        self._in_flight[task] = job

    async def _finish(self, line: Line, job: Job) -> None:
        """Run a job and write its record."""
        try:
            rollouts = await self._jobs.run(job)
        except InvalidRequest as error:
            self._write_error(line, job.custom_id, error)
            return
        if not self._manager.is_healthy:
            _ = self._manager.info  # raises, with the reason: no record for what may go on
        failed = [r for r in rollouts if r.state != RolloutState.FINISHED]
        if failed:
            reason = failed[0].finish_reason
            detail = (reason.detail or reason.type) if reason else "it ended without a reason"
            self._write_error(line, job.custom_id, EverstepError(detail))
        else:
            self._output.append(self._recorder.answer(job, rollouts))
            self._output.ids.add(job.custom_id)
            self.counts.num_answered += 1
            self.counts.bytes_done += line.num_bytes
            self.counts.prompt_tokens += sum(len(prompt) for prompt in job.prompts)
            self.counts.output_tokens += sum(len(r.output_ids) for r in rollouts)
        self._jobs.wrote(rollouts)
        if self._output.is_synced:
            await self._jobs.acknowledge()

    def _write_error(self, line: Line, custom_id: str, error: EverstepError) -> None:
        self._output.append(refusal(custom_id, error, line.number))
        self._output.ids.add(custom_id)
        self._output.num_errors += 1
        self.counts.num_errors += 1
        self.counts.bytes_done += line.num_bytes

    async def _reap(self) -> None:
        """Wait until one job has its record."""
        task = await self._done.get()
        self._num_rollouts -= self._in_flight.pop(task).num_rollouts
        task.result()

    async def _stop(self) -> None:
        """End what is in flight without a record (an interrupted run leaves it to the next)."""
        for task in self._in_flight:
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        self._in_flight.clear()

    async def _tick(self, started: float) -> None:
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            self._report(started)

    def _report(self, started: float) -> None:
        counts = self.counts
        elapsed = self._clock() - started
        counts.num_in_flight = len(self._in_flight)
        total = counts.output_tokens
        if self._manager.stats is not None:
            # the core also counts tokens of lines that are not done yet
            total = max(total, self._manager.stats.generation_tokens_total)
        counts.tokens_per_s = total / elapsed if elapsed > 0 else 0.0
        counts.elapsed_s = elapsed
        self._on_counts(counts)


def read_lines(source: BinaryIO) -> Iterator[Line]:
    """Lines one by one. One that is too long is passed over in pieces, never held whole."""
    number = 0
    while raw := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        num_bytes = len(raw)
        if num_bytes > MAX_LINE_BYTES:
            piece = raw
            while piece and not piece.endswith(b"\n"):
                piece = source.readline(1 << 20)
                num_bytes += len(piece)
            raw = b""
        yield Line(number, raw, num_bytes)


def fingerprint_of(manager: RolloutManager, defaults: Defaults) -> str:
    """What answers depend on outside their line: weights, numerics, run seed, default sampling."""
    info = manager.info
    parts: tuple[object, ...] = (info.digest, info.numerics, defaults.run_seed, defaults.sampling)
    said, usual = defaults.openai, OpenAIConfig()
    for name in ("chat_template", "reasoning", "logprobs_mode"):
        if getattr(said, name) != getattr(usual, name):
            parts = (*parts, getattr(said, name))
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()
    return f"everstep-{info.digest[:8]}-{digest}"


def check_paths(source: Path, target: Path) -> None:
    """Raise ConfigError unless the input is there to be read and is not the output."""
    if not source.exists():
        raise ConfigError(f"{source}: no such file")
    if source.is_dir():
        raise ConfigError(f"{source} is a folder; name a file of JSON lines")
    if target.exists() and source.samefile(target):
        raise ConfigError(f"{target} is the input; name another file for the output (-o)")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name a file for the output (-o)")
    if target.exists() and not target.is_file():
        # a device or a pipe: what was written before could not be read back
        raise ConfigError(f"{target} is not a regular file; name one for the output (-o)")
