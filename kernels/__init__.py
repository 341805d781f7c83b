"""The operations of the engine. Importing this package imports torch and nothing of ours.

Every operation is row-invariant: the bits of a row depend on that row's inputs alone
(DESIGN.md §3; docs/explain/numerics.md says why, operation by operation).
"""

from .activation import sigmoid, swiglu
from .attention import (
    AttentionPlan,
    QuerySpan,
    attention,
    plan_attention,
    tokens_per_tile,
)
from .experts import experts
from .gemm import Weight, explain, linear, matmul_rows
from .norm import rms_norm
from .rope import apply_rope
from .router import route
from .sampling import Draw, Rule, log_softmax, sample, top_of

__all__ = [
    "AttentionPlan",
    "Draw",
    "QuerySpan",
    "Rule",
    "Weight",
    "apply_rope",
    "attention",
    "experts",
    "explain",
    "linear",
    "log_softmax",
    "matmul_rows",
    "plan_attention",
    "rms_norm",
    "route",
    "sample",
    "sigmoid",
    "swiglu",
    "tokens_per_tile",
    "top_of",
]
