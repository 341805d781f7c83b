"""From the rows of a step and their logits to drawn tokens, in the words of the plan."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...kernels import Draw, DrawArrays, Rule, draw
from ..core.plan import Draws, Row, Sampled
from ..rollout import SAMPLED, TRUNCATED_SUPPORT, SamplingParams

# parameters whose rules are kept; more than can be live at once is only a matter of speed
MAX_RULES = 16384


@dataclass(frozen=True)
class _Kept:
    """A rule and the very parameters that it was made of.

    is_steady  it holds for every step: neither histories nor bans belong to it
    """

    sampling: SamplingParams
    rule: Rule
    is_steady: bool


class Drawer:
    """Draws for rows; keeps what follows from a rollout's parameters alone."""

    def __init__(self) -> None:
        # by identity: parameters hold a dict, and comparing them costs more than making a rule
        self._kept: dict[int, _Kept] = {}

    def draw(self, logits: torch.Tensor, rows: Sequence[Row], places: Sequence[int]) -> DrawArrays:
        """A token for each of `rows`, whose logits are rows `places` of `logits`."""
        if not rows:
            return DrawArrays.of([])
        return draw(
            logits,
            [self.rule(row) for row in rows],
            seeds=[row.seed for row in rows],
            positions=[len(row.all_ids) - row.num_prompt for row in rows],
            rows=places,
        )

    def rule(self, row: Row) -> Rule:
        """What the sampler needs to know of one row, but for seed and position."""
        kept = self._kept.get(id(row.sampling))
        if kept is None:
            kept = self._keep(row.sampling)
        return kept.rule if kept.is_steady else _rule_of_step(kept.rule, row)

    def _keep(self, sampling: SamplingParams) -> _Kept:
        if len(self._kept) >= MAX_RULES:
            self._kept.clear()
        is_steady = not (sampling.min_tokens or _counts(sampling))
        kept = _Kept(sampling, rule_of(sampling), is_steady)
        self._kept[id(sampling)] = kept
        return kept


def rule_of(p: SamplingParams) -> Rule:
    """The constants of a rollout."""
    return Rule(
        seed=0,
        position=0,
        temperature=p.temperature,
        top_p=p.top_p,
        top_k=max(p.top_k, 0),
        min_p=p.min_p,
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        repetition_penalty=p.repetition_penalty,
        logit_bias=p.logit_bias,
        num_top=p.top_logprobs,
        top_of=p.logprobs_mode,
        wants_raw="lp_raw" in p.record or (p.top_logprobs > 0 and p.logprobs_mode == "raw"),
        wants_entropy="entropy" in p.record,
        wants_kept_ids="kept_ids" in p.record,
    )


def _rule_of_step(rule: Rule, row: Row) -> Rule:
    """The rule with what this step adds: penalties' histories, min_tokens' ban."""
    p = row.sampling
    if _counts(p):
        prompt, output = row.all_ids[: row.num_prompt], row.all_ids[row.num_prompt :]
        rule = replace(rule, prompt_ids=prompt, output_ids=output)
    if row.position < p.min_tokens:
        rule = replace(rule, banned=row.banned_ids)
    return rule


def _counts(p: SamplingParams) -> bool:
    """Whether a penalty looks at what was said before."""
    return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0)


def columns_of(draws: DrawArrays, rows: Sequence[int], num_rows: int) -> Draws:
    """Draws as the plan has them: `rows` of its `num_rows` were drawn for, the others hold 0."""

    def spread(values: np.ndarray) -> np.ndarray:
        if len(rows) == num_rows:
            return values
        found = np.zeros(num_rows, dtype=values.dtype)
        found[rows] = values
        return found

    # float32: what is recorded is what any wire or file can hold
    flags = np.where(draws.is_cut, SAMPLED | TRUNCATED_SUPPORT, SAMPLED)
    return Draws(
        token_ids=spread(draws.token_ids).tolist(),
        lp_sampled=spread(draws.lp_sampled.astype(np.float32)).tolist(),
        lp_temp=spread(draws.lp_temp.astype(np.float32)).tolist(),
        kept_mass=spread(draws.kept_mass.astype(np.float32)).tolist(),
        flags=spread(flags).tolist(),
    )


def sampled_of(draw: Draw) -> Sampled:
    """A draw in the words of the plan; every value a float32."""
    return Sampled(
        token_id=draw.token_id,
        lp_sampled=_float32(draw.lp_sampled),
        lp_temp=_float32(draw.lp_temp),
        kept_mass=_float32(draw.kept_mass),
        flags=SAMPLED | (TRUNCATED_SUPPORT if draw.is_cut else 0),
        lp_raw=None if draw.lp_raw is None else _float32(draw.lp_raw),
        entropy=None if draw.entropy is None else _float32(draw.entropy),
        kept_ids=draw.kept_ids,
        top=None if draw.top is None else [(token, _float32(lp)) for token, lp in draw.top],
    )


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
