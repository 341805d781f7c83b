"""`everstep replay` and `everstep capsule`: a journaled rollout run again, here or elsewhere."""

import asyncio
import contextlib
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from . import __version__
from .engine.config import EngineConfig, JournalConfig
from .engine.errors import ConfigError, InvalidTrajectory
from .environment import forced_kernels
from .progress import Stages

if TYPE_CHECKING:
    from .engine.messages import Ready
    from .engine.proofs.capsule import Capsule
    from .engine.proofs.replay import Outcome, Span
    from .engine.rollout import Rollout, Segment
    from .flags import Settings

# settings that may change bits, and hence belong into a capsule
_MODEL_SETTINGS = ("dtype", "numerics", "dequantize", "rope_tables")


class Replayed(msgspec.Struct):
    """What came of a replay; missing: a segment of each version that was not here."""

    spans: "list[Span]"
    outcomes: "list[Outcome]"
    ready: "Ready"
    missing: "list[Segment]"


def run_replay(
    settings: "Settings", source: str, journal: Path | None, to: int | None, weights: Sequence[Path]
) -> int:
    """Run it again and say what came of it; returns the exit code.

    weights  folders of versions, or folders of such
    """
    capsule = _open(source, journal)
    rollout = capsule.rollout()
    if not rollout.output_ids:
        raise InvalidTrajectory(f"{rollout.id!a} has no output tokens: nothing can be replayed")
    config = _config(settings, capsule, rollout)
    names_model = "engine.model.path" in settings.origins
    with _recorded_level(rollout), Stages() as stages:
        replayed = asyncio.run(_replay(config, rollout, to, weights, names_model, stages))
    return _say(rollout, replayed)


def run_capsule(
    settings: "Settings",
    source: str,
    journal: Path | None,
    output: Path,
    *,
    with_text: bool,
    with_metadata: bool,
) -> None:
    """Write the file and say what is in it."""
    from .engine.proofs import capsule as capsules

    found = _open(source, journal)
    rollout = capsules.strip(found.rollout(), with_text=with_text, with_metadata=with_metadata)
    model = settings.config.engine.model
    said = {name: str(getattr(model, name)) for name in _MODEL_SETTINGS}
    made = capsules.make(
        rollout,
        settings=found.settings or said,
        environment=found.environment or _environment(),
    )
    size = capsules.write(made, output)
    held = ["tokens"]
    held += ["text"] if with_text else []
    held += ["metadata"] if with_metadata else []
    sys.stderr.write(
        f"{rollout.id!a}: {len(rollout.prompt_ids)} prompt and {len(rollout.output_ids)} output "
        f"tokens, {len(rollout.segments)} segments; holds {', '.join(held)}; {size} bytes\n"
    )
    sys.stdout.write(f"{output}\n")


def _open(source: str, journal: Path | None) -> "Capsule":
    """A file, or an id in a journal that no server holds."""
    from .engine.proofs import capsule as capsules

    path = Path(source)
    if path.is_file():
        return capsules.read(path)
    if journal is None:
        raise ConfigError(
            f"{source!r} is no file; to take a rollout from a journal, name it: --journal PATH"
        )
    if not journal.is_file():
        raise ConfigError(f"--journal {journal}: no such file")
    from .engine.journal.journal import Journal

    with contextlib.closing(Journal.open(journal, JournalConfig())) as store:
        rollout = store.read(source)
        summary = store.summary(source)
    if rollout is not None:
        return capsules.make(rollout, settings={}, environment={})
    if summary is not None:
        raise ConfigError(f"rollout {source} was acknowledged: its tokens are its reader's now")
    raise ConfigError(f"{journal} has no rollout {source!r}; `everstep journal export` lists them")


