"""A training run: groups in, train, save, export. One process, or each rank of torchrun:

    torchrun --nproc-per-node 2 -m everstep.trainer_bridge.fsdp_trainer config.toml [--explain]

The output folder holds everything of a run, and the same command goes on from it:

    checkpoints/    what it goes on from (trainer/checkpointing.py)
    metrics.jsonl   a line per iteration (trainer.Report)
    final/          the trained model, as `everstep serve` loads it
    over.json       the engine's run has ended: nobody is waited for any more
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from msgspec import Struct

from ..engine import log
from ..engine.checkpoint.hub import resolve
from ..engine.errors import ConfigError, EverstepError
from .losses.alarms import Alarms
from .trainer.checkpointing import Checkpoints, TrainerState
from .trainer.config import TrainConfig, read_config
from .trainer.export import export
from .trainer.kept_settings import compared, written
from .trainer.sharding import World, join_world
from .trainer.sources import BridgeSource, FileSource, Say, Source, stored_as, where
from .trainer.trainer import Report, Trainer, sharded
from .weights.layout import WeightLayout


def train(config: TrainConfig, say: Say) -> None:
    """Run to the end of the source, or for `max_steps` iterations.

    say  told one line at a time, on the first rank alone
    Raises ConfigError and CheckpointError, in one line each.
    """
    config.check()
    with join_world(config.numerics.device, config.timeout_s) as world:
        Run(config, world, say if world.is_first else _silent).run()


def explain(config: TrainConfig, say: Say) -> None:
    """Say which rank would send which bytes of each version, and where to; nothing is read or sent.

    say  as for `train`; raises as it does
    """
    config.check()
    with join_world(config.numerics.device, config.timeout_s) as world:
        ring, dtype = sharded(config, world, resolve(config.model))
        layout = WeightLayout(ring, world, stored_as(config, ring, dtype))
        if world.is_first:
            for line in (f"versions go to {where(config)}", *layout.explain().splitlines()):
                say(line)


_OVER = "over.json"


class Over(Struct, frozen=True):
    """An engine has said that its run is over, when this version was trained."""

    run: str
    version: int


class Run:
    """One rank's part of a run."""

    def __init__(self, config: TrainConfig, world: World, say: Say) -> None:
        self.config, self.world, self.say = config, world, say
        self.output = Path(config.output)
        self.trainer = Trainer(config, world, resolve(config.model))
        self.checkpoints = Checkpoints(self.output / "checkpoints", keep=config.checkpoint.keep)
        self.alarms = Alarms(config.alarms)
        self._saved = 0
        """The version of the newest checkpoint."""

    def run(self) -> None:
        checkpoint = self._go_on()
        if why := self.world.same(self._why_done()):
            self._export()
            self.say(f"{why}: nothing is left to train; the model is in {self.output / 'final'}")
            return
        source = self._open(checkpoint)
        try:
            self._train(source)
        except KeyboardInterrupt:
            self.say(
                f"interrupted after {self.trainer.version} iterations; the same command goes on "
                f"after {self._saved}"
            )
            raise
        finally:
            source.close()

    def _why_done(self) -> str:
        """Nothing, unless a checkpoint holds all that there is to train: then no source is asked,
        which may be gone."""
        version, most = self.trainer.version, self.config.max_steps
        if most is not None and version >= most:
            return f"max_steps is {most}, and {version} iterations were trained"
        run = self.config.source.run
        if self.config.source.endpoint and _read_over(self.output / _OVER) == Over(run, version):
            return f"the engine's run {run!r} is over"
        return ""

    def _train(self, source: Source) -> None:
        trainer, every = self.trainer, self.config.checkpoint.every
        saving: dict[str, float] = {}
        while self.config.max_steps is None or trainer.version < self.config.max_steps:
            spent, saving = saving, {}
            with _timed(spent, "wait"):
                groups = source.share(trainer.version)
            if groups is None:
                self._note_end(source)
                break
            with self._within_memory():
                report = trainer.step(groups)
            with _timed(spent, "publish"):
                source.trained(report, groups)
            self._tell(msgspec.structs.replace(report, spent=report.spent | spent))
            if every and not trainer.version % every:
                with _timed(saving, "save"):
                    self._save(source)
        if every and trainer.version > self._saved:
            self._save(source)
        self._export()
        self.say(f"{trainer.version} iterations; the model is in {self.output / 'final'}")
        if left := source.finish():
            self.say(left)

    def _note_end(self, source: Source) -> None:
        """Before the last checkpoint: what is said here counts once that is there."""
        if source.is_over and self.world.is_first:
            over = Over(self.config.source.run, self.trainer.version)
            (self.output / _OVER).write_bytes(msgspec.json.encode(over) + b"\n")

    def _export(self) -> None:
        trainer = self.trainer
        export(trainer.ring, trainer.folder, self.output / "final", trainer.dtype, self.world)

    @contextlib.contextmanager
    def _within_memory(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            is_full = isinstance(error, torch.OutOfMemoryError) or "can't allocate" in str(error)
            if not is_full:
                raise
            rows = self.config.batch.max_rows
            raise ConfigError(
                f"no memory for iteration {self.trainer.version}: a smaller batch.max_rows than "
                f"{rows} takes less, and numerics.recompute = true"
            ) from None

    def _open(self, checkpoint: Path | None) -> Source:
        if self.config.source.endpoint:
            return BridgeSource(self.trainer, checkpoint, self.checkpoints.oldest(), self.say)
        return FileSource(self.config, self.world, self.trainer.ring.config, self.say)

    def _go_on(self) -> Path | None:
        """From the newest checkpoint, if there is one."""
        found = self.checkpoints.stable()
        if found:
            state = self.trainer.restore(found[-1])
            self.alarms = Alarms(self.config.alarms, state.alarms)
            self._saved = state.version
            self.say(f"goes on from {found[-1]}: {state.version} iterations were trained")
            if changed := compared(state.settings, self.config, found[-1]):
                self.say(changed)
        if self.world.is_first:
            self.output.mkdir(parents=True, exist_ok=True)
            _cut(self.output / "metrics.jsonl", self.trainer.version)
        return found[-1] if found else None

    def _save(self, source: Source) -> None:
        state: TrainerState = msgspec.structs.replace(
            self.trainer.state(), alarms=self.alarms.state, settings=written(self.config)
        )
        saved = self.checkpoints.save(self.trainer.checkpoint_tensors(), state, self.world)
        self._saved = state.version
        source.durable(saved, state.version, self.checkpoints.oldest())

    def _tell(self, report: Report) -> None:
        alarms = self.alarms.check(report.version, report.metrics)
        if not self.world.is_first:
            return
        with (self.output / "metrics.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(report) + b"\n")
        self.say(_line(report))
        if not all(map(math.isfinite, report.grad_norm)):
            self.say("alarm: a gradient is not finite: its update was left out")
        for alarm in alarms:
            self.say(f"alarm: {alarm.message}")


def _line(report: Report) -> str:
    """An iteration in one line."""
    words = [f"{report.version:>6}", f"loss {report.loss:+.5f}"]
    if report.reward is not None:
        words.append(f"reward {report.reward:.4f}")
    words += [
        f"norm {max(report.grad_norm, default=0.0):.3g}",
        f"lr {report.lr:.2e}",
        f"{report.samples} samples, {report.tokens} tokens",
        f"{report.rows / max(report.seconds, 1e-9):.0f} tok/s",
    ]
    if "mask_fraction" in report.metrics:
        words.append(f"masked {report.metrics['mask_fraction']:.2%}")
    if "log_ratio_abs_mean" in report.metrics:
        words.append(f"|Δlp| {report.metrics['log_ratio_abs_mean']:.2e}")
    if proximal := report.metrics.get("proximal_fraction"):
        words.append(f"proximal {proximal:.2%}")
    return "  ".join(words)


@contextlib.contextmanager
def _timed(spent: dict[str, float], part: str) -> Iterator[None]:
    """Writes down what the block took, in seconds."""
    begun = time.perf_counter()
    yield
    spent[part] = time.perf_counter() - begun


def _cut(path: Path, version: int) -> None:
    """Drop lines of iterations that a kill took back, and half of a line."""
    if not path.is_file():
        return
    whole = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in whole if line.endswith(b"\n") and _version(line) <= version]
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(path)


def _read_over(path: Path) -> Over | None:
    """None where there is none, or half of one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Over)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


class _Numbered(Struct):
    version: int


def _version(line: bytes) -> int:
    return msgspec.json.decode(line, type=_Numbered).version


def _silent(_: str) -> None:
    """What ranks after the first say."""


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """What each rank of torchrun runs; returns the exit code."""
    log.setup()
    names = [argument for argument in arguments if argument != "--explain"]
    if len(names) != 1 or len(arguments) > 2:
        sys.stderr.write(
            "error: usage: python -m everstep.trainer_bridge.fsdp_trainer CONFIG.toml [--explain]\n"
        )
        return 2
    run = train if names == list(arguments) else explain
    try:
        run(read_config(Path(names[0])), _write)
    except KeyboardInterrupt:
        return 130
    except EverstepError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        if error.strerror is None:
            raise
        sys.stderr.write(f"error: {error.filename or 'system'}: {error.strerror}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
