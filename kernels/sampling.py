"""From logits to one drawn token and what is known of it.

The order is fixed (DESIGN.md §2): penalties and logit_bias, then ÷ temperature and log-softmax
(= `lp_temp`); then banned ids, top-k, top-p, min-p cut the support; `lp_sampled` = `lp_temp` −
ln(kept mass). A token is the inverse of the cumulative distribution over the kept support at one
uniform number, summed in ascending id in blocks of CDF_BLOCK.

Shapes: B rows, V vocabulary.
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from .philox import uniforms
from .reduce import tree_sum

CDF_BLOCK = 512
# candidates that top-p looks at before it falls back to the whole vocabulary
PARTIAL = 1024
# a rule as cpu/sampling.cpp reads it: its struct Rule
RULE = np.dtype(
    [
        *((name, np.float64) for name in ("u", "top_p")),
        *((name, np.int64) for name in ("top_k", "banned_from", "banned_count", "num_top")),
        *((name, np.int64) for name in ("kept_row", "row", "changed")),
        *((name, np.float32) for name in ("temperature", "min_p")),
        *((name, np.int32) for name in ("top_of", "wants_raw", "wants_entropy")),
    ],
    align=True,
)
_TOP_OF = {"raw": 0, "temp": 1, "sampled": 2}


@dataclass(frozen=True)
class Rule:
    """How one row is drawn; values as `SamplingParams` documents them.

    prompt_ids  repetition_penalty counts these and output_ids; the other penalties output_ids
    banned      ids outside the support (min_tokens' stop ids)
    """

    seed: int
    position: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    banned: Sequence[int] = ()
    num_top: int = 0
    top_of: str = "raw"
    wants_raw: bool = False
    wants_entropy: bool = False
    wants_kept_ids: bool = False

    @functools.cached_property
    def record(self) -> bytes:
        """Its constants as the C++ library reads them (RULE)."""
        record = np.zeros(1, dtype=RULE)
        for name in ("top_p", "top_k", "temperature", "min_p", "wants_raw", "wants_entropy"):
            record[name] = getattr(self, name)
        record["num_top"], record["top_of"] = self.num_top, _TOP_OF[self.top_of]
        record["kept_row"] = -1
        return record.tobytes()

    @functools.cached_property
    def is_special(self) -> bool:
        """Whether there is more to it than its record."""
        return bool(self.changes_logits or self.banned or self.wants_more)

    @property
    def wants_more(self) -> bool:
        """Whether its draw has optional fields."""
        return bool(self.num_top or self.wants_raw or self.wants_entropy or self.wants_kept_ids)

    @property
    def changes_logits(self) -> bool:
        return bool(
            self.logit_bias
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
        )

    @property
    def cuts_support(self) -> bool:
        return (
            bool(self.banned or self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)
            or self.temperature == 0.0
        )


@dataclass
class Draw:
    """One drawn token; optional fields are None unless the rule asks."""

    token_id: int
    lp_sampled: float
    lp_temp: float
    kept_mass: float
    is_cut: bool
    lp_raw: float | None = None
    entropy: float | None = None
    kept_ids: list[int] | None = None
    top: list[tuple[int, float]] | None = None


@dataclass
class DrawArrays:
    """DrawArrays of N rows as columns.

    token_ids  (N,) int64; lp_sampled, lp_temp, kept_mass (N,) float64; is_cut (N,) bool
    is_lost    (N,) bool: the rule takes the logits beyond float32, and nothing was drawn
    more       place → the draw with its optional fields, where its rule asks for any
    """

    token_ids: npt.NDArray[np.int64]
    lp_sampled: npt.NDArray[np.float64]
    lp_temp: npt.NDArray[np.float64]
    kept_mass: npt.NDArray[np.float64]
    is_cut: npt.NDArray[np.bool_]
    is_lost: npt.NDArray[np.bool_]
    more: dict[int, Draw] = field(default_factory=dict)

    @classmethod
    def of(cls, draws: Sequence[Draw | None]) -> "DrawArrays":
        """From one draw per row."""
        nothing = Draw(0, 0.0, 0.0, 0.0, False)
        each = [draw or nothing for draw in draws]
        return cls(
            token_ids=np.array([draw.token_id for draw in each], dtype=np.int64),
            lp_sampled=np.array([draw.lp_sampled for draw in each]),
            lp_temp=np.array([draw.lp_temp for draw in each]),
            kept_mass=np.array([draw.kept_mass for draw in each]),
            is_cut=np.array([draw.is_cut for draw in each], dtype=bool),
            is_lost=np.array([draw is None for draw in draws], dtype=bool),
            more={
                n: draw
                for n, draw in enumerate(each)
                if (draw.lp_raw, draw.entropy, draw.kept_ids, draw.top) != (None,) * 4
            },
        )

    def plain(self, place: int) -> Draw:
        """One draw, without its optional fields."""
        return Draw(
            int(self.token_ids[place]),
            float(self.lp_sampled[place]),
            float(self.lp_temp[place]),
            float(self.kept_mass[place]),
            bool(self.is_cut[place]),
        )

    def list(self) -> "list[Draw | None]":
        """One draw per row; None where it is lost."""
        return [
            None if lost else self.more.get(n) or self.plain(n)
            for n, lost in enumerate(self.is_lost.tolist())
        ]


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """(B, V) float32 → (B, V) float32; the sum is a fixed tree over V."""
    top = logits.amax(dim=-1, keepdim=True)
    total = tree_sum(torch.exp(logits - top)).unsqueeze(-1)
    # not logits - (top + log): a large top would swallow the logarithm's digits
    return (logits - top) - torch.log(total)


def sample(logits: torch.Tensor, rules: Sequence[Rule]) -> list[Draw | None]:
    """Draw one token per row; None where its rule takes the logits beyond float32.

    logits  (B, V) float32, finite; not changed
    rules   B
    A row's outcome depends on that row and its rule alone.
    """
    changed = logits
    if any(rule.changes_logits for rule in rules):
        changed = logits.clone()
        for row, rule in enumerate(rules):
            if rule.changes_logits:
                penalise(changed[row], rule)
    temperatures = torch.tensor([rule.temperature or 1.0 for rule in rules])
    lp_temp = log_softmax(changed / temperatures.unsqueeze(1))
    overflows = _overflows(lp_temp, rules)
    lp_raw = log_softmax(logits) if any(r.wants_raw or r.num_top for r in rules) else None
    weights = torch.exp(lp_temp).double()
    kept = [
        _support(lp_temp[row], rule) if rule.cuts_support else None
        for row, rule in enumerate(rules)
    ]
    tops = [0.0] * len(rules)
    for row, ids in enumerate(kept):
        if ids is not None:
            # relative to the best kept id: what a ban leaves may have underflowed
            lp = lp_temp[row, ids].double()
            top = lp.max()
            only = torch.zeros_like(weights[row])
            only[ids] = torch.exp(lp - top)
            weights[row], tops[row] = only, float(top)
    tokens, masses = _draw(weights, rules)
    return [
        None
        if row in overflows
        else _describe(
            row, rule, tokens[row], tops[row] + math.log(masses[row]), kept[row], lp_temp, lp_raw
        )
        for row, rule in enumerate(rules)
    ]


def _overflows(lp_temp: torch.Tensor, rules: Sequence[Rule]) -> set[int]:
    """Rows that have no best id, because penalties or ÷ temperature left float32. They are
    flattened, so that the other rows can be drawn beside them."""
    if not any(rule.changes_logits or 0.0 < rule.temperature < 1.0 for rule in rules):
        return set()
    is_lost = ~torch.isfinite(lp_temp.amax(dim=1))
    lp_temp[is_lost] = 0.0
    return set(is_lost.nonzero()[:, 0].tolist())


def penalise(logits: torch.Tensor, rule: Rule) -> None:
    """Apply penalties and bias to one row, in place (each id once, whatever the order)."""
    counts = Counter(rule.output_ids)
    if rule.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*rule.prompt_ids, *counts}), dtype=torch.int64)
        values = logits[seen]
        penalty = rule.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if counts and (rule.presence_penalty or rule.frequency_penalty):
        ids = sorted(counts)
        amounts = torch.tensor([counts[i] for i in ids], dtype=torch.float32)
        logits[torch.tensor(ids)] -= rule.frequency_penalty * amounts + rule.presence_penalty
    if rule.logit_bias:
        ids = sorted(rule.logit_bias)
        logits[torch.tensor(ids)] += torch.tensor([rule.logit_bias[i] for i in ids])


def _support(lp: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Kept ids of one row, ascending: bans, then top-k, top-p, min-p on what is left.

    lp  (V,) float32. Equal probabilities: the lower id is kept first. Never empty: if every id
    is banned, the bans are void.
    """
    if rule.banned and len(set(rule.banned)) < lp.shape[0]:
        lp = lp.clone()
        lp[torch.tensor(list(rule.banned))] = float("-inf")
    if rule.temperature == 0.0:
        return (lp == lp.max()).nonzero()[0]
    ids = _ranked(lp, rule)
    p = torch.exp(lp[ids] - lp[ids[0]]).double()
    if rule.top_p < 1.0:
        whole = float(tree_sum(p)) if _has_all(rule, ids, lp) else _mass(lp, lp[ids[0]])
        before = torch.cumsum(p, 0) - p
        ids = ids[: max(1, int((before < rule.top_p * whole).sum()))]
    if rule.min_p > 0.0:
        ids = ids[torch.exp(lp[ids] - lp[ids[0]]) >= rule.min_p]
    return ids.sort().values


def _has_all(rule: Rule, ids: torch.Tensor, lp: torch.Tensor) -> bool:
    """Whether `ids` is the whole support that top-p divides up."""
    return 0 < rule.top_k < lp.shape[0] or ids.shape[0] == lp.shape[0]


def _mass(lp: torch.Tensor, top: torch.Tensor) -> float:
    """Σ exp(lp − top), float64, in id order by a fixed tree."""
    return float(tree_sum(torch.exp(lp - top).double()))


def _ranked(lp: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Ids of finite lp by probability descending, then id: as many as top-k and top-p can need."""
    vocab = lp.shape[0]
    finite = int((lp > float("-inf")).sum())
    limit = min(rule.top_k, finite) if rule.top_k > 0 else finite
    if limit <= PARTIAL < vocab:
        return _best(lp, limit)
    if rule.top_p < 1.0 and limit == finite and vocab > PARTIAL:
        ids = _best(lp, min(PARTIAL, finite))
        p = torch.exp(lp[ids] - lp[ids[0]]).double()
        if float(torch.cumsum(p, 0)[-1] - p[-1]) >= rule.top_p * _mass(lp, lp[ids[0]]):
            return ids
    return torch.sort(lp, descending=True, stable=True).indices[:limit]


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` largest values, by value descending, then id ascending."""
    smallest = torch.topk(values, count).values[-1]
    ids = (values >= smallest).nonzero()[:, 0]
    order = torch.sort(values[ids], descending=True, stable=True).indices
    return ids[order[:count]]


def _draw(weights: torch.Tensor, rules: Sequence[Rule]) -> tuple[list[int], list[float]]:
    """Inverse of the cumulative sums at one uniform number per row.

    weights  (B, V) float64, zero outside the support
    returns  token ids, and the sum of each row
    """
    rows, vocab = weights.shape
    blocks = -(-vocab // CDF_BLOCK)
    padded = torch.nn.functional.pad(weights, (0, -vocab % CDF_BLOCK))
    padded = padded.view(rows, blocks, CDF_BLOCK)
    sums = torch.cumsum(tree_sum(padded), dim=-1)
    u = torch.from_numpy(uniforms([r.seed for r in rules], [r.position for r in rules]))
    masses = sums[:, -1]
    target = u * masses
    has_weight = padded.amax(dim=-1) > 0
    block = _first_above(sums, target, has_weight)
    index = torch.arange(rows)
    below = torch.where(block > 0, sums[index, (block - 1).clamp(min=0)], 0.0)
    inner = torch.cumsum(padded[index, block], dim=-1)
    offset = _first_above(inner, target - below, padded[index, block] > 0)
    return (block * CDF_BLOCK + offset).tolist(), masses.tolist()


def _first_above(
    sums: torch.Tensor, target: torch.Tensor, has_weight: torch.Tensor
) -> torch.Tensor:
    """Per row, the first index with weight whose cumulative sum exceeds the target; where
    rounding leaves none, the last index with weight."""
    hit = (sums > target.unsqueeze(1)) & has_weight
    index = torch.arange(sums.shape[1])
    first = torch.where(hit, index, sums.shape[1]).amin(dim=1)
    last = torch.where(has_weight, index, -1).amax(dim=1)
    return torch.minimum(first, last)


def _describe(
    row: int,
    rule: Rule,
    token: int,
    log_mass: float,
    kept: torch.Tensor | None,
    lp_temp: torch.Tensor,
    lp_raw: torch.Tensor | None,
) -> Draw:
    is_cut = kept is not None and kept.shape[0] < lp_temp.shape[1]
    # an uncut support has mass 1 by definition, whatever the rounding of its sum
    log_mass = min(log_mass, 0.0) if is_cut else 0.0
    lp = float(lp_temp[row, token])
    is_only = kept is not None and kept.shape[0] == 1
    lp_sampled = 0.0 if is_only else min(lp - log_mass, 0.0)
    draw = Draw(token, lp_sampled, lp, math.exp(log_mass), is_cut)
    if lp_raw is not None and rule.wants_raw:
        draw.lp_raw = float(lp_raw[row, token])
    if rule.wants_entropy:
        # p·ln p is 0 where p has underflowed, lp being finite
        draw.entropy = float(-tree_sum(torch.exp(lp_temp[row]) * lp_temp[row]))
    if rule.wants_kept_ids:
        # empty: nothing was cut
        draw.kept_ids = kept.tolist() if is_cut and kept is not None else []
    if rule.num_top and lp_raw is not None:
        draw.top = _alternatives(row, rule, kept, log_mass, lp_temp, lp_raw)
    return draw


def _alternatives(
    row: int,
    rule: Rule,
    kept: torch.Tensor | None,
    log_mass: float,
    lp_temp: torch.Tensor,
    lp_raw: torch.Tensor,
) -> list[tuple[int, float]]:
    values = lp_raw[row] if rule.top_of == "raw" else lp_temp[row]
    if rule.top_of == "sampled" and kept is not None:
        # float64, as lp_sampled is: the drawn token is listed with its own number
        values = torch.full_like(values, float("-inf"), dtype=torch.float64)
        values[kept] = lp_temp[row, kept].double() - log_mass
    ids = _best(values, min(rule.num_top, values.shape[0]))
    pairs = zip(ids.tolist(), values[ids].tolist(), strict=True)
    return [(token, lp) for token, lp in pairs if lp > float("-inf")]


def top_of(lp: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """The `count` best (id, logprob) of one row, ties by id. lp (V,) float32."""
    if count == 0:
        return []
    ids = _best(lp, min(count, lp.shape[0]))
    return list(zip(ids.tolist(), lp[ids].tolist(), strict=True))
