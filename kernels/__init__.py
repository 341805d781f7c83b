"""The operations of the engine. Importing this package imports torch and nothing of ours.

Every operation is row-invariant: the bits of a row depend on that row's inputs alone
(DESIGN.md §3; docs/explain/numerics.md says why, operation by operation).
"""

from .attention import QuerySpan
from .dispatch import (
    ExpertBank,
    GateUp,
    Linear,
    Pair,
    Plan,
    add,
    add_rms_norm,
    attention,
    draw,
    experts,
    explain,
    gate_up,
    level_name,
    library_in_use,
    linear,
    log_softmax,
    place_qkv,
    plan_attention,
    prepare,
    prepare_experts,
    prepare_gate_up,
    prepare_head,
    project,
    rms_norm,
    route,
    sample,
    use_level,
)
from .gemm import Weight
from .native_step import NativeStep, StepBatch, StepLayer, StepOutput, StepShape
from .packed import PackedWeight
from .sampling import Draw, DrawArrays, Rule, top_of

__all__ = [
    "Draw",
    "DrawArrays",
    "ExpertBank",
    "GateUp",
    "Linear",
    "NativeStep",
    "PackedWeight",
    "Pair",
    "Plan",
    "QuerySpan",
    "Rule",
    "StepBatch",
    "StepLayer",
    "StepOutput",
    "StepShape",
    "Weight",
    "add",
    "add_rms_norm",
    "attention",
    "draw",
    "experts",
    "explain",
    "gate_up",
    "level_name",
    "library_in_use",
    "linear",
    "log_softmax",
    "place_qkv",
    "plan_attention",
    "prepare",
    "prepare_experts",
    "prepare_gate_up",
    "prepare_head",
    "project",
    "rms_norm",
    "route",
    "sample",
    "top_of",
    "use_level",
]
