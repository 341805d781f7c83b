"""The checker's own word on what a token should have been: float64, numpy, nothing of everstep.

Written from the published definition of Ring 2.0 (`BailingMoeV2ForCausalLM`: norms, partial
rotary, grouped queries, sigmoid router with groups, SwiGLU experts) and from the two definitions
that docs/explain/numerics.md states: the order of the sampler, and the draw (Philox4x32-10 with
key = seed and counter = index of the output token, inverted over the kept support in ascending id).

It reads config.json and one model.safetensors of F32 tensors by itself. Small models only.
"""

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# what float32 arithmetic may differ by on these models; logits are below 10
LOGIT_TOLERANCE = 2e-5
# below this margin between a kept and a dropped expert float32 may choose the other one
ROUTER_MARGIN = 2e-6


def read_safetensors(path: Path) -> dict[str, Array]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise SystemExit(f"{path}: {name} is {entry['dtype']}; this reference reads F32 only")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(data[begin:end], dtype="<f4").astype(np.float64)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


class Ring:
    """The forward pass over whole sequences."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        generation = json.loads((folder / "generation_config.json").read_text())
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        self.weights = read_safetensors(folder / "model.safetensors")
        ids = [self.config["eos_token_id"], generation["eos_token_id"]]
        self.eos_ids = {i for x in ids for i in (x if isinstance(x, list) else [x])}
        vocabulary = json.loads((folder / "tokenizer.json").read_text())
        for entry in vocabulary["added_tokens"]:
            if entry["content"] == tokenizer.get("eos_token"):
                self.eos_ids.add(entry["id"])

    def logits(self, ids: list[int]) -> tuple[Array, npt.NDArray[np.bool_]]:
        """(T, V) logits after each position, and whether every expert choice up to it is clear."""
        c, w = self.config, self.weights
        x = w["model.word_embeddings.weight"][ids]
        clear = np.ones(len(ids), dtype=bool)
        cos, sin = self._rotary(len(ids))
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            x = x + self._attention(self._norm(x, w[p + "input_layernorm.weight"]), p, cos, sin)
            y = self._norm(x, w[p + "post_attention_layernorm.weight"])
            if i < c["first_k_dense_replace"]:
                x = x + self._mlp(y, p + "mlp.")
            else:
                added, margin = self._experts(y, p + "mlp.")
                x, clear = x + added, clear & (margin > ROUTER_MARGIN)
        x = self._norm(x, w["model.norm.weight"])
        head = "model.word_embeddings.weight" if c["tie_word_embeddings"] else "lm_head.weight"
        # a later position reads the keys of an earlier one, so doubt about one is doubt about all
        return x @ w[head].T, np.logical_and.accumulate(clear)

    def _norm(self, x: Array, weight: Array) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * weight

    def _rotary(self, count: int) -> tuple[Array, Array]:
        c = self.config
        assert c["rope_scaling"] is None
        width = int(c["head_dim"] * c["partial_rotary_factor"])
        frequency = c["rope_theta"] ** (-np.arange(0, width, 2) / width)
        angle = np.arange(count)[:, None] * frequency[None]
        return np.cos(angle)[:, None], np.sin(angle)[:, None]

    @staticmethod
    def _rotate(u: Array, cos: Array, sin: Array) -> Array:
        half = cos.shape[-1]
        a, b, rest = u[..., :half], u[..., half : 2 * half], u[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def _attention(self, y: Array, p: str, cos: Array, sin: Array) -> Array:
        c, w = self.config, self.weights
        heads, groups, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        count = len(y)
        qkv = (y @ w[p + "attention.query_key_value.weight"].T).reshape(count, -1, d)
        q, k, v = np.split(qkv, [heads, heads + groups], axis=1)
        q = self._norm(q, w[p + "attention.query_layernorm.weight"])
        k = self._norm(k, w[p + "attention.key_layernorm.weight"])
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        mask = np.triu(np.full((count, count), -np.inf), 1)
        out = np.empty_like(q)
        for h in range(heads):
            g = h // (heads // groups)
            scores = q[:, h] @ k[:, g].T / math.sqrt(d) + mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, g]
        return out.reshape(count, -1) @ w[p + "attention.dense.weight"].T

    def _mlp(self, y: Array, p: str) -> Array:
        w = self.weights
        gate = y @ w[p + "gate_proj.weight"].T
        gate = gate / (1 + np.exp(-gate))
        return (gate * (y @ w[p + "up_proj.weight"].T)) @ w[p + "down_proj.weight"].T

    def _experts(self, y: Array, p: str) -> tuple[Array, Array]:
        """What the experts add, and per row how clearly they were chosen."""
        c, w = self.config, self.weights
        count, kept = c["num_experts"], c["num_experts_per_tok"]
        groups, kept_groups = c["n_group"], c["topk_group"]
        score = 1 / (1 + np.exp(-(y @ w[p + "gate.weight"].T)))
        choice = score + w[p + "gate.expert_bias"]
        by_group = np.sort(choice.reshape(len(y), groups, count // groups), -1)
        strength = by_group[..., -2:].sum(-1)
        order = np.argsort(-strength, axis=-1, kind="stable")
        ranked = np.take_along_axis(strength, order, -1)
        margin = np.full(len(y), np.inf)
        if kept_groups < groups:
            margin = ranked[:, kept_groups - 1] - ranked[:, kept_groups]
        allowed = np.zeros_like(strength, dtype=bool)
        np.put_along_axis(allowed, order[:, :kept_groups], True, -1)
        choice = np.where(np.repeat(allowed, count // groups, -1), choice, -np.inf)
        ids = np.argsort(-choice, axis=-1, kind="stable")
        ranked = np.take_along_axis(choice, ids, -1)
        margin = np.minimum(margin, ranked[:, kept - 1] - ranked[:, kept])
        ids = ids[:, :kept]
        weight = np.take_along_axis(score, ids, -1)
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20) * c["routed_scaling_factor"]
        out = self._mlp(y, p + "shared_experts.")
        for expert in range(count):
            rows, slots = np.nonzero(ids == expert)
            if len(rows):
                part = self._mlp(y[rows], f"{p}experts.{expert}.")
                out[rows] += part * weight[rows, slots][:, None]
        return out, margin


def philox(seed: int, position: int) -> float:
    """The uniform number of one output token: 53 bits of Philox4x32-10."""
    word = 0xFFFFFFFF
    counter = [position & word, position >> 32 & word, 0, 0]
    key = [seed & word, seed >> 32 & word]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & word, a >> 32 ^ counter[3] ^ key[1], a & word]
        key = [key[0] + 0x9E3779B9 & word, key[1] + 0xBB67AE85 & word]
    return ((counter[0] << 32 | counter[1]) >> 11) * 2.0**-53


@dataclass
class Sampling:
    """The fields of `sampling` as the client sent them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    max_tokens: int = 0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False

    @classmethod
    def of(cls, sent: dict[str, Any]) -> "Sampling":
        bias = {int(k): float(v) for k, v in sent.get("logit_bias", {}).items()}
        return cls(**{**sent, "logit_bias": bias})


