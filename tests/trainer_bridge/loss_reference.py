"""The losses once more, token by token in Python floats, from the formulas and not from the code.

A sequence is a list of `Token`; a batch is a list of sequences. Nothing here is shared with
trainer_bridge, and nothing is fast.
"""

import math
from dataclasses import dataclass

INF = math.inf


@dataclass
class Token:
    """One token; `is_response` False: a prompt's or a tool's."""

    new: float
    old: float
    infer: float
    advantage: float = 1.0
    ref: float = -1.0
    is_response: bool = True


def exp(x):
    return INF if x > 700 else math.exp(x)


def bernoulli_kl(lp, lq):
    p = math.exp(lp)
    inverse_p, inverse_q = -math.expm1(lp), -math.expm1(lq)
    total = p * (lp - lq) if p else 0.0
    return total + (inverse_p * math.log(inverse_p / inverse_q) if inverse_p else 0.0)


def is_valid(t):
    return math.isfinite(t.old) and math.isfinite(t.infer) and not math.isnan(t.new) and t.new <= 0


def keeps(name, t, sequence, **c):
    """Whether a method keeps the token, gates aside."""
    d = t.old - t.infer
    if name == "icepop":
        return c["alpha"] <= exp(d) <= c["beta"]
    if name == "mis":
        if c.get("level") == "sequence":
            response = [u for u in sequence if u.is_response]
            if not all(map(is_valid, response)):
                return False
            d = sum(u.old - u.infer for u in response)
        return c.get("low", 0.0) <= exp(d) <= c["high"]
    if name == "kpop":
        there, back = bernoulli_kl(t.old, t.infer), bernoulli_kl(t.infer, t.old)
        return max(there, back) <= c["phi"]
    if name == "ipo":
        return abs(math.exp(t.old) - math.exp(t.infer)) <= c["threshold"]
    return True


def weight(name, t, sequence, **c):
    k = exp(t.old - t.infer)
    if name == "none":
        return 1.0
    if name == "tis":
        return min(max(k, c.get("low", 0.0)), c["high"])
    if name == "mis" and c.get("level") == "sequence":
        return exp(sum(u.old - u.infer for u in sequence if u.is_response))
    return k


def passes(sequence, gates):
    """Whether a sequence passes every gate that is on."""
    if not gates:
        return True
    response = [t for t in sequence if t.is_response]
    if not all(map(is_valid, response)):
        return False
    logs = [t.old - t.infer for t in response]
    mean = exp(sum(logs) / max(1, len(logs)))
    product = exp(sum(logs))
    return (
        gates.get("geometric_low", 0.0) <= mean <= gates.get("geometric_high", INF)
        and gates.get("product_low", 0.0) <= product <= gates.get("product_high", INF)
        and all(exp(d) >= gates.get("veto", 0.0) for d in logs)
    )


def token_objective(name, t, sequence, *, eps=(0.2, 0.2), kl=0.0, kept_only=False, gates=None, **c):
    """(J, dJ/d new, kept) of one token."""
    if not t.is_response:
        return 0.0, 0.0, False
    kept = is_valid(t) and keeps(name, t, sequence, **c) and passes(sequence, gates)
    value = slope = 0.0
    if kept:
        w, r = weight(name, t, sequence, **c), exp(t.new - t.old)
        bounded = min(max(r, 1 - eps[0]), 1 + eps[1])
        value = w * min(r * t.advantage, bounded * t.advantage)
        binds = bounded * t.advantage < r * t.advantage
        slope = 0.0 if binds else w * r * t.advantage
    pays = math.isfinite(t.new) and math.isfinite(t.ref) and (kept or not kept_only)
    if kl and pays:
        x = t.ref - t.new
        value -= kl * (math.exp(x) - 1 - x)
        slope -= kl * (1 - math.exp(x))
    return value, slope, kept


def objective(name, batch, *, aggregation="seq_mean", fixed=None, **c):
    """(J, gradient per token of each sequence, kept per token of each sequence)."""
    lengths = [sum(t.is_response for t in sequence) for sequence in batch]
    total, slopes, kept = 0.0, [], []
    for sequence, length in zip(batch, lengths, strict=True):
        scale = {
            "seq_mean": 1 / (max(1, length) * max(1, len(batch))),
            "token_mean": 1 / max(1, sum(lengths)),
            "fixed": 1 / (fixed or 1),
        }[aggregation]
        found = [token_objective(name, t, sequence, **c) for t in sequence]
        total += scale * sum(value for value, _, _ in found)
        slopes.append([scale * slope for _, slope, _ in found])
        kept.append([keep for _, _, keep in found])
    return total, slopes, kept
