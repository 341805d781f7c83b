"""Batches that a server runs: each a file of lines, a state on the disk, and a task.

    validating ▸ in_progress ▸ finalizing ▸ completed        cancelling ▸ cancelled
               ▸ failed (a file that is no batch)

Every change of state is on the disk before anybody sees it. The lines themselves are durable
rollouts (server/batches/jobs.py), and records are appended to BATCH.records: after a kill a batch
goes on where it was, and no line has two records.
"""

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from ...engine import log
from ...engine.errors import (
    Conflict,
    Draining,
    EngineUnavailable,
    EverstepError,
    JournalError,
    Overloaded,
)
from ...engine.journal.ops import RequestKey
from ...engine.manager.manager import RolloutManager
from ...engine.manager.request_keys import check_same_body
from ...engine.rollout import SamplingParams, derive_seed
from ...engine.tokenizer import Tokenizer
from ..config import OpenAIConfig
from .file_store import FileStore, read_whole, write_whole, writing
from .input import check_lines, error_of, select
from .jobs import Jobs
from .lines import Defaults
from .output import BatchOutput
from .run import WINDOW, BatchRun, Counts
from .wire import ENDED, Batch, BatchError, BatchErrors, BatchRequest, RequestCounts

# beside somebody who waits for an answer a batch steps back
PRIORITY = -1
RETRY_S = 5.0


Errors = list[BatchError]


class UnknownBatch(EverstepError):
    """No batch has this id."""

    code = "batch_not_found"
    status = 404