@dataclass
class Verdict:
    """What the reference says about one rollout's tokens."""

    num_judged: int = 0
    num_unclear: int = 0
    worst_logprob: float = 0.0
    fault: str | None = None


def judge(ring: Ring, prompt: list[int], output: dict[str, Any], sampling: Sampling) -> Verdict:
    """Recompute every token of a rollout: would the definition have drawn it, and with this lp?

    output  {"seed", "output_ids", "lp_sampled", "lp_temp", "kept_mass"}
    """
    ids = output["output_ids"]
    verdict = Verdict()
    if not ids:
        return verdict
    logits, clear = ring.logits(prompt + ids[:-1])
    for t, token in enumerate(ids):
        row = len(prompt) + t - 1
        if not clear[row]:
            verdict.num_unclear = len(ids) - t
            break
        lp_temp = tempered(logits[row], prompt, ids[:t], sampling)
        banned = ring.eos_ids | set(sampling.stop_token_ids) if t < sampling.min_tokens else set()
        said = {name: output[name][t] for name in ("lp_sampled", "lp_temp", "kept_mass")}
        u = philox(output["seed"] % 2**64, t)
        faults = []
        for support in supports(lp_temp, sampling, banned):
            fault, error = compare(lp_temp, support, u, token, said, sampling)
            if fault is None:
                verdict.worst_logprob = max(verdict.worst_logprob, error)
                break
            faults.append(fault)
        else:
            verdict.fault = f"token {t}: {faults[0]}"
            break
        verdict.num_judged += 1
    return verdict


