"""Every operation once more, written from its definition alone (MODEL.md §3, DESIGN.md §2).

Loops over rows, tokens, slots and ids in float64: slow on purpose, to be checked by reading. It
shares data classes with the kernels (`Weight`, `QuerySpan`, `Rule`, `Draw`) and no function.
T(·) rounds to the model's dtype exactly where the definition does.

Shapes: M rows, N outputs, K inputs, T tokens, E experts, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import QuerySpan
from .gemm import Weight
from .sampling import Draw, Rule

# rows and columns of an FP8 block, and columns of an activation group
FP8_BLOCK = 128
E4M3_MAX = 448.0
WORD = 2**32


# -- elementwise and per row


def sigmoid(x: Tensor) -> Tensor:
    """1/(1+e^-x), rounded to float32."""
    return (1.0 / (1.0 + torch.exp(-x.double()))).float()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """T(T(silu(gate)) · up), silu(a) = a/(1+e^-a)."""
    wide = gate.double()
    silu = (wide / (1.0 + torch.exp(-wide))).to(gate.dtype)
    return (silu.double() * up.double()).to(gate.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """T(weight · T(x / sqrt(mean(x²) + eps))) over the last dimension."""
    wide = x.double()
    mean = (wide * wide).mean(-1, keepdim=True)
    normed = (wide / torch.sqrt(mean + eps)).to(x.dtype)
    return (weight.double() * normed.double()).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + d_r/2) of each head, each step rounded to the tables' dtype."""
    tables, out = cos.dtype, x.clone()

    def rounded(value: Tensor) -> Tensor:
        return value.to(tables).double()

    half = cos.shape[1]
    for j in range(half):
        c, s = cos[:, j : j + 1].double(), sin[:, j : j + 1].double()
        a, b = x[:, :, j].double(), x[:, :, j + half].double()
        out[:, :, j] = rounded(rounded(a * c) - rounded(b * s)).to(x.dtype)
        out[:, :, j + half] = rounded(rounded(b * c) + rounded(a * s)).to(x.dtype)
    return out


# -- linear layers


