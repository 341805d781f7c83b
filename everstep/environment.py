"""Environment variables: read here only."""

import os
from typing import Literal


def log_format() -> Literal["text", "json"]:
    """EVERSTEP_LOG: `json` for one JSON object per event."""
    return "json" if os.environ.get("EVERSTEP_LOG", "").lower() == "json" else "text"


def wants_batch_invariance() -> bool:
    """VLLM_BATCH_INVARIANT=1, which vLLM's users set."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "").lower() in ("1", "true")


def forced_kernels() -> str:
    """EVERSTEP_KERNELS: the kernel level that the user insists on; empty: the best."""
    return os.environ.get("EVERSTEP_KERNELS", "")