def tempered(logits: Array, prompt: list[int], output: list[int], sampling: Sampling) -> Array:
    z = logits.copy()
    seen = sorted({*prompt, *output})
    if sampling.repetition_penalty != 1.0:
        r = sampling.repetition_penalty
        z[seen] = np.where(z[seen] > 0, z[seen] / r, z[seen] * r)
    counts = np.bincount(output, minlength=len(z)) if output else np.zeros(len(z))
    z -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    for token, bias in sampling.logit_bias.items():
        z[token] += bias
    z /= sampling.temperature or 1.0
    z -= z.max()
    result: Array = z - np.log(np.exp(z).sum())
    return result


def supports(lp: Array, s: Sampling, banned: set[int]) -> list[npt.NDArray[np.intp]]:
    """The kept ids; more than one answer where float32 may stand on either side of an edge."""
    lp = lp.copy()
    lp[sorted(banned)] = -np.inf
    slack = LOGIT_TOLERANCE / min(s.temperature or 1.0, 1.0)
    if s.temperature == 0.0:
        return [np.array([i]) for i in np.nonzero(lp >= lp.max() - 2 * slack)[0]]
    order = np.argsort(-lp, kind="stable")
    order = order[np.isfinite(lp[order])]
    found: list[npt.NDArray[np.intp]] = []
    sizes = {len(order)}
    if s.top_k > 0:
        edge = lp[order[min(s.top_k, len(order)) - 1]]
        # ties at the edge: which of them is kept is the lower id's right, if float32 saw a tie
        tied = [i for i in order if abs(lp[i] - edge) <= 2 * slack]
        sure = [i for i in order if lp[i] > edge + 2 * slack]
        need = min(s.top_k, len(order)) - len(sure)
        cuts = [[*sure, *tied[:need]]] + [[*sure, t] for t in tied if need == 1 and t != tied[0]]
        orders = [np.array(sorted(cut, key=lambda i: (-lp[i], i))) for cut in cuts]
    else:
        orders = [order]
    for ids in orders:
        p = np.exp(lp[ids] - lp[ids[0]])
        sizes = {len(ids)}
        if s.top_p < 1.0:
            before = (np.cumsum(p) - p) / p.sum()
            sizes = {max(1, int((before < s.top_p + e).sum())) for e in (0.0, -slack, slack)}
        for size in sorted(sizes, reverse=True):
            kept = ids[:size]
            if s.min_p > 0.0:
                edges = (s.min_p * e for e in (1.0, 1 - 2 * slack, 1 + 2 * slack))
                found += [np.sort(kept[p[:size] >= edge]) for edge in edges]
            else:
                found.append(np.sort(kept))
    return found


def compare(
    lp: Array,
    support: npt.NDArray[np.intp],
    u: float,
    token: int,
    said: dict[str, float],
    s: Sampling,
) -> tuple[str | None, float]:
    """What is wrong with a token under one support (None: nothing), and the logprob's error."""
    slack = LOGIT_TOLERANCE / min(s.temperature or 1.0, 1.0)
    at = np.nonzero(support == token)[0]
    if not len(at):
        return f"id {token} is outside the support of {len(support)}", 0.0
    p = np.exp(lp[support])
    mass = float(p.sum())
    above = float(p[: at[0] + 1].sum()) / mass
    below = above - float(p[at[0]]) / mass
    if not below - slack <= u <= above + slack:
        drawn = int(support[np.searchsorted(np.cumsum(p) / mass, u, side="right")])
        return f"id {token} was given where the draw u = {u:.6f} falls on {drawn}", 0.0
    expected = {"lp_sampled": lp[token] - math.log(mass), "lp_temp": lp[token], "kept_mass": mass}
    worst = 0.0
    for name, value in expected.items():
        error = abs(said[name] - value)
        if not error <= slack:
            return f"{name} is {said[name]:.6f}, computed {value:.6f}", error
        worst = max(worst, error)
    return None, worst
