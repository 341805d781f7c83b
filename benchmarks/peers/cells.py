"""What is measured: cells, the work in each, and the results as they are kept on disk."""

import statistics
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from .models import SIZES

SIDES = ("everstep", "vllm", "vllm-f32", "llama.cpp", "transformers", "transformers-f32")
QUANT_SIDES = ("everstep", "llama.cpp")


class Cell(Struct, frozen=True):
    """`concurrent` prompts of `prompt` tokens at once, `new` tokens each; bf16 or 8bit weights."""

    model: str
    weights: str
    concurrent: int
    prompt: int
    new: int

    @property
    def id(self) -> str:
        return f"{self.model}/{self.weights}/{self.concurrent}x{self.prompt}+{self.new}"

    @property
    def sides(self) -> tuple[str, ...]:
        """Who can run it; -f32 keeps its weights in float32."""
        return SIDES if self.weights == "bf16" else QUANT_SIDES

    @property
    def is_prefill(self) -> bool:
        return self.new == 1

    @property
    def tokens(self) -> int:
        """What its rate counts: generated tokens, or those of the prompt where one is generated."""
        return self.concurrent * (self.prompt if self.is_prefill else self.new)

    def prompts(self) -> list[list[int]]:
        """Ids of ordinary tokens, no two prompts alike."""
        vocab = SIZES[self.model].vocab - 1000
        return [
            [1000 + (i * 7919 + j * 104729 + i * j) % vocab for j in range(self.prompt)]
            for i in range(self.concurrent)
        ]


class Measured(Struct):
    """One cell of one run.

    *_s      the machine's limits, measured before every round, the best of them
    seconds  by side, one per round; rounds are interleaved
    failed   by side, why it has no figure
    said     by side: version and path
    """

    cell: Cell
    commit: str
    when: str
    loads: list[float]
    read_gb_s: float = 0.0
    peak_gf_s: float = 0.0
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    said: dict[str, dict[str, str]] = {}

    @property
    def sides(self) -> list[str]:
        """Who was asked, in the order of SIDES."""
        return [s for s in SIDES if s in self.seconds or s in self.failed]

    def rate(self, side: str) -> float | None:
        """Tokens/s, by the median."""
        taken = self.seconds.get(side)
        return self.cell.tokens / statistics.median(taken) if taken else None


class Results(Struct):
    machine: str
    threads: int
    cells: dict[str, Measured] = {}
    exactness: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    """By model; what exactness.measure found."""
    exactness_load: float = 0.0


def default_sides(flags: Iterable[str]) -> list[str]:
    """For a processor with these features (names of /proc/cpuinfo; none: unknown).

    Without instructions for bf16 torch multiplies it many times slower than float32: the peers that
    rest on torch then run in float32, which is the best that they have there.
    """
    known = set(flags)
    has_bf16 = not known or bool(known & {"avx512_bf16", "amx_bf16"})
    if has_bf16:
        return [s for s in SIDES if not s.endswith("-f32")]
    return ["everstep", "vllm-f32", "llama.cpp", "transformers-f32"]


def full_plan() -> list[Cell]:
    """Everything that the speed issue asks for."""
    cells = []
    for model in SIZES:
        for weights in ("bf16", "8bit"):
            cells += [Cell(model, weights, n, 128, 128) for n in (1, 8, 32, 128)]
            if weights == "bf16":
                cells += [Cell(model, weights, 1, length, 1) for length in (512, 2048)]
                cells += [Cell(model, weights, 8, 1920, new) for new in (1, 128)]
    return cells


def quick_plan() -> list[Cell]:
    """Minutes instead of hours: fewer new tokens, no 128 at once, no long context."""
    cells = []
    for model in SIZES:
        for weights in ("bf16", "8bit"):
            cells += [Cell(model, weights, n, 128, 32) for n in (1, 8, 32)]
            if weights == "bf16":
                cells.append(Cell(model, weights, 1, 512, 1))
    return cells


def groups(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Cells that share their models: what is loaded once."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.model, cell.weights), []).append(cell)
    return found


def read_bytes(cell: Cell) -> float:
    """Bytes of weights and KV that ours must read at least: a pass over the weights per new token.

    Prefill is counted as the pass that gives the first token. Of experts, those that tokens meet.
    """
    s = SIZES[cell.model]
    tokens = cell.concurrent * cell.prompt if cell.is_prefill else cell.concurrent
    met = s.experts * (1 - (1 - s.chosen / s.experts) ** tokens)
    size = 1 if cell.weights == "8bit" else 2
    attention = 2 * s.hidden * s.head_dim * (s.heads + s.kv_heads)
    layers = s.layers * (attention + 3 * s.hidden * s.width * met) * size
    # the head stays in bf16
    once = layers + 2 * s.vocab * s.hidden
    kv = 2 * s.layers * s.kv_heads * s.head_dim * 2
    context = sum(cell.prompt + t for t in range(cell.new))
    return once * cell.new + cell.concurrent * kv * context


def operations(cell: Cell) -> float:
    """Floating-point operations of products and attention."""
    s = SIZES[cell.model]
    attention = 2 * s.hidden * s.head_dim * (s.heads + s.kv_heads)
    layer = attention + 3 * s.hidden * s.width * s.chosen
    total = cell.prompt + cell.new - 1
    scores = 4 * s.layers * s.heads * s.head_dim * total * (total + 1) / 2
    head = 2 * s.vocab * s.hidden * cell.new
    return cell.concurrent * (2 * s.layers * layer * total + scores + head)


def load_results(path: Path, machine: str, threads: int) -> Results:
    """What an earlier run left, if it was on this machine; else nothing yet."""
    if path.exists():
        found = msgspec.json.decode(path.read_bytes(), type=Results)
        if (found.machine, found.threads) == (machine, threads):
            return found
        path.rename(path.with_suffix(".other.json"))
    return Results(machine, threads)


def save_results(results: Results, path: Path) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    part.replace(path)
