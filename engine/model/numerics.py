"""The numerics id: equal ids promise equal bits for equal inputs (docs/explain/numerics.md)."""

from typing import Literal

import torch

from ...kernels import level_name

# changes when the bits of the C++ kernels do
KERNELS_VERSION = 1


def numerics_id(
    dtype: torch.dtype, formats: str, rope_tables: Literal["float32", "model"] = "float32"
) -> str:
    """Device class, library, kernel level, T, form of the weights (`Weights.formats`)."""
    level, torch_part = level_name(), f"torch-{torch.__version__}"
    if level == "torch":
        level = torch.backends.cpu.get_cpu_capability().lower()
    else:
        torch_part = f"everstep-{KERNELS_VERSION}"
    parts = ["cpu", torch_part, level, str(dtype).removeprefix("torch."), formats]
    if rope_tables != "float32":
        parts.append(f"rope-{rope_tables}")
    return "/".join(parts)
