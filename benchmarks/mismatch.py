"""The demo's RL run with an engine that runs FP8 experts (W8A8) and a trainer in plain bf16: what
the corrections are worth under a real mismatch.

    python benchmarks/mismatch.py OUT [--seeds 0 1 2] [--rates 1e-3 2e-3] [--methods none tis …]
    python benchmarks/mismatch.py OUT --report [--plots benchmarks/plots]

For each seed one warm-up, shared by all runs; for each learning rate and method an engine and a trainer
as two processes, which publish every version as `fp8-experts`; then held-out questions for some of the
versions, asked as the engine runs them. `equal` is the control: one set of kernels on both sides, no
correction. What is finished is not run again, what was killed goes on: the same command resumes. The
report is of whatever is finished; Markdown on standard output, mismatch.svg into the folder of plots.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mismatch_report
import msgspec
from mismatch_report import METHODS, RESULT, Asked, Result

from everstep.clients.llm import LLM
from everstep.demo.children import Child
from everstep.demo.progress import read_progress
from everstep.demo.recipe import RUN, Files, Recipe, write_whole
from everstep.engine.checkpoint.quantize import quantize_checkpoint
from everstep.engine.config import PATIENCE
from everstep.engine.rollout import Rollout, SamplingParams
from everstep.trainer_bridge.demo import euclid
from everstep.trainer_bridge.demo.euclid_model import write_model

ITERATIONS = 20
ASKED_EVERY = 10
RATES = (1e-3, 2e-3)
LOOK_EVERY_S = 0.5
# half the demo's budget: as many rollouts are under way, so that more of the tokens are old ones
RECIPE = Recipe(iterations=ITERATIONS, kernels="plain", budget=4096)


class Seed:
    """The warm-up of a seed, in OUT/seed-N/warm-up, and its model as the FP8 engine has it."""

    def __init__(self, out: Path, seed: int) -> None:
        self.folder = out / f"seed-{seed}"
        self.seed = seed
        self.files = Files(self.folder / "warm-up", seed, RECIPE)
        self.trained = self.files.folder / "habit" / "final"
        self.fp8 = self.folder / "fp8"

    def warm_up(self) -> None:
        """Skill, then habit, as the demo has them; nothing is done twice."""
        self.files.begin()
        if not (self.files.start / "config.json").exists():
            shutil.rmtree(self.files.start, ignore_errors=True)
            write_model(self.files.start, self.seed)
        for stage in ("skill", "habit"):
            if not (self.files.folder / stage / "final" / "config.json").exists():
                say(f"seed {self.seed}: {stage}")
                command = ["train", f"{stage}.toml"]
                wait_for(Child(stage, command, self.files.folder, say=say))
        if not (self.fp8 / "config.json").exists():
            shutil.rmtree(self.fp8, ignore_errors=True)
            quantize_checkpoint(self.trained, self.fp8, dtype="bfloat16")


class Run:
    """One method at one learning rate on one seed, in OUT/seed-N/lr-RATE/METHOD."""

    def __init__(self, seed: Seed, method: str, lr: float) -> None:
        self.seed, self.method, self.lr = seed, method, lr
        self.folder = seed.folder / f"lr-{lr:g}" / method
        self.is_equal = method == "equal"

    @property
    def result(self) -> Path:
        return self.folder / RESULT

    def run(self) -> None:
        """Learn, ask, write the result."""
        if self.result.exists():
            return
        began_s, load = time.monotonic(), os.getloadavg()[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_settings()
        trainer = Child("trainer", ["train", "rl.toml"], self.folder, say=say)
        engine = Child("engine", self._engine(), self.folder, say=say)
        with engine:
            wait_for(trainer, engine)
        learned_s = time.monotonic() - began_s
        versions = [0, *range(ASKED_EVERY, ITERATIONS + 1, ASKED_EVERY)]
        asked = [self._asked(version) for version in versions]
        shutil.rmtree(self.folder / "versions")
        found = Result(
            seed=self.seed.seed,
            method=self.method,
            lr=self.lr,
            asked=asked,
            learned_s=learned_s,
            load=(load, os.getloadavg()[0]),
        )
        write_whole(self.result, found)
        progress = read_progress(self.folder / "rl")
        say(
            f"seed {self.seed.seed}, lr {self.lr:g}, {self.method}: held out {asked[0].right:.1%} to "
            f"{asked[-1].right:.1%}, |Δlp| {progress.metric('log_ratio_abs_mean')[-1]:.1e}, "
            f"masked {progress.metric('mask_fraction')[-1]:.3%}, {learned_s:.0f} s"
        )

    def _engine(self) -> list[str]:
        recipe, common = RECIPE, self.seed.files.folder
        flags = {
            "--model": self.seed.trained if self.is_equal else self.seed.fp8,
            "--numerics": "exact" if self.is_equal else "w8a8",
            "--prompts": common / "prompts.jsonl",
            "--out": "rollouts.jsonl",
            "--budget": recipe.budget,
            "--group": recipe.group,
            "--capacity": recipe.capacity,
            "--retention": recipe.retention,
            "--max-tokens": recipe.max_tokens,
            "--seed": self.seed.seed,
            "--bridge": "ipc://bridge",
            "--run-name": RUN,
            "--reward": common / "reward.toml",
            # what is left of a difference is FP8 and the age of tokens, not KV of older weights
            "--kv": "recompute",
            "--num-threads": 1,
        }
        return ["rollout", *(str(word) for pair in flags.items() for word in pair)]

    def _write_settings(self) -> None:
        settings: dict[str, Any] = {
            "model": str(self.seed.trained),
            "output": str(self.folder / "rl"),
            "objective": "rl",
            "max_steps": ITERATIONS,
            "source.endpoint": "ipc://bridge",
            "source.run": RUN,
            "numerics.kernels": "exact" if self.is_equal else "plain",
            "numerics.dtype": "float32" if self.is_equal else "bfloat16",
            "optim.lr": self.lr,
            "optim.warmup_steps": 3,
            "loss.name": "none" if self.is_equal else self.method,
            "publish.root": str(self.folder / "versions"),
            "publish.format": "model" if self.is_equal else "fp8-experts",
            "publish.keep": ITERATIONS,
            "checkpoint.every": 5,
            "checkpoint.keep": 1,
        }
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items()]
        (self.folder / "rl.toml").write_text("".join(lines))

    def _asked(self, version: int) -> Asked:
        """What all methods begin with is asked once."""
        if version:
            return self._ask(version, self.folder / "versions" / f"v{version}")
        kept = self.seed.folder / f"before-{'float32' if self.is_equal else 'fp8'}.json"
        if not kept.exists():
            write_whole(kept, self._ask(0, self.seed.trained if self.is_equal else self.seed.fp8))
        return msgspec.json.decode(kept.read_bytes(), type=Asked)

    def _ask(self, version: int, folder: Path) -> Asked:
        """The held-out questions at T = 1, of a version as the engine runs it."""
        pairs = self.seed.files.held_out()
        numerics = "exact" if self.is_equal else "w8a8"
        sampling = SamplingParams(temperature=1.0, max_tokens=RECIPE.max_tokens)
        with LLM(
            str(folder),
            skip_tokenizer_init=True,
            max_num_seqs=len(pairs),
            seed=self.seed.seed,
            numerics=numerics,
            num_threads=1,
        ) as llm:
            prompts = [euclid.encode(pair.prompt) for pair in pairs]
            rollouts: list[Rollout] = llm.generate(prompts, sampling)
        verdicts = [
            euclid.judge(pair, euclid.decode(rollout.output_ids))
            for pair, rollout in zip(pairs, rollouts, strict=True)
        ]
        return Asked(
            version=version,
            right=sum(verdict.is_right for verdict in verdicts) / len(pairs),
            length=sum(len(rollout.output_ids) for rollout in rollouts) / len(pairs),
        )


def wait_for(child: Child, *others: Child) -> None:
    """Until it has ended well; the others are kept alive meanwhile."""
    with child:
        while not child.is_done():
            for other in others:
                other.is_done()
            time.sleep(LOOK_EVERY_S)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def measure(
    out: Path, seeds: Sequence[int], rates: Sequence[float], methods: Sequence[str]
) -> None:
    for number in seeds:
        seed = Seed(out, number)
        seed.warm_up()
        for lr in rates:
            for method in methods:
                Run(seed, method, lr).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--plots", type=Path, help="folder for mismatch.svg")
    args = parser.parse_args()
    os.environ.update(PATIENCE | dict(os.environ))
    out = args.out.absolute()
    if not args.report:
        measure(out, args.seeds, args.rates, args.methods)
    mismatch_report.report(out, args.plots)


if __name__ == "__main__":
    main()
