"""What new weights cost an engine that generates: from a folder to serving, in parts.

    python benchmarks/weights_engine.py [--model default] [--gigabytes 1] [--rounds 3] [--rollouts 4]
                                        [--canaries 2] [--processor-time]

Drives the core's own loop (engine/core/core.py) in this process: every message is encoded as for a front,
no server is needed. The next versions lie in shared memory, with canaries, as a trainer on this host
publishes them.

    layout, digests, read, canaries   of staging while nothing is generated: busy seconds
    stall                             last step under the old weights to first under the new
    serving                           from the message `Stage` to that first step
    tokens/s                          while nothing is staged, at full priority, in the background

In a round the three are measured one after another; rollouts have the same lengths in all of them, and
who ends begins anew. Figures are medians of
rounds, the longest slice is the longest of all. With `--processor-time` the engine has one thread,
and all seconds are seconds of that thread on a processor: what other processes do to the clock on the
wall is left out (what they do to caches is not).
"""

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.hub import resolve
from everstep.engine.checkpoint.make_checkpoint import make_checkpoint, resize
from everstep.engine.checkpoint.manifest import write_manifest
from everstep.engine.checkpoint.manifest_maker import manifest_of
from everstep.engine.config import BatchConfig, EngineConfig, KVConfig, ModelConfig
from everstep.engine.core.core import Core, build
from everstep.engine.messages import (
    Add,
    Cancel,
    Flip,
    Flipped,
    FromCore,
    Priority,
    Refused,
    Stage,
    Staged,
    ToCore,
    Tokens,
    encode,
)
from everstep.engine.model.canaries import make_canary
from everstep.engine.model.weights import load_weights
from everstep.engine.rollout import SamplingParams

PROMPT, OUTPUT = 32, 128
MAX_LEN = 256
WARM_STEPS = 5
CANARY_TOKENS, CANARY_PROMPT = 128, 32
Clock = Callable[[], float]
SHARED = Path("/dev/shm")
Kind = TypeVar("Kind", Staged, Flipped)


class EngineFigures(Struct, kw_only=True):
    """Seconds, unless the name says otherwise.

    parts_s       layout, digests, read, canaries: of staging while nothing is generated
    serving_s     idle, full, background: from `Stage` to the first step under the new weights
    tokens_per_s  without, full, background
    shares        full, background: of the tokens/s without, median over rounds
    load          of the machine, before and after
    """

    num_bytes: int
    parts_s: dict[str, float]
    serving_s: dict[str, float]
    tokens_per_s: dict[str, float]
    shares: dict[str, float]
    step_s: float
    flip_s: float
    stall_s: float
    steps_lost: float
    longest_slice_s: dict[str, float]
    experts_reached: float | None
    load: tuple[float, float]


class Phase(Struct):
    """What was seen of a version's way into the engine, or of a time without one."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    staged: Staged | None = None
    flipped: Flipped | None = None
    serving_s: float = 0.0


class Driver:
    """A core over real weights, moved step by step."""

    def __init__(self, core: Core, rollouts: int, vocab_size: int, clock: Clock) -> None:
        self._core = core
        self._clock = clock
        self._rollouts = rollouts
        self._vocab_size = vocab_size
        self._names: dict[str, int] = {}
        self._num_adds = 0
        self._heard: list[FromCore] = []

    def turn(self, *messages: ToCore) -> list[FromCore]:
        """One turn of the core's loop."""
        self._heard = []
        self._core.turn(messages, self._send)
        for message in self._heard:
            if isinstance(message, Refused):
                raise SystemExit(message.message)
            if isinstance(message, Tokens):
                self._begin_anew(message)
        return self._heard

    def _begin_anew(self, message: Tokens) -> None:
        for tokens in message.rollouts:
            index = self._names.pop(tokens.rollout_id, None) if tokens.finish else None
            if index is not None:
                self._core.handle(self._add(index))

    def _send(self, messages: list[FromCore]) -> None:
        encode(messages)
        self._heard += messages

    def begin(self) -> None:
        """The same rollouts anew, a few steps after their prompts."""
        self.end()
        for index in range(self._rollouts):
            self.turn(self._add(index))
        for _ in range(WARM_STEPS):
            self.turn()

    def _add(self, index: int) -> Add:
        self._num_adds += 1
        name = f"r{self._num_adds}"
        self._names[name] = index
        return Add(
            rollout_id=name,
            prompt_ids=[(7 * index + n) % self._vocab_size for n in range(PROMPT)],
            sampling=SamplingParams(ignore_eos=True),
            seed=index,
            max_tokens=OUTPUT,
        )

    def end(self) -> None:
        names, self._names = self._names, {}
        self.turn(Cancel([*names]))

    def generate(self, seconds: float) -> Phase:
        """So long, with nothing staged."""
        phase, began = Phase(), self._clock()
        while phase.seconds < seconds:
            self._count(phase, self.turn())
            phase.seconds = self._clock() - began
        return phase

    def change(self, folder: Path, version: int, priority: Priority) -> Phase:
        """Stage and flip; tokens are counted until it is staged."""
        phase, began = Phase(), self._clock()
        heard = self.turn(Stage(version, str(folder), priority=priority))
        while (staged := _of(heard, Staged)) is None:
            self._count(phase, heard)
            heard = self.turn()
        phase.seconds = self._clock() - began
        self._count(phase, heard)
        phase.staged = staged
        heard = self.turn(Flip(version, staged.digest, "keep"))
        while (flipped := _of(heard, Flipped)) is None:
            heard = self.turn()
        phase.flipped = flipped
        phase.serving_s = self._clock() - began
        # the old weights are given back
        swap = self._core._swap
        while swap is not None and swap.is_busy:
            self.turn()
        return phase

    @staticmethod
    def _count(phase: Phase, messages: Sequence[FromCore]) -> None:
        for message in messages:
            if isinstance(message, Tokens):
                phase.steps += 1
                phase.tokens += sum(len(tokens.ids) for tokens in message.each())


