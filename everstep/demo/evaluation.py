"""What the demo's model can: the same code judges it before and after."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from ..clients.llm import LLM
from ..engine.rollout import Rollout, SamplingParams
from ..trainer_bridge.demo import euclid
from ..trainer_bridge.demo.euclid import Pair, Verdict
from ..trainer_bridge.run.report import Lengths


class Answers(Struct, frozen=True):
    """Of all questions, once each.

    right  share of questions
    legal  share of written steps that follow from the one before; None: none was written
    """

    right: float
    legal: float | None
    mean_length: float
    lengths: Lengths

    @classmethod
    def of(cls, verdicts: Sequence[Verdict], lengths: Sequence[int]) -> "Answers":
        written = sum(verdict.num_written for verdict in verdicts)
        legal = sum(verdict.num_legal for verdict in verdicts)
        spread = Lengths.of(lengths)
        assert spread is not None, "there are no questions"
        return cls(
            right=sum(verdict.is_right for verdict in verdicts) / len(verdicts),
            legal=legal / written if written else None,
            mean_length=sum(lengths) / len(lengths),
            lengths=spread,
        )


class Evaluation(Struct, frozen=True):
    """sampled at T = 1, and greedy."""

    sampled: Answers
    greedy: Answers


def evaluate(folder: Path, pairs: Sequence[Pair], *, seed: int, max_tokens: int) -> Evaluation:
    """Ask a checkpoint; the same seed draws the same answers. Raises CheckpointError."""
    prompts = [euclid.encode(pair.prompt) for pair in pairs]
    with LLM(str(folder), skip_tokenizer_init=True, max_num_seqs=64, seed=seed) as llm:

        def ask(temperature: float) -> Answers:
            sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
            rollouts: list[Rollout] = llm.generate(list(prompts), sampling)
            verdicts = [
                euclid.judge(pair, euclid.decode(rollout.output_ids))
                for pair, rollout in zip(pairs, rollouts, strict=True)
            ]
            return Answers.of(verdicts, [len(rollout.output_ids) for rollout in rollouts])

        return Evaluation(sampled=ask(1.0), greedy=ask(0.0))
