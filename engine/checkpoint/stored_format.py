"""In what a model is stored: the type of its tensors, which of them are FP8, what config.json says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .expected_tensors import TensorSpec
from .fp8_policy import SCALE_SUFFIX, Fp8Format, is_quantised, quantization_config, scale_shape
from .json_keys import encode_json, read_json
from .manifest import WeightFormat
from .ring_config import RingConfig
from .safetensors_writer import Part

# written anew, or of other weights
_NOT_COPIED = (".safetensors", ".py", ".bin", ".gguf")
_WRITTEN = ("config.json", "model.safetensors.index.json", "manifest.json")


@dataclass(frozen=True)
class StoredFormat:
    """How a model of this shape is stored.

    config  the model; its MTP layers are stored too
    dtype   of what is not FP8, and what a weight is rounded to before it is quantised
    fp8     None: nothing is quantised
    """

    config: RingConfig
    dtype: torch.dtype
    fp8: Fp8Format | None = None

    @property
    def kind(self) -> WeightFormat:
        """As a manifest says it."""
        return "plain" if self.fp8 is None else "block"

    def is_quantised(self, spec: TensorSpec) -> bool:
        return self.fp8 is not None and is_quantised(spec, self.fp8)

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """The tensor as it is stored; a quantised one is its codes, and then its scales."""
        if self.is_quantised(spec):
            codes = Part(spec.name, torch.float8_e4m3fn, spec.shape)
            return codes, Part(spec.name + SCALE_SUFFIX, torch.float32, scale_shape(spec.shape))
        # the router's bias stays float32 through training
        dtype = torch.float32 if spec.name.endswith("expert_bias") else self.dtype
        return (Part(spec.name, dtype, spec.shape),)

    def config_json(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of such a model, from that of the one that it came from."""
        changed = dict(data)
        for key in ("dtype", "quantization_config", "compression_config"):
            changed.pop(key, None)
        changed["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        changed["num_hidden_layers"] = self.config.num_hidden_layers
        changed["num_nextn_predict_layers"] = self.config.num_nextn_predict_layers
        if self.fp8 is not None:
            changed["quantization_config"] = quantization_config(self.config, self.fp8)
        return changed

    def companions(self, source: Path) -> dict[str, bytes]:
        """What such a checkpoint has beside its tensors, by file: tokenizer and templates of
        `source`, and config.json last. Raises CheckpointError for a source that is no checkpoint."""
        found = {
            file.name: file.read_bytes()
            for file in sorted(source.iterdir())
            if file.is_file() and file.suffix not in _NOT_COPIED and file.name not in _WRITTEN
        }
        config = self.config_json(read_json(source / "config.json"))
        return found | {"config.json": encode_json(config)}
