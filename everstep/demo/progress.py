"""What a run of the demo has come to, read from the files that its processes write."""

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

_BOOKS = re.compile(
    r"^iteration (\d+): (\d+) sampled \| .*purged (\d+), regenerated (\d+), cancelled (\d+) \| "
    r".*?(\d+) tok/s$"
)
_SERVES = re.compile(r"^version (\d+) .*stall ([\d.]+) ms$")


class TrainerLine(Struct):
    """As much of a `trainer.Report` as is shown; a number that is not finite comes as null."""

    version: int
    loss: float | None
    samples: int
    tokens: int
    rows: int
    seconds: float
    reward: float | None = None
    metrics: dict[str, float | None] = {}


class EngineLine(Struct):
    """An iteration in the log of `everstep rollout` (rollout/view.py, iteration_line)."""

    iteration: int
    sampled: int
    wasted: int
    tokens_per_s: int


class Progress(Struct):
    """Rows in order; stalls by version, in ms."""

    trained: list[TrainerLine] = []
    sampled: dict[int, EngineLine] = {}
    stalls: dict[int, float] = {}

    @property
    def waste(self) -> float:
        """Share of sampled tokens that nobody will train on."""
        sampled = sum(line.sampled for line in self.sampled.values())
        wasted = sum(line.wasted for line in self.sampled.values())
        return wasted / sampled if sampled else 0.0

    def metric(self, name: str) -> list[float]:
        """Of `loss_metrics`, by iteration."""
        return [line.metrics.get(name) or 0.0 for line in self.trained]

    @property
    def rewards(self) -> list[float]:
        return [line.reward or 0.0 for line in self.trained]

    @property
    def mean_lengths(self) -> list[float]:
        return [line.tokens / max(1, line.samples) for line in self.trained]

    @property
    def trainer_speed(self) -> float:
        """Tokens that the last update took, by the second."""
        last = self.trained[-1]
        return last.tokens / max(last.seconds, 1e-9)

    @property
    def engine_speed(self) -> int:
        """Tokens a second in the newest iteration that is over."""
        return self.sampled[max(self.sampled)].tokens_per_s if self.sampled else 0


def read_progress(output: Path, engine_log: Path | None = None) -> Progress:
    """Of a trainer's output folder, and of the engine beside it. What is not there yet is empty."""
    found = Progress(trained=_trained(output / "metrics.jsonl"))
    if engine_log is not None and engine_log.exists():
        for line in engine_log.read_text(errors="replace").splitlines():
            _read_line(line, found)
    return found


def _trained(file: Path) -> list[TrainerLine]:
    """Whole lines only: the last one may be on its way."""
    if not file.exists():
        return []
    decode: Callable[[bytes], TrainerLine] = msgspec.json.Decoder(TrainerLine).decode
    return [decode(line) for line in file.read_bytes().splitlines(True) if line.endswith(b"\n")]


def _read_line(line: str, found: Progress) -> None:
    """One that was killed says an iteration again: the last word counts."""
    if match := _BOOKS.match(line):
        iteration, sampled, *waste, speed = map(int, match.groups())
        found.sampled[iteration] = EngineLine(iteration, sampled, sum(waste), speed)
    elif match := _SERVES.match(line):
        found.stalls[int(match[1])] = float(match[2])
