"""Without training: how far forms of the engine are from a bf16 trainer under the same weights.

    python benchmarks/mismatch_still.py OUT [--seed 0]

OUT is a folder of benchmarks/mismatch.py, whose warm-up is used: after the skill, and after the habit.
The held-out questions are answered at T = 1 by each form, and scored again by the trainer's model in
plain torch; there are no older versions, so what differs is kernels and FP8. Markdown.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from mismatch import RECIPE, Seed
from mismatch_report import figure, markdown, percent

from everstep.clients.llm import LLM
from everstep.engine.checkpoint.fp8_policy import Fp8Format
from everstep.engine.checkpoint.quantize import quantize_checkpoint
from everstep.engine.rollout import Rollout, SamplingParams
from everstep.trainer_bridge.demo import euclid
from everstep.trainer_bridge.losses.config import LossConfig, LossName
from everstep.trainer_bridge.losses.losses import LossInputs, make_loss
from everstep.trainer_bridge.losses.metrics import metrics_of
from everstep.trainer_bridge.trainer.packing import pack
from everstep.trainer_bridge.trainer.trainable import TrainableRing, open_trainable
from everstep.trainer_bridge.trajectories.samples import sample_of

FORMS: tuple[tuple[str, Fp8Format | None, str], ...] = (
    ("bf16", None, "exact"),
    ("experts' weights FP8", "fp8-experts", "exact"),
    ("experts W8A8", "fp8-experts", "w8a8"),
    ("all linear layers W8A8", "fp8-block", "w8a8"),
)
MASKING: tuple[LossName, ...] = ("icepop", "kpop")


def answers(folder: Path, numerics: str, seed: Seed) -> list[Rollout]:
    sampling = SamplingParams(temperature=1.0, max_tokens=RECIPE.max_tokens)
    prompts = [euclid.encode(pair.prompt) for pair in seed.files.held_out()]
    with LLM(
        str(folder),
        skip_tokenizer_init=True,
        max_num_seqs=len(prompts),
        seed=seed.seed,
        numerics=numerics,
        dtype="bfloat16",
        num_threads=1,
    ) as llm:
        return llm.generate(prompts, sampling)


@torch.no_grad()
def differences(ring: TrainableRing, rollouts: Sequence[Rollout]) -> list[str]:
    """Cells of the table."""
    samples = [sample_of(rollout, ring.config) for rollout in rollouts]
    batch = pack([sample.sequence for sample in samples])
    scores, owner = ring(batch), batch.responses[0]
    inputs = LossInputs(
        lp_new=scores.lp[None],
        lp_infer=torch.cat([torch.from_numpy(sample.lp_infer) for sample in samples])[None],
        advantages=torch.ones_like(scores.lp)[None],
        mask=torch.ones_like(scores.lp, dtype=torch.bool)[None],
        sequence_ids=owner[None],
    )
    found = {name: metrics_of(inputs, make_loss(LossConfig(name=name))(inputs)) for name in MASKING}
    metrics = found["icepop"]
    gaps = [metrics[f"log_ratio_abs_{name}"] for name in ("mean", "p99", "max")]
    cells = [*map(figure, gaps), figure(metrics["kl_k3"]), figure(metrics["prob_diff_max"])]
    return cells + [percent(found[name]["mask_fraction"]) for name in MASKING]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of benchmarks/mismatch.py")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seed = Seed(args.out.absolute(), args.seed)
    masked = [f"masked by {name}" for name in MASKING]
    table = [["", "abs(Δlp), mean", "p99", "largest", "KL k3", "largest p−q", *masked]]
    for stage in ("skill", "habit"):
        trained = seed.files.folder / stage / "final"
        ring = open_trainable(trained, dtype=torch.bfloat16)
        for name, fp8, numerics in FORMS:
            with tempfile.TemporaryDirectory() as scratch:
                folder = trained
                if fp8 is not None:
                    target = Path(scratch) / fp8
                    folder = quantize_checkpoint(trained, target, fp8, dtype="bfloat16")
                rollouts = answers(folder, numerics, seed)
            table.append([f"{stage}: {name}", *differences(ring, rollouts)])
    print(markdown(table))


if __name__ == "__main__":
    main()