def scale_of(weight: Weight) -> Tensor:
    """(N, K) float64: the scale of each weight, its block's or its row's."""
    assert weight.scale is not None
    rows, columns = weight.data.shape
    scales = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        if weight.kind == "channel":
            scales[n] = weight.scale[n, 0]
            continue
        for k in range(0, columns, FP8_BLOCK):
            scales[n, k : k + FP8_BLOCK] = weight.scale[n // FP8_BLOCK, k // FP8_BLOCK]
    return scales


def expand(weight: Weight) -> Tensor:
    """(N, K) T: code · scale, rounded once."""
    if weight.scale is None:
        return weight.data
    return (weight.data.double() * scale_of(weight)).to(weight.dtype)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """T(x Wᵀ + b) in every weight format; (M, K) T → (M, N) T."""
    return product(x, weight).to(x.dtype)


def product(x: Tensor, weight: Weight) -> Tensor:
    """x Wᵀ + b in float64, before it is rounded."""
    if weight.scale is None or weight.activations == "none":
        total = x.double() @ expand(weight).double().t()
    else:
        width = x.shape[1] if weight.activations == "token" else FP8_BLOCK
        quantised = torch.zeros(x.shape, dtype=torch.float64)
        for m in range(x.shape[0]):
            for k in range(0, x.shape[1], width):
                quantised[m, k : k + width] = quantise(x[m, k : k + width], weight.activations)
        total = quantised @ (weight.data.double() * scale_of(weight)).t()
    if weight.bias is not None:
        total = total + weight.bias.double()
    return total


def quantise(group: Tensor, activations: str) -> Tensor:
    """float64(e4m3(x / s)) · s of one group of activations; s = amax/448, a float32."""
    wide = group.float()
    largest = wide.abs().max()
    if activations == "group":
        largest = largest.clamp(min=1e-10)
    elif float(largest) == 0.0:
        return torch.zeros_like(group, dtype=torch.float64)
    s = largest / E4M3_MAX
    codes = (wide / s).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.double() * s.double()


# -- mixture of experts


def route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    scaling: float,
    forced_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ids (T, K) and weights (T, K) float32; lower experts and lower groups win ties."""
    tokens, num_experts = x.shape[0], gate.shape[0]
    ids = torch.zeros(tokens, top_k, dtype=torch.int64)
    weights = torch.zeros(tokens, top_k)
    for t in range(tokens):
        scores = [
            float(sigmoid((x[t].double() * gate[e].double()).sum())) for e in range(num_experts)
        ]
        if forced_ids is not None:
            chosen = [int(e) for e in forced_ids[t]]
        else:
            # p + bias is a float32 sum: that is where ties are made
            choice = [float(torch.tensor(scores[e]) + bias[e]) for e in range(num_experts)]
            chosen = best_experts(choice, top_k, n_group, topk_group)
        kept = [scores[e] for e in chosen]
        if top_k > 1:
            kept = [p / (sum(kept) + 1e-20) for p in kept]
        ids[t] = torch.tensor(chosen)
        weights[t] = torch.tensor([p * scaling for p in kept])
    return ids, weights


def best_experts(choice: list[float], top_k: int, n_group: int, topk_group: int) -> list[int]:
    """The best experts of the best groups, by choice score descending, then index."""
    allowed = list(range(len(choice)))
    if n_group > 1:
        size = len(choice) // n_group
        grouped = torch.tensor(choice).view(n_group, size).sort(dim=1, descending=True).values
        two_best = (grouped[:, 0] + grouped[:, 1]).tolist()
        groups = sorted(range(n_group), key=lambda g: (-two_best[g], g))[:topk_group]
        allowed = [e for e in allowed if e // size in groups]
    return sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Sequence[Weight],
    up: Sequence[Weight],
    down: Sequence[Weight],
) -> Tensor:
    """T(Σ_slot mlp_{ids[slot]}(x) · weights[slot]); each expert's output is rounded to T first
    (in W8A8 after its weight)."""
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        row = x[t : t + 1]
        total = torch.zeros(1, x.shape[1], dtype=torch.float64)
        for slot in range(ids.shape[1]):
            e = int(ids[t, slot])
            a, b, weight = linear(row, gate[e]), linear(row, up[e]), weights[t, slot].double()
            if gate[e].activations == "none":
                total += linear(swiglu(a, b), down[e]).double() * weight
            else:
                # FP8 serving rounds SwiGLU once and the weighted output once (MODEL.md §2.3)
                hidden = (a.double() / (1.0 + torch.exp(-a.double())) * b.double()).to(x.dtype)
                total += (product(hidden, down[e]) * weight).to(x.dtype).double()
        out[t] = total[0].to(x.dtype)
    return out


# -- attention


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sequences: Sequence[QuerySpan],
    *,
    block_size: int,
    scale: float,
) -> Tensor:
    """Causal attention, query by query and head by head, over each rollout's block table.

    q (T, H, D) T; k_cache, v_cache (slots, G, D) T; query head h reads kv head h // (H/G)
    """
    out = torch.zeros_like(q)
    share = q.shape[1] // k_cache.shape[1]
    for sequence in sequences:
        for i in range(sequence.length):
            position = sequence.start + i
            slots = torch.tensor(
                [
                    sequence.block_table[p // block_size] * block_size + p % block_size
                    for p in range(position + 1)
                ]
            )
            row = sequence.row + i
            for head in range(q.shape[1]):
                keys = k_cache[slots, head // share].double()
                values = v_cache[slots, head // share].double()
                scores = keys @ q[row, head].double() * scale
                weights = torch.exp(scores - scores.max())
                weights = (weights / weights.sum()).to(q.dtype)
                out[row, head] = (weights.double() @ values).to(q.dtype)
    return out


# -- sampling


def log_softmax(logits: Tensor) -> Tensor:
    """(…, V) → (…, V) float64."""
    wide = logits.double()
    shifted = wide - wide.amax(-1, keepdim=True)
    return shifted - torch.log(torch.exp(shifted).sum(-1, keepdim=True))


def penalised(logits: Sequence[float], rule: Rule) -> list[float]:
    """Repetition penalty (Hugging Face), frequency and presence penalties and bias (OpenAI)."""
    changed = [float(value) for value in logits]
    for i in range(len(changed)):
        if i in rule.prompt_ids or i in rule.output_ids:
            is_positive = changed[i] > 0
            penalty = rule.repetition_penalty
            changed[i] = changed[i] / penalty if is_positive else changed[i] * penalty
        count = sum(1 for token in rule.output_ids if token == i)
        changed[i] -= count * rule.frequency_penalty
        changed[i] -= rule.presence_penalty if count > 0 else 0.0
        changed[i] += rule.logit_bias.get(i, 0.0)
    return changed


def tempered(logits: Sequence[float], rule: Rule) -> Tensor:
    """(V,) float64: `lp_temp`; T = 0 counts as 1."""
    values = torch.tensor(penalised(logits, rule), dtype=torch.float64)
    return log_softmax(values / (rule.temperature or 1.0))


def support(lp: Sequence[float], rule: Rule) -> list[int]:
    """Kept ids, ascending: bans, top-k, top-p, min-p in this order; lower ids first among equals."""
    banned = set(rule.banned)
    ids = [i for i in range(len(lp)) if i not in banned] or list(range(len(lp)))
    ids.sort(key=lambda i: (-lp[i], i))
    if rule.temperature == 0.0:
        return ids[:1]
    if rule.top_k > 0:
        ids = ids[: rule.top_k]
    top = lp[ids[0]]
    if rule.top_p < 1.0:
        # an id stays while what is before it has not reached top_p of what is left
        whole = math.fsum(math.exp(lp[i] - top) for i in ids)
        kept: list[int] = []
        before = 0.0
        for i in ids:
            if kept and before >= rule.top_p * whole:
                break
            kept.append(i)
            before += math.exp(lp[i] - top)
        ids = kept
    if rule.min_p > 0.0:
        ids = [i for i in ids if math.exp(lp[i] - top) >= rule.min_p]
    return sorted(ids)


def log_mass(lp: Sequence[float], ids: Sequence[int]) -> float:
    """ln Σ exp(lp) over some ids; 0 if they are all of them."""
    if len(ids) == len(lp):
        return 0.0
    top = max(lp[i] for i in ids)
    return top + math.log(math.fsum(math.exp(lp[i] - top) for i in ids))


def inverse_cdf(weights: Sequence[float], u: float) -> int:
    """The first index with weight whose cumulative sum exceeds u times the whole sum."""
    target, total = u * sum(weights), 0.0
    last = -1
    for i, weight in enumerate(weights):
        total += weight
        if weight > 0:
            last = i
            if total > target:
                return i
    return last


def sample(logits: Tensor, rule: Rule) -> Draw:
    """One row (V,): the token drawn at (seed, position), and everything that is known of it."""
    row = [float(value) for value in logits]
    lp = tempered(row, rule).tolist()
    kept = support(lp, rule)
    mass = log_mass(lp, kept)
    top = max(lp[i] for i in kept)
    weights = [0.0] * len(lp)
    for i in kept:
        weights[i] = math.exp(lp[i] - top)
    token = inverse_cdf(weights, uniform(rule.seed, rule.position))
    raw = log_softmax(logits).tolist()
    sampled = {i: lp[i] - mass for i in kept}
    shown = {"raw": dict(enumerate(raw)), "temp": dict(enumerate(lp)), "sampled": sampled}
    return Draw(
        token_id=token,
        lp_sampled=sampled[token],
        lp_temp=lp[token],
        kept_mass=math.exp(mass),
        is_cut=len(kept) < len(lp),
        lp_raw=raw[token],
        entropy=-math.fsum(math.exp(value) * value for value in lp),
        kept_ids=kept,
        top=top_of(shown[rule.top_of], rule.num_top),
    )


def top_of(lp: dict[int, float], count: int) -> list[tuple[int, float]]:
    """The `count` best of id → logprob, lower ids first among equals."""
    return sorted(lp.items(), key=lambda pair: (-pair[1], pair[0]))[:count]


def uniform(seed: int, position: int) -> float:
    """53 bits of Philox4x32-10 with key = seed and counter = position, as a number in [0, 1)."""
    low, high, third, fourth = position % WORD, position // WORD % WORD, 0, 0
    key_low, key_high = seed % WORD, seed // WORD % WORD
    for _ in range(10):
        first, second = 0xD2511F53 * low, 0xCD9E8D57 * third
        low, high, third, fourth = (
            second // WORD ^ high ^ key_low,
            second % WORD,
            first // WORD ^ fourth ^ key_high,
            first % WORD,
        )
        key_low = (key_low + 0x9E3779B9) % WORD
        key_high = (key_high + 0xBB67AE85) % WORD
    return ((low * WORD + high) >> 11) / 2**53
