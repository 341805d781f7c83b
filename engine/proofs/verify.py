"""Does the engine compute this checkpoint correctly on this machine?

Runs the engine and the float64 reference (engine/proofs/reference.py) side by side over one prompt, layer
by layer, so that a checkpoint larger than memory can be checked too. The engine chooses experts and
the reference replays them: a near tie that rounds the other way then shows up as a lower agreement
and not as another model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from ..errors import InvalidRequest
from .reference import Array, Ids, LayerTrace, Reference

Dtype = Literal["float32", "bfloat16"]
Numerics = Literal["exact", "w8a8"]
Progress = Callable[[str, int, int], None]
"""Told (stage, done, total); stages are "layers" and "head"."""


class Bounds(Struct, frozen=True, kw_only=True):
    """What a correct engine stays below (`experts`: above).

    max_logit      max |Δlogit| / max |logit|
    mean_logprob   mean |Δlogprob| over all positions and tokens
    p99_logprob    its 99th percentile
    experts        smallest share of expert choices that are equal
    """

    max_logit: float
    mean_logprob: float
    p99_logprob: float
    experts: float


# Roundings of independent layers add up like a random walk, hence the square root in `bounds_for`;
# a logprob moves with its logits, hence their spread. Measured over random checkpoints (4 to 40
# layers, hidden 64 to 512, up to 64 experts; weights of gain 1.5, which amplify more than trained
# ones do), the largest values of (logit, mean, p99) in these units were
#     float32          1.4e-6   0.5e-6   2.3e-6   equal experts 100 %
#     bfloat16         1.5e-2   0.6e-2   2.4e-2   equal experts 97.9 %
#     w8a8             0.6e-1   0.3e-1   1.4e-1   equal experts 88 %
# and the bounds are 2 to 3 times that. A real mistake costs 1e-2 or more in float32, so float32
# decides about correctness; the others show that roundings are of the expected size.
_UNIT: dict[tuple[Dtype, Numerics], Bounds] = {
    ("float32", "exact"): Bounds(
        max_logit=4e-6, mean_logprob=1.2e-6, p99_logprob=6e-6, experts=0.999
    ),
    ("bfloat16", "exact"): Bounds(
        max_logit=0.03, mean_logprob=0.012, p99_logprob=0.05, experts=0.95
    ),
    # an e4m3 step is 1/8 of the value: rounding the other way costs the same in either dtype
    ("float32", "w8a8"): Bounds(max_logit=0.2, mean_logprob=0.07, p99_logprob=0.3, experts=0.8),
    ("bfloat16", "w8a8"): Bounds(max_logit=0.2, mean_logprob=0.07, p99_logprob=0.3, experts=0.8),
}


def bounds_for(dtype: Dtype, numerics: Numerics, num_layers: int, spread: float) -> Bounds:
    """The bounds of a model of this depth whose logits have the standard deviation `spread`."""
    unit, root = _UNIT[dtype, numerics], (num_layers + 1) ** 0.5
    return Bounds(
        max_logit=unit.max_logit * root,
        mean_logprob=unit.mean_logprob * root * spread,
        p99_logprob=unit.p99_logprob * root * spread,
        experts=unit.experts,
    )


class LayerRow(Struct, frozen=True, kw_only=True):
    """One layer: |Δhidden| of the residual stream over its rms; experts: share of equal choices."""

    layer: int
    max_hidden: float
    mean_hidden: float
    experts: float | None


class VerifyReport(Struct, frozen=True, kw_only=True):
    """Engine against reference over one prompt. `failures` is empty iff the engine passes."""

    folder: str
    dtype: Dtype
    numerics: Numerics
    num_tokens: int
    layers: list[LayerRow]
    max_logit: float
    """max |Δlogit| / max |logit|"""
    max_logit_absolute: float
    mean_logprob: float
    p99_logprob: float
    argmax_agreement: float
    experts: float | None
    """share of equal expert choices over all MoE layers; None if there are none"""
    bounds: Bounds
    failures: list[str]

    @property
    def passed(self) -> bool:
        """Every bound holds."""
        return not self.failures

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The layers as a table: a header, then a row for each."""
        header = ("layer", "max |Δhidden|/rms", "mean |Δhidden|/rms", "equal experts")
        return [header] + [
            (
                str(row.layer),
                f"{row.max_hidden:.2e}",
                f"{row.mean_hidden:.2e}",
                "–" if row.experts is None else f"{row.experts:.2%}",
            )
            for row in self.layers
        ]