def _of(messages: Sequence[FromCore], kind: type[Kind]) -> Kind | None:
    return next((message for message in messages if isinstance(message, kind)), None)


def published(model: Path, root: Path, num_canaries: int) -> list[Path]:
    """Two versions of a checkpoint, in turn: the same weights under two numbers."""
    first = root / "v1"
    shutil.copytree(model, first)
    checkpoint = Checkpoint.open(first)
    vocab = checkpoint.config.vocab_size
    weights = load_weights(checkpoint, ModelConfig(), on_progress=lambda *_: None)
    canaries = [
        make_canary(
            weights, [(start + 37 * n) % vocab for n in range(CANARY_TOKENS)], CANARY_PROMPT
        )
        for start in range(num_canaries)
    ]
    manifest = manifest_of(checkpoint, version=1, canaries=canaries)
    write_manifest(first, manifest)
    second = root / "v2"
    second.mkdir()
    for file in first.iterdir():
        (second / file.name).hardlink_to(file)
    (second / "manifest.json").unlink()
    write_manifest(second, replace(manifest, version=2))
    return [first, second]


def measure(
    folder: Path,
    *,
    rounds: int = 3,
    rollouts: int = 4,
    seconds: float = 3.0,
    canaries: int = 2,
    processor_time: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> EngineFigures:
    """The figures of one model (a checkpoint folder) on this machine, as it is now."""
    load = os.getloadavg()[0]
    root = Path(tempfile.mkdtemp(prefix="everstep-bench-", dir=SHARED if SHARED.is_dir() else None))
    try:
        folders = published(folder, root, canaries)
        clock = time.thread_time if processor_time else time.perf_counter
        config = EngineConfig(
            model=ModelConfig(path=str(folders[0]), max_model_len=MAX_LEN),
            kv=KVConfig(num_blocks=rollouts * MAX_LEN // 16 + 2),
            batch=BatchConfig(max_num_seqs=rollouts),
            num_threads=1 if processor_time else None,
        )
        core, ready = build(config, lambda _: None, clock=clock)
        driver = Driver(core, rollouts, ready.vocab_size, clock)
        return _measure(driver, folders, rounds, seconds, load, say)
    finally:
        shutil.rmtree(root)


def _measure(
    driver: Driver,
    folders: Sequence[Path],
    rounds: int,
    seconds: float,
    load: float,
    say: Callable[[str], None],
) -> EngineFigures:
    found: dict[str, list[Phase]] = {"idle": [], "without": [], "full": [], "background": []}
    number = 1

    def change(priority: Priority) -> Phase:
        nonlocal number
        number = 3 - number
        return driver.change(folders[number - 1], number, priority)

    say("published, built")
    for one in range(rounds):
        driver.end()
        found["idle"].append(change("full"))
        for name in ("full", "without", "background"):
            driver.begin()
            if name == "without":
                found[name].append(driver.generate(seconds))
            else:
                found[name].append(change("full" if name == "full" else "background"))
        say(f"round {one + 1} of {rounds}")
    driver.end()
    rates = {name: [p.tokens / p.seconds for p in found[name]] for name in found if name != "idle"}
    ratios = {
        name: [rate / base for rate, base in zip(rates[name], rates["without"], strict=True)]
        for name in ("full", "background")
    }
    flips = [p.flipped for name in ("full", "background") for p in found[name] if p.flipped]
    reports = {name: [p.staged.report for p in found[name] if p.staged] for name in found}
    idle = reports["idle"]
    return EngineFigures(
        num_bytes=idle[0].num_bytes,
        parts_s={name: statistics.median(r.parts[name] for r in idle) for name in idle[0].parts},
        serving_s={
            name: statistics.median(p.serving_s for p in found[name])
            for name in ("idle", "full", "background")
        },
        tokens_per_s={name: statistics.median(values) for name, values in rates.items()},
        shares={name: statistics.median(values) for name, values in ratios.items()},
        step_s=statistics.median(p.seconds / p.steps for p in found["without"]),
        flip_s=statistics.median(f.flip_s for f in flips),
        stall_s=statistics.median(f.stall_s for f in flips),
        steps_lost=statistics.median(f.steps_lost for f in flips),
        longest_slice_s={
            name: max(r.longest_slice_s for r in reports[name])
            for name in ("idle", "full", "background")
        },
        experts_reached=idle[0].experts_reached,
        load=(load, os.getloadavg()[0]),
    )


def synthetic(folder: Path, num_bytes: int) -> Path:
    """A sparse MoE of about so many bytes: hidden 1024, 64 experts of width 256, 4 of them chosen."""
    layer = 2 * (64 * 3 * 1024 * 256 + 3 * 1024 * 256 + 4 * 1024 * 1024)
    layers = max(2, round((num_bytes - 2 * 2 * 32000 * 1024) / layer))
    sizes = [
        *("vocab_size=32000", "hidden_size=1024", "intermediate_size=2816", "head_dim=64"),
        *("num_attention_heads=16", "num_key_value_heads=8", "rotary_dim=32", "n_group=1"),
        *("topk_group=1", "num_experts=64", "num_experts_per_tok=4", "moe_intermediate_size=256"),
        f"num_hidden_layers={layers}",
    ]
    return make_checkpoint(folder, shape=resize("tiny", sizes), format="bf16")


def lines(name: str, figures: EngineFigures) -> list[str]:
    """For people."""
    f = figures
    parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in f.parts_s.items())
    serving = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in f.serving_s.items())
    rates = ", ".join(f"{kind} {rate:.1f}" for kind, rate in f.tokens_per_s.items())
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in f.shares.items())
    slices = ", ".join(f"{kind} {1e3 * s:.1f}" for kind, s in f.longest_slice_s.items())
    reached = "–" if f.experts_reached is None else f"{f.experts_reached:.0%}"
    return [
        f"{name}: {f.num_bytes / 1e9:.2f} GB, load {f.load[0]:.1f} before, {f.load[1]:.1f} after",
        f"  busy seconds of staging: {parts}; experts reached {reached}",
        f"  seconds until it serves: {serving}",
        f"  tokens/s: {rates} ({shares} of without)",
        f"  step {1e3 * f.step_s:.1f} ms; longest slice, ms: {slices}",
        f"  stall {1e3 * f.stall_s:.2f} ms, {f.steps_lost:.2f} steps; flip {1e3 * f.flip_s:.2f} ms",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="what new weights cost an engine")
    parser.add_argument("--model", default="default", help="a folder, or default; none: leave out")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of a synthetic one; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--canaries", type=int, default=2, help="of 128 tokens each")
    parser.add_argument("--processor-time", action="store_true", help="of one thread")
    parser.add_argument("--seconds", type=float, default=3.0, help="of generation without staging")
    args = parser.parse_args()
    # shared memory outlives whoever is ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="everstep-bench-") as scratch:
        models: list[tuple[str, Path]] = []
        if args.model != "none":
            models.append((args.model, resolve(args.model)))
        if args.gigabytes:
            path = synthetic(Path(scratch) / "model", int(args.gigabytes * 1e9))
            models.append((f"sparse MoE, {args.gigabytes:g} GB", path))
        for name, folder in models:
            figures = measure(
                folder,
                rounds=args.rounds,
                rollouts=args.rollouts,
                seconds=args.seconds,
                canaries=args.canaries,
                processor_time=args.processor_time,
                say=lambda line: print(line, file=sys.stderr, flush=True),
            )
            print("\n".join(lines(name, figures)), flush=True)


if __name__ == "__main__":
    main()
