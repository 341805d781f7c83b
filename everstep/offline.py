"""Commands that run to an end: batch, verify, make-checkpoint; each ends with what it wrote."""

import asyncio
import contextlib
import math
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine.errors import ConfigError
from .engine.preload import preload_torch
from .engine.rollout import SamplingParams
from .progress import BatchProgress, Stages, duration
from .server.config import ServeConfig

if TYPE_CHECKING:
    from .clients.llm import LLM
    from .flags import Settings
    from .server.batches.output import BatchOutput
    from .server.batches.run import Counts


# one batch has the journal beside its output for itself
BATCH_SCOPE = "batch"


@contextlib.contextmanager
def open_llm(settings: "Settings") -> Iterator["LLM"]:
    """The model of the settings in this process, the stages of its loading shown."""
    preload_torch()
    from .clients.llm import LLM

    with Stages() as stages:
        llm = LLM(
            config=settings.config.engine,
            skip_tokenizer_init=settings.config.skip_tokenizer_init,
            on_progress=stages,
        )
    with llm:
        yield llm


def run_batch(
    config: ServeConfig,
    source: Path,
    target: Path,
    *,
    sampling: SamplingParams,
    retry_errors: bool,
    return_token_ids: bool,
) -> int:
    """Run a batch to its end; returns the number of error records in the output."""
    preload_torch()
    from .server.batches.lines import Defaults
    from .server.batches.output import BatchOutput
    from .server.batches.run import check_paths
    from .server.state import remove_batch_journal

    check_paths(source, target)
    defaults = Defaults(
        sampling=sampling,
        run_seed=config.engine.seed or 0,
        model_names=tuple(dict.fromkeys((*config.model_names, config.engine.model.path))),
        openai=config.openai,
        return_token_ids=return_token_ids,
    )
    output = BatchOutput(target)
    try:
        if retry_errors and (dropped := output.drop_errors()):
            sys.stderr.write(f"retrying {dropped} lines whose record was an error\n")
        with contextlib.closing(BatchProgress()) as progress:
            counts = asyncio.run(_batch(config, source, output, defaults, progress))
        remove_batch_journal(config.journal, target)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; the same command goes on ({len(output.ids)} lines done)\n")
        raise
    finally:
        output.close()
    _show_batch(counts, output)
    return output.num_errors


async def _batch(
    config: ServeConfig,
    source: Path,
    output: "BatchOutput",
    defaults: Any,
    progress: BatchProgress,
) -> "Counts":
    import msgspec

    from .engine.checkpoint.hub import resolve
    from .engine.manager.manager import RolloutManager
    from .engine.metrics import Registry
    from .engine.native import ThreadBackend
    from .engine.tokenizer import Tokenizer
    from .server.batches.run import WINDOW, BatchRun
    from .server.state import open_batch_journal

    metrics = Registry()
    journal = open_batch_journal(config.journal, output.path, metrics)
    with Stages() as stages:
        folder = resolve(config.engine.model.path, stages)
        tokenizer = None if config.skip_tokenizer_init else Tokenizer.from_folder(folder)
        model = msgspec.structs.replace(config.engine.model, path=str(folder))

        engine = msgspec.structs.replace(config.engine, model=model)
        manager = RolloutManager(
            ThreadBackend(engine, on_loading=stages.on_loading),
            tokenizer,
            run_seed=defaults.run_seed,
            journal=journal,
            # as long as the file: a line that was begun is found again
            retain_keys_s=math.inf,
            metrics=metrics,
        )
        try:
            await manager.start()
        except BaseException:
            await manager.close()
            raise
    try:
        run = BatchRun(
            manager,
            tokenizer,
            source,
            output,
            defaults=defaults,
            window=WINDOW * config.engine.batch.max_num_seqs,
            scope=None if journal is None else BATCH_SCOPE,
            on_counts=progress,
        )
        return await run.run()
    finally:
        await manager.close()