def verify(
    folder: Path,
    *,
    num_tokens: int = 32,
    prompt_ids: Sequence[int] | None = None,
    dtype: Dtype = "bfloat16",
    numerics: Numerics = "exact",
    on_progress: Progress = lambda *_: None,
) -> VerifyReport:
    """Compare the engine with the reference over `prompt_ids`, or `num_tokens` fixed random ids.

    Holds one layer of the engine's weights and one slice of a matrix of the reference's. Costs about
    num_tokens · (active parameters) float64 products, and reads every expert that is chosen twice.
    Raises CheckpointError for a folder that cannot be loaded, InvalidRequest for a bad prompt.
    """
    # the machine (torch) is needed only when a comparison really runs
    from ..model import teacher

    reference = Reference(
        folder,
        dtype="bfloat16" if dtype == "bfloat16" else "float64",
        numerics=numerics,
        rope_tables="float32",
    )
    ids = _prompt(reference, num_tokens, prompt_ids)
    # what the engine chose in the layer just computed, for the reference to replay
    chosen: dict[int, Ids] = {}
    traces = reference.layers(ids, chosen.get)
    rows: list[LayerRow] = []
    hidden = np.empty((len(ids), reference.shape.hidden))
    logits: npt.NDArray[Any] | None = None
    for result in teacher.layers(folder, list(ids), dtype=dtype, numerics=numerics):
        if result.layer < 0:
            logits = result.logits
            continue
        if result.routing_ids is not None:
            chosen[result.layer] = result.routing_ids
        trace = next(traces)
        rows.append(_layer_row(trace, result.hidden))
        hidden = trace.hidden
        on_progress("layers", len(rows), reference.num_layers)
    assert logits is not None, "the engine's last result carries the logits"
    assert len(rows) == reference.num_layers, "the engine ran another number of layers"
    expected = reference.head(hidden)
    on_progress("head", 1, 1)
    return _report(folder, dtype, numerics, rows, logits.astype(np.float64), expected)


def _prompt(reference: Reference, num_tokens: int, prompt_ids: Sequence[int] | None) -> list[int]:
    vocab = reference.tensors["model.word_embeddings.weight"].shape[0]
    if prompt_ids is None:
        if num_tokens < 1:
            raise InvalidRequest(f"num_tokens {num_tokens}; at least 1", field="num_tokens")
        return [int(i) for i in np.random.default_rng(0).integers(0, vocab, num_tokens)]
    if not prompt_ids or min(prompt_ids) < 0 or max(prompt_ids) >= vocab:
        raise InvalidRequest(f"prompt_ids must be 1 or more ids below {vocab}", field="prompt_ids")
    return list(prompt_ids)


def _layer_row(trace: LayerTrace, hidden: npt.NDArray[Any]) -> LayerRow:
    difference = np.abs(hidden - trace.hidden)
    size = float(np.sqrt(np.mean(trace.hidden**2))) or 1.0
    return LayerRow(
        layer=trace.layer,
        max_hidden=float(difference.max()) / size,
        mean_hidden=float(difference.mean()) / size,
        experts=None
        if trace.routing is None
        else equal_choices(trace.routing.ids, trace.routing.own),
    )


def equal_choices(ids: Ids, own: Ids) -> float:
    """Share of `ids` [T, K] that are among `own` [T, K] of the same token, in any slot."""
    return float((ids[:, :, None] == own[:, None, :]).any(axis=2).mean())


def log_softmax(logits: Array) -> Array:
    """Logprobs of logits [T, V]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _report(
    folder: Path,
    dtype: Dtype,
    numerics: Numerics,
    rows: list[LayerRow],
    logits: Array,
    expected: Array,
) -> VerifyReport:
    difference = np.abs(log_softmax(logits) - log_softmax(expected))
    routed = [row.experts for row in rows if row.experts is not None]
    largest = float(np.abs(logits - expected).max())
    report = VerifyReport(
        folder=str(folder),
        dtype=dtype,
        numerics=numerics,
        num_tokens=len(logits),
        layers=rows,
        max_logit=largest / (float(np.abs(expected).max()) or 1.0),
        max_logit_absolute=largest,
        mean_logprob=float(difference.mean()),
        p99_logprob=float(np.quantile(difference, 0.99)),
        argmax_agreement=float((logits.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        experts=float(np.mean(routed)) if routed else None,
        bounds=bounds_for(dtype, numerics, len(rows), float(expected.std())),
        failures=[],
    )
    report.failures.extend(_failures(report))
    return report


def _failures(report: VerifyReport) -> list[str]:
    """One line for each bound that does not hold; NaN holds none."""
    bounds = report.bounds
    found = [
        f"{name} {value:.2e} is above {limit:.2e}"
        for name, value, limit in (
            ("max |Δlogit| / max |logit|", report.max_logit, bounds.max_logit),
            ("mean |Δlogprob|", report.mean_logprob, bounds.mean_logprob),
            ("p99 |Δlogprob|", report.p99_logprob, bounds.p99_logprob),
        )
        if not value <= limit
    ]
    if report.experts is not None and not report.experts >= bounds.experts:
        found.append(f"equal expert choices {report.experts:.2%} are below {bounds.experts:.2%}")
    return found