class BatchQueue:
    """Owns the batches of a server, and the tasks that run them."""

    def __init__(
        self,
        manager: RolloutManager,
        tokenizer: Tokenizer | None,
        folder: Path,
        *,
        model_names: tuple[str, ...],
        openai: OpenAIConfig = OpenAIConfig(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.files = FileStore(folder, clock=clock)
        self._folder = folder
        self._manager = manager
        self._tokenizer = tokenizer
        self._model_names = model_names
        self._openai = openai
        self._clock = clock
        self._kept: dict[str, _Kept] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def open(self) -> None:
        """Read what is there; raises FilesUnusable."""
        self.files.open()
        for path in self._folder.glob("batch_*.json"):
            kept = read_whole(path, _Kept)
            if kept is not None:
                self._kept[kept.batch.id] = kept

    def start(self) -> int:
        """Go on with what has not ended; returns how many. The manager must have started."""
        live = [b for b in self.list() if b.status not in ENDED]
        for batch in live:
            self._go(batch.id)
        return len(live)

    async def close(self) -> None:
        """Stop the tasks; their batches go on at the next start."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    def create(self, request: BatchRequest, key: RequestKey | None = None) -> Batch:
        """A new batch; under a key that came before with the same body, that one.

        Raises UnknownFile, FilesUnusable, KeyReused.
        """
        name = uuid.uuid4().hex if key is None else _name(key)
        known = self._kept.get(f"batch_{name}")
        if known is not None and key is not None:
            check_same_body(key, known.body_digest)
            return known.batch
        self.files.get(request.input_file_id)
        batch = Batch(
            id=f"batch_{name}",
            endpoint=request.endpoint,
            input_file_id=request.input_file_id,
            completion_window=request.completion_window,
            created_at=int(self._clock()),
            metadata=request.metadata,
        )
        self._save(_Kept(batch, None if key is None else key.body_digest))
        self._go(batch.id)
        return batch

    def remove_file(self, file_id: str) -> None:
        """Raises UnknownFile, and Conflict while a batch reads it."""
        for batch in self.list():
            if batch.input_file_id == file_id and batch.status not in ENDED:
                raise Conflict(f"the file {file_id} is the input of {batch.id}, which runs")
        self.files.remove(file_id)

    def get(self, batch_id: str) -> Batch:
        """Raises UnknownBatch."""
        kept = self._kept.get(batch_id)
        if kept is None:
            raise UnknownBatch(f"no batch has the id {batch_id!r}")
        return kept.batch

    def list(self) -> list[Batch]:
        """Newest first."""
        batches = (kept.batch for kept in self._kept.values())
        return sorted(batches, key=lambda b: (b.created_at, b.id), reverse=True)

    def cancel(self, batch_id: str) -> Batch:
        """End it; the records that it has are kept. Ended ones are left as they are."""
        batch = self.get(batch_id)
        if batch.status not in (*ENDED, "cancelling"):
            self._move(batch, status="cancelling", cancelling_at=int(self._clock()))
            task = self._tasks.get(batch_id)
            if task is not None:
                task.cancel()
            self._go(batch_id, after=task)
        return self.get(batch_id)

    # --- one batch -----------------------------------------------------------------------

    def _go(self, batch_id: str, *, after: asyncio.Task[None] | None = None) -> None:
        self._tasks[batch_id] = asyncio.create_task(self._run(batch_id, after))

    async def _run(self, batch_id: str, after: asyncio.Task[None] | None) -> None:
        """Until it has ended, or the server closes."""
        if after is not None:
            await asyncio.gather(after, return_exceptions=True)
        while self.get(batch_id).status not in ENDED:
            try:
                await self._step(self.get(batch_id))
            except (Draining, asyncio.CancelledError):
                raise
            except (EngineUnavailable, JournalError, Overloaded) as error:
                # the disk is full, say, or the core is being started: nothing is lost by waiting
                log.event("batch.waits", level="warning", batch=batch_id, reason=str(error))
                await asyncio.sleep(RETRY_S)
            except Exception as error:
                log.event("batch.failed", level="error", batch=batch_id, error=repr(error))
                self._fail(self.get(batch_id), [error_of(error)])
        if self._tasks.get(batch_id) is asyncio.current_task():
            del self._tasks[batch_id]

    async def _step(self, batch: Batch) -> None:
        match batch.status:
            case "validating":
                await self._validate(batch)
            case "in_progress":
                await self._answer(batch)
                self._move(batch, status="finalizing", finalizing_at=int(self._clock()))
            case "finalizing":
                await self._deliver(batch, "completed", "completed_at")
            case "cancelling":
                await self._clear(batch)
                await self._deliver(batch, "cancelled", "cancelled_at")

    async def _validate(self, batch: Batch) -> None:
        source = self.files.path(batch.input_file_id)
        total, errors = await asyncio.to_thread(check_lines, source, batch.endpoint)
        if errors:
            self._fail(batch, errors)
            return
        self._move(
            batch,
            status="in_progress",
            in_progress_at=int(self._clock()),
            request_counts=RequestCounts(total=total),
        )

    def _open_output(self, batch: Batch) -> BatchOutput:
        with writing(self._folder):
            return BatchOutput(self._folder / f"{batch.id}.records")

    async def _answer(self, batch: Batch) -> None:
        """Give every line its record."""
        output = self._open_output(batch)

        def on_counts(_: Counts) -> None:
            batch.request_counts.failed = output.num_errors
            batch.request_counts.completed = len(output.ids) - output.num_errors

        defaults = Defaults(
            sampling=SamplingParams(),
            # a restart draws what this run draws, whatever the server's own seed is
            run_seed=derive_seed("batch", batch.id),
            model_names=self._model_names,
            openai=self._openai,
        )
        try:
            await BatchRun(
                self._manager,
                self._tokenizer,
                self.files.path(batch.input_file_id),
                output,
                defaults=defaults,
                window=WINDOW * self._manager.info.max_num_seqs,
                scope=batch.id,
                priority=PRIORITY,
                on_counts=on_counts,
            ).run()
        finally:
            output.close()

    async def _clear(self, batch: Batch) -> None:
        """End what the journal has of it."""
        await Jobs(self._manager, batch.id).finish()

    async def _deliver(self, batch: Batch, status: str, at: str) -> None:
        """Answers into one file, errors into another; the same files when it is done again."""
        output = self._open_output(batch)
        num_ok, num_errors = len(output.ids) - output.num_errors, output.num_errors
        path = output.path
        output.close()
        name = batch.id.removeprefix("batch_")
        changes: dict[str, object] = {"status": status, at: int(self._clock())}
        for field, count, wants_errors in (
            ("output_file_id", num_ok, False),
            ("error_file_id", num_errors, True),
        ):
            if count:
                changes[field] = file_id = f"file-{name[:-1]}{int(wants_errors)}"
                await asyncio.to_thread(
                    self.files.add,
                    select(path, wants_errors=wants_errors),
                    f"{batch.id}_{'error' if wants_errors else 'output'}.jsonl",
                    "batch_output",
                    file_id=file_id,
                )
        changes["request_counts"] = replace(
            batch.request_counts, completed=num_ok, failed=num_errors
        )
        self._move(batch, **changes)
        path.unlink(missing_ok=True)

    def _fail(self, batch: Batch, errors: Errors) -> None:
        self._move(
            batch,
            status="failed",
            failed_at=int(self._clock()),
            errors=BatchErrors(data=errors),
        )

    def _move(self, batch: Batch, **changes: object) -> None:
        kept = self._kept[batch.id]
        self._save(replace(kept, batch=replace(batch, **changes)))

    def _save(self, kept: "_Kept") -> None:
        with writing(self._folder):
            write_whole(self._folder / f"{kept.batch.id}.json", kept)
        self._kept[kept.batch.id] = kept


class _Kept(msgspec.Struct):
    """A batch on the disk, and what its Idempotency-Key came with."""

    batch: Batch
    body_digest: str | None


def _name(key: RequestKey) -> str:
    text = "\0".join(key.name)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
