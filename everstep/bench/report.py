"""What a benchmark measured, and vLLM's result block of it.

Definitions are vLLM's (`vllm bench serve`), so that figures can be laid side by side:

TTFT  from sending a request to its first piece of output
TPOT  (end − first piece) / (output tokens − 1), of a request with two tokens or more
ITL   between two pieces of output that follow one another; a piece may hold several tokens
E2EL  from sending a request to its end
"""

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from ..engine.errors import ConfigError

WIDTH = 50
# (key in the JSON, label of a line, heading), in vLLM's order
BLOCKS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)


class Measured(Struct):
    """One request; times are seconds of one clock.

    arrivals  when each piece of output came
    error     why it failed, None if it was answered
    """

    input_tokens: int
    started_s: float
    arrivals: list[float] = []
    ended_s: float = 0.0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0] - self.started_s

    @property
    def itl_s(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def e2el_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def tpot_s(self) -> float | None:
        """None with less than two tokens: there is nothing to divide."""
        if self.output_tokens < 2:
            return None
        return (self.ended_s - self.arrivals[0]) / (self.output_tokens - 1)


class Spread(Struct, frozen=True):
    """Of some latencies, in milliseconds; zeros where there are none, as vLLM prints."""

    mean: float
    median: float
    std: float
    p99: float


class Run(Struct, frozen=True, kw_only=True):
    """A finished benchmark.

    concurrency   the most requests in flight, None: no limit
    request_rate  requests per second that were sent, None: as fast as the limit allows
    """

    model: str
    requests: list[Measured]
    duration_s: float
    concurrency: int | None = None
    request_rate: float | None = None

    @property
    def answered(self) -> list[Measured]:
        return [r for r in self.requests if r.error is None]

    @property
    def errors(self) -> list[str]:
        return [r.error for r in self.requests if r.error is not None]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest, as numpy does; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(seconds: Sequence[float]) -> Spread:
    """Mean, median, (population) deviation and 99th percentile, in milliseconds."""
    if not seconds:
        return Spread(0.0, 0.0, 0.0, 0.0)
    mean = math.fsum(seconds) / len(seconds)
    variance = math.fsum((s - mean) ** 2 for s in seconds) / len(seconds)
    found = (mean, percentile(seconds, 50), math.sqrt(variance), percentile(seconds, 99))
    return Spread(*(1e3 * value for value in found))


def spreads(requests: Sequence[Measured]) -> dict[str, Spread]:
    """The spread of each of BLOCKS over the answered requests."""
    with_output = [r for r in requests if r.arrivals]
    tpot = [r.tpot_s for r in with_output]
    return {
        "ttft": spread([r.ttft_s for r in with_output]),
        "tpot": spread([s for s in tpot if s is not None]),
        "itl": spread([s for r in with_output for s in r.itl_s]),
        "e2el": spread([r.e2el_s for r in requests]),
    }


def result_block(run: Run) -> str:
    """vLLM's block: labels, order, widths and digits."""
    done = run.answered
    num_input = sum(r.input_tokens for r in done)
    num_output = sum(r.output_tokens for r in done)
    lines = [
        f"{' Serving Benchmark Result ':=^{WIDTH}}",
        _line("Successful requests:", len(done)),
        _line("Failed requests:", len(run.errors)),
    ]
    if run.concurrency is not None:
        lines.append(_line("Maximum request concurrency:", run.concurrency))
    if run.request_rate is not None:
        lines.append(_line("Request rate configured (RPS):", run.request_rate))
    per_s = 1 / run.duration_s
    lines += [
        _line("Benchmark duration (s):", run.duration_s),
        _line("Total input tokens:", num_input),
        _line("Total generated tokens:", num_output),
        _line("Request throughput (req/s):", len(done) * per_s),
        _line("Output token throughput (tok/s):", num_output * per_s),
        _line("Total token throughput (tok/s):", (num_input + num_output) * per_s),
    ]
    found = spreads(done)
    for key, label, heading in BLOCKS:
        lines += [
            f"{heading:-^{WIDTH}}",
            _line(f"Mean {label} (ms):", found[key].mean),
            _line(f"Median {label} (ms):", found[key].median),
            _line(f"P99 {label} (ms):", found[key].p99),
        ]
    return "\n".join([*lines, "=" * WIDTH, ""])


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"


def as_json(run: Run) -> dict[str, object]:
    """What `--output-json` writes; the keys are those of `vllm bench serve --save-result`."""
    done = run.answered
    num_input = sum(r.input_tokens for r in done)
    num_output = sum(r.output_tokens for r in done)
    result: dict[str, object] = {
        "model_id": run.model,
        "num_prompts": len(run.requests),
        "request_rate": "inf" if run.request_rate is None else run.request_rate,
        "max_concurrency": run.concurrency,
        "duration": run.duration_s,
        "completed": len(done),
        "failed": len(run.errors),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / run.duration_s,
        "output_throughput": num_output / run.duration_s,
        "total_token_throughput": (num_input + num_output) / run.duration_s,
    }
    for key, found in spreads(done).items():
        for name in ("mean", "median", "std", "p99"):
            result[f"{name}_{key}_ms"] = getattr(found, name)
    started = min((r.started_s for r in run.requests), default=0.0)
    return result | {
        "input_lens": [r.input_tokens for r in run.requests],
        "output_lens": [r.output_tokens for r in run.requests],
        "start_times": [r.started_s - started for r in run.requests],
        "ttfts": [r.ttft_s if r.arrivals else 0.0 for r in run.requests],
        "itls": [r.itl_s for r in run.requests],
        "latencies": [r.e2el_s for r in run.requests],
        "errors": [r.error or "" for r in run.requests],
    }


def check_output(path: Path | None) -> None:
    """Raise ConfigError now, not after the run, where the file could not be written."""
    if path is None:
        return
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"--output-json {path} cannot be written: {error.strerror}") from None
    if is_new:
        path.unlink()


def write_json(run: Run, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(as_json(run))) + b"\n")
