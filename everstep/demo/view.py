"""What `everstep train --demo` shows while it learns: a live view on a terminal, lines otherwise;
and the plot at its end."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..engine.errors import MissingExtra
from ..progress import live_view, panel
from .evaluation import Evaluation
from .progress import Progress

if TYPE_CHECKING:
    from rich.live import Live

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48


class DemoView:
    """Shows a `Progress`: without a terminal a line per iteration."""

    def __init__(self, iterations: int, stream: IO[str] | None = None) -> None:
        self._iterations = iterations
        self._stream = stream or sys.stdout
        self._num_said = 0
        self._live: Live | None = None

    def __call__(self, progress: Progress, *, is_over: bool = False) -> None:
        if self._stream.isatty():
            if self._live is None:
                self._live = live_view(self._stream)
                self._live.start()
            rows = picture_rows(progress, self._iterations)
            self._live.update(panel("everstep train --demo", rows), refresh=True)
            return
        # a trainer that was killed goes back to its checkpoint: what is trained again is not said again
        for n in range(self._num_said, len(progress.trained)):
            # the engine has its word about an iteration a little later than the trainer
            if not is_over and progress.trained[n].version - 1 not in progress.sampled:
                break
            self.say(iteration_line(progress, n, self._iterations))
            self._num_said = n + 1

    def say(self, text: str) -> None:
        """A line for people, above the live view."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the last picture where it is. Idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def iteration_line(progress: Progress, n: int, iterations: int) -> str:
    """The n-th trained iteration."""
    line = progress.trained[n]
    metrics = line.metrics
    words = [
        f"{line.version:>4}/{iterations}",
        f"reward {line.reward or 0.0:.3f}",
        f"length {progress.mean_lengths[n]:5.1f}",
        f"masked {metrics.get('mask_fraction', 0.0):.2%}",
        f"|Δlp| {metrics.get('log_ratio_abs_mean', 0.0):.1e}",
        f"KL {metrics.get('kl_k3', 0.0):.1e}",
        f"lag {metrics.get('lag_mean', 0.0):.2f}",
    ]
    engine = progress.sampled.get(line.version - 1)
    if engine is not None:
        words.append(f"{engine.tokens_per_s} tok/s")
    if line.version in progress.stalls:
        words.append(f"stall {progress.stalls[line.version]:.1f} ms")
    return "  ".join(words)


def picture_rows(progress: Progress, iterations: int) -> list[tuple[str, str]]:
    """(what, how it stands), line by line."""
    if not progress.trained:
        return [("iteration", f"0 of {iterations}; the engine samples the first")]
    last = progress.trained[-1]
    metrics = last.metrics
    stall = progress.stalls[max(progress.stalls)] if progress.stalls else 0.0
    masked, kl = metrics.get("mask_fraction", 0.0), metrics.get("kl_k3", 0.0)
    return [
        ("iteration", f"{last.version} of {iterations}"),
        ("reward", f"{sparkline(progress.rewards, 1.0)}  {last.reward or 0.0:.1%}"),
        ("length", f"{sparkline(progress.mean_lengths)}  {progress.mean_lengths[-1]:.1f} tokens"),
        ("masked", f"{masked:.2%} of tokens"),
        (
            "engine : trainer",
            f"|Δ logprob| {metrics.get('log_ratio_abs_mean', 0.0):.1e}, KL {kl:.1e} nats a token",
        ),
        (
            "lag",
            f"mean {metrics.get('lag_mean', 0.0):.2f}, oldest {metrics.get('lag_max', 0.0):.0f} "
            "versions",
        ),
        (
            "speed",
            f"engine {progress.engine_speed} tok/s, trainer {progress.trainer_speed:.0f} tok/s",
        ),
        ("stall", f"{stall:.1f} ms at the last new version"),
        ("waste", f"{progress.waste:.1%} of sampled tokens"),
    ]


def sparkline(values: Sequence[float], top: float | None = None) -> str:
    """The last values as bars from 0 to `top`, without it to the largest."""
    shown = values[-_WIDTH:]
    most = top or max(shown, default=0.0) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(v / most * len(_BARS)))] for v in shown)


def plot(progress: Progress, before: Evaluation, after: Evaluation, file: Path) -> None:
    """Curves of a run into a picture. Raises MissingExtra."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "bench", "the picture") from None
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (reward, lengths), (mismatch, speed) = figure.subplots(2, 2)
    steps = [line.version for line in progress.trained]
    ends = [0, max(steps, default=1)]
    reward.plot(steps, progress.rewards, label="reward in training")
    reward.plot(ends, [before.sampled.right, after.sampled.right], "o", label="held out, T = 1")
    reward.plot(ends, [before.greedy.right, after.greedy.right], "x", label="held out, greedy")
    reward.set(ylim=(0, 1), title="right answers")
    reward.legend()
    lengths.plot(steps, progress.mean_lengths)
    lengths.set(ylim=(0, None), title="mean length, tokens")
    mismatch.plot(steps, progress.metric("mask_fraction"), label="masked share")
    mismatch.plot(steps, progress.metric("log_ratio_abs_mean"), label="|Δ logprob|")
    mismatch.plot(steps, progress.metric("kl_k3"), label="KL")
    mismatch.set(title="engine against trainer")
    mismatch.legend()
    iterations = sorted(progress.sampled)
    speed.plot([n + 1 for n in iterations], [progress.sampled[n].tokens_per_s for n in iterations])
    speed.set(ylim=(0, None), title="engine, tokens a second")
    for axes in (reward, lengths, mismatch, speed):
        axes.set_xlabel("iteration")
    figure.savefig(file, dpi=110)


def _live(stream: IO[str]) -> "Live":
    from rich.console import Console
    from rich.live import Live

    return Live(console=Console(file=stream, highlight=False), auto_refresh=False)
