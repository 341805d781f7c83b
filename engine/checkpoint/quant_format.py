"""`quantization_config` of the two FP8 formats as a checked, frozen value (MODEL.md §2.3)."""

import json
import re
from typing import Literal, cast

from msgspec import Struct

from ..errors import CheckpointError
from .json_keys import Keys


class QuantFormat(Struct, frozen=True, kw_only=True):
    """How the FP8 tensors of a checkpoint are scaled (MODEL.md §2.3).

    kind         block: [ceil(out/128), ceil(in/128)] scales; channel: [out, 1]; tensor: one
    scale_suffix what follows `.weight`: `_scale_inv` (format A) or `_scale` (format B)
    activations  group: 1×128 groups; token: one scale per row; none: weight-only
    """

    kind: Literal["block", "channel", "tensor"]
    scale_suffix: Literal["_scale_inv", "_scale"]
    activations: Literal["group", "token", "none"]
    ignore: tuple[str, ...] = ()


def read_quant_format(keys: Keys) -> QuantFormat | None:
    """`quantization_config` of either FP8 format, or None (MODEL.md §2.3)."""
    section = keys.section("quantization_config")
    old = keys.section("compression_config")
    if section is not None and old is not None and section.data != old.data:
        raise CheckpointError(
            "config.json: quantization_config and compression_config differ; accepted: one of them"
        )
    section = section or old
    if section is None:
        return None
    method = section.data.get("quant_method")
    if method == "fp8":
        found = _block_format(section)
    elif method == "compressed-tensors":
        found = _compressed_format(section)
    else:
        raise section.wrong("quant_method", '"fp8" or "compressed-tensors"')
    for entry in found.ignore:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise CheckpointError(
                    f"{section.where}: the pattern {entry!r} cannot be compiled: {error}"
                ) from error
    return found


def is_ignored(module: str, ignore: tuple[str, ...]) -> bool:
    """Whether a module is on a list of exceptions: names, their ends or parents, `re:` patterns."""
    return any(
        re.match(entry[3:], module) is not None
        if entry.startswith("re:")
        else f".{entry}." in f".{module}."
        for entry in ignore
    )


def _block_format(section: Keys) -> QuantFormat:
    section.only("activation_scheme", "dynamic")
    section.only("fmt", "e4m3")
    if section.data.get("weight_block_size") != [128, 128]:
        raise section.wrong("weight_block_size", "[128, 128]")
    ignore = section.strings("modules_to_not_convert") + section.strings("ignored_layers")
    return QuantFormat(kind="block", scale_suffix="_scale_inv", activations="group", ignore=ignore)


def _compressed_format(section: Keys) -> QuantFormat:
    section.only("format", "float-quantized")
    if section.has("kv_cache_scheme"):
        raise section.wrong("kv_cache_scheme", "null")
    sparsity = section.section("sparsity_config")
    if sparsity is not None:
        sparsity.only("format", "dense")
    groups = section.section("config_groups")
    if groups is None or not groups.data:
        raise section.wrong("config_groups", "an object with at least one group")
    found = {name: _config_group(groups, name) for name in groups.data}
    first, kinds = next(iter(found)), next(iter(found.values()))
    for name, other in found.items():
        if other != kinds:
            raise CheckpointError(
                f"{groups.where}: {first} is {'/'.join(kinds)} and {name} is {'/'.join(other)}; "
                f"accepted: one scheme for all groups"
            )
    return QuantFormat(
        kind=cast(Literal["block", "channel", "tensor"], kinds[0]),
        scale_suffix="_scale",
        activations=cast(Literal["group", "token", "none"], kinds[1]),
        ignore=section.strings("ignore"),
    )


def _config_group(groups: Keys, name: str) -> tuple[str, str]:
    """(weights' strategy, activations) of one entry of `config_groups`."""
    group = groups.section(name)
    weights = group.section("weights") if group is not None else None
    if group is None or weights is None:
        raise groups.wrong(name, "an object with weights")
    group.only("format", "float-quantized")
    if group.has("output_activations"):
        raise group.wrong("output_activations", "null")
    _check_e4m3(weights)
    weights.only("dynamic", False)
    weights.only("strategy", "channel", "tensor", "block")
    strategy = weights.data.get("strategy")
    if strategy is None:
        raise weights.wrong("strategy", '"channel", "tensor" or "block"')
    if strategy == "block" and weights.data.get("block_structure") != [128, 128]:
        raise weights.wrong("block_structure", "[128, 128]")
    inputs = group.section("input_activations")
    if inputs is None:
        return strategy, "none"
    _check_e4m3(inputs)
    if inputs.data.get("dynamic") is not True:
        raise inputs.wrong("dynamic", "true (scales stored in the file are not supported)")
    scheme = inputs.data.get("strategy")
    if scheme == "group":
        inputs.only("group_size", 128)
    elif scheme != "token":
        raise inputs.wrong("strategy", '"token" or "group"')
    return strategy, scheme


def _check_e4m3(scheme: Keys) -> None:
    for key, value in (("num_bits", 8), ("type", "float")):
        if scheme.data.get(key) != value:
            raise scheme.wrong(key, json.dumps(value))
    scheme.only("symmetric", True)