def _show_batch(counts: "Counts", output: "BatchOutput") -> None:
    rows = [
        ("answered", str(counts.num_answered)),
        ("error records", str(counts.num_errors)),
        ("done before", str(counts.num_skipped)),
        ("records in all", f"{len(output.ids)} ({output.num_errors} errors)"),
        ("prompt tokens", str(counts.prompt_tokens)),
        ("output tokens", str(counts.output_tokens)),
        ("time", f"{duration(counts.elapsed_s)}, {counts.tokens_per_s:.1f} tok/s"),
    ]
    show_table(rows)
    sys.stdout.write(f"{output.path}\n")


def show_table(
    rows: Sequence[tuple[str, ...]], *, header: tuple[str, ...] = (), to_stdout: bool = False
) -> None:
    """A small table; on standard error where standard output is for the path alone."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=bool(header))
    for name in header or [""] * len(rows[0]):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(stderr=not to_stdout, highlight=False).print(table)


def run_verify(checkpoint: str, *, dtype: str, numerics: str, num_tokens: int) -> bool:
    """Compare the engine with the reference; True if they agree."""
    from .engine.checkpoint.hub import resolve
    from .engine.proofs.verify import Dtype, Numerics, verify

    with Stages() as stages:
        report = verify(
            resolve(checkpoint, stages),
            num_tokens=num_tokens,
            dtype=one_of(Dtype, dtype, "--dtype"),
            numerics=one_of(Numerics, numerics, "--numerics"),
            on_progress=stages,
        )
    header, *rows = report.rows()
    show_table(rows, header=header, to_stdout=True)
    bounds = report.bounds
    for name, value, bound in (
        ("max |Δlogit|", report.max_logit, bounds.max_logit),
        ("mean |Δlogprob|", report.mean_logprob, bounds.mean_logprob),
        ("p99 |Δlogprob|", report.p99_logprob, bounds.p99_logprob),
    ):
        sys.stdout.write(f"{name:<16} {value:.2e}  (at most {bound:.2e})\n")
    sys.stdout.write(f"{'equal argmax':<16} {report.argmax_agreement:.2%}\n")
    sys.stdout.writelines(f"FAILED {failure}\n" for failure in report.failures)
    verdict = "agrees with the definition" if report.passed else "does NOT agree"
    sys.stdout.write(f"{report.folder}: {report.dtype}, {report.numerics}: {verdict}\n")
    return report.passed


def run_make_checkpoint(
    out: Path,
    *,
    shape: str,
    sizes: list[str],
    format: str,
    shards: int | None,
    max_shard_bytes: int | None,
    seed: int,
    mtp: int,
) -> Path:
    """Write a random checkpoint; returns its folder."""
    from .engine.checkpoint.make_checkpoint import Format, make_checkpoint, resize

    with Stages() as stages:
        return make_checkpoint(
            out,
            shape=resize(shape, sizes),
            format=one_of(Format, format, "--format"),
            shards=shards,
            max_shard_bytes=max_shard_bytes,
            seed=seed,
            mtp=mtp,
            on_progress=stages,
        )


def run_quantize(checkpoint: str, out: Path, *, format: str, dtype: str) -> Path:
    """Write a checkpoint in FP8; returns its folder."""
    from .engine.checkpoint.fp8_policy import Fp8Format
    from .engine.checkpoint.hub import resolve
    from .engine.checkpoint.quantize import Dtype, quantize_checkpoint

    chosen = one_of(Fp8Format, format, "--format")
    stored = one_of(Dtype, dtype, "--dtype")
    with Stages() as stages:
        source = resolve(checkpoint, stages)
        return quantize_checkpoint(source, out, chosen, dtype=stored, on_progress=stages)


def one_of(accepted: Any, value: str, flag: str) -> Any:
    """The value, if it is one of a Literal's; raises ConfigError naming them."""
    values = typing.get_args(accepted)
    if value not in values:
        raise ConfigError(f"{flag} must be {' or '.join(map(str, values))}, got {value!r}")
    return value