def _environment() -> dict[str, str]:
    import importlib.metadata

    found = {
        "everstep": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }
    for name in ("torch", "numpy", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _config(settings: "Settings", capsule: "Capsule", rollout: "Rollout") -> EngineConfig:
    """The user's settings; where they say nothing, what was recorded."""
    config = settings.config.engine
    recorded = {n: v for n, v in capsule.settings.items() if n in _MODEL_SETTINGS}
    if recorded.get("dtype", "auto") == "auto":
        dtypes = {segment.numerics.split("/")[3:4][0] for segment in rollout.segments}
        if len(dtypes) == 1 and (dtype := dtypes.pop()) in ("float32", "bfloat16"):
            recorded["dtype"] = dtype
    changes = {n: v for n, v in recorded.items() if f"engine.model.{n}" not in settings.origins}
    try:
        model = msgspec.convert(msgspec.to_builtins(config.model) | changes, type(config.model))
    except msgspec.ValidationError as error:
        raise InvalidTrajectory(f"settings: {error}", field="settings") from None
    batch = msgspec.structs.replace(config.batch, max_num_seqs=1)
    return msgspec.structs.replace(config, model=model, batch=batch)


@contextlib.contextmanager
def _recorded_level(rollout: "Rollout") -> Iterator[None]:
    """Run on the kernels that were recorded, where this machine has them."""
    from .kernels import native, use_level

    levels = {s.numerics.split("/")[2] for s in rollout.segments if s.numerics.count("/") >= 3}
    wanted = levels.pop() if len(levels) == 1 else ""
    able = native.runnable(native.machine_flags())
    if forced_kernels() or wanted not in able or wanted == able[0]:
        yield
        return
    with use_level(wanted):
        yield


async def _replay(
    config: EngineConfig,
    rollout: "Rollout",
    to: int | None,
    weights: Sequence[Path],
    names_model: bool,
    stages: Stages,
) -> Replayed:
    from .engine.checkpoint.hub import resolve
    from .engine.checkpoint.manifest import Version
    from .engine.checkpoint.version_folders import find_versions
    from .engine.native import ThreadBackend
    from .engine.proofs.replay import Replayer, chains_of, check_fits, missing_of, spans_of
    from .engine.tokenizer import Tokenizer

    versions = find_versions(weights, stages)
    known = [segment.digest for segment in rollout.segments if segment.digest in versions]
    if known and not names_model:
        folder = Path(versions[known[0]].folder)
    else:
        folder = resolve(config.model.path, stages)
    model = msgspec.structs.replace(config.model, path=str(folder))
    backend = ThreadBackend(
        msgspec.structs.replace(config, model=model), on_loading=stages.on_loading
    )
    try:
        ready = await backend.start()
        served = Version(number=0, digest=ready.digest, folder=str(folder))
        versions.setdefault(ready.digest, served)
        check_fits(rollout, ready)
        eos_ids: Sequence[int] = ready.eos_ids
        if (folder / "tokenizer.json").is_file():
            eos_ids = Tokenizer.from_folder(folder).eos_ids
        spans = spans_of(rollout, versions, to=to)
        replayer = Replayer(backend, ready, versions, eos_ids)
        outcomes: list[Outcome] = []
        for chain in chains_of(spans):
            outcomes += [outcome async for outcome in replayer.replay(rollout, chain)]
            if outcomes[-1].difference is not None:
                break
        return Replayed(spans, outcomes, ready, missing_of(rollout, versions))
    finally:
        await backend.close()


def _write(line: str) -> None:
    """What a file says reaches no terminal as it is."""
    sys.stdout.write("".join(c if c.isprintable() else "?" for c in line) + "\n")


def _say(rollout: "Rollout", replayed: Replayed) -> int:
    from .engine.proofs.replay import why, words

    spans, outcomes, ready = replayed.spans, replayed.outcomes, replayed.ready
    reason = rollout.finish_reason
    ending = rollout.state.value + (f" ({reason.type})" if reason else "")
    _write(
        f"{rollout.id}: {len(rollout.prompt_ids)} prompt and {len(rollout.output_ids)} output "
        f"tokens, {len(rollout.segments)} segments, seed {rollout.seed}, {ending}"
    )
    done = {outcome.span.start: outcome for outcome in outcomes}
    num_equal, fault = 0, None
    for span in spans:
        outcome = done.get(span.start)
        if span.obstacle is not None:
            result = f"not replayable here: {span.obstacle}"
        elif outcome is None:
            result = "not tried"
        elif outcome.difference is None:
            result, num_equal = "identical", num_equal + span.end - span.start
        else:
            result, fault = f"differs at token {outcome.difference.token}", outcome
        segment = span.segment
        over = "" if segment.kv == "computed" else f", KV {segment.kv}"
        _write(
            f"  tokens {span.start}-{span.end - 1}  version {segment.version}@"
            f"{segment.digest[:8]}, {segment.numerics}, {segment.core}{over}: {result}"
        )
    if fault is not None and fault.difference is not None:
        difference = fault.difference
        _write(
            f"first difference: token {difference.token}, {difference.field}: recorded "
            f"{difference.recorded}, computed {difference.computed}"
        )
        _write(f"why: {why(fault.span, ready)}")
        return 1
    lacking = ", ".join(map(words, replayed.missing))
    if not num_equal:
        raise ConfigError(
            f"none of its tokens can be replayed with this model ({ready.digest[:12]}): they need "
            f"{ascii(lacking).strip(chr(39))}; name the folder with --weights, or --model"
        )
    num = spans[-1].end
    others = f"; the other {num - num_equal} need {lacking}: --weights" if num_equal < num else ""
    _write(f"replayed {num_equal} of {num} tokens: identical to the bit{others}")
    return 0
