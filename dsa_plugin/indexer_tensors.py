"""The tensors of lightning indexers, as checkpoints name them, checked by their headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dsa_plugin.config import DSAConfig

_UNQUANTISED = {"F32", "F16", "BF16"}
_UNPACKED = {*_UNQUANTISED, "F8_E4M3"}
_INDEXER_TENSOR = re.compile(
    r"(?P<name>model\.layers\.(?P<layer>\d+)\.self_attn\.indexer\.(?P<projection>\w+)\.)(?P<suffix>\w+)"
)


def indexer_shapes(config: DSAConfig) -> dict[str, list[int]]:
    """Shape of each of an indexer's tensors, by its name behind `indexer.`."""
    heads, dim = config.index_n_heads, config.index_head_dim
    return {
        "wq_b.weight": [heads * dim, config.q_lora_rank],
        "wk.weight": [dim, config.hidden_size],
        "weights_proj.weight": [heads, config.hidden_size],
        "k_norm.weight": [dim],
        "k_norm.bias": [dim],
    }


def indexer_faults(
    tensors: Mapping[str, dict[str, Any]], layer: int, config: DSAConfig
) -> list[str]:
    """Which of a layer's tensors are missing or misshapen; one under a packed name is neither."""
    faults = []
    for suffix, shape in indexer_shapes(config).items():
        name = f"model.layers.{layer}.self_attn.indexer.{suffix}"
        tensor = tensors.get(name)
        if tensor is None:
            # Quantisers rename what they pack (qweight, weight_packed ...).
            stem = name.removesuffix("weight")
            packed = suffix.endswith(".weight") and any(t.startswith(stem) for t in tensors)
            if not packed or suffix.startswith("k_norm"):
                faults.append(f"{name} is missing; expected shape {shape}")
        elif tensor["dtype"] in _UNPACKED and tensor["shape"] != shape:
            faults.append(f"{name} has shape {tensor['shape']}; expected {shape}")
    return faults


def quantised_projections(
    tensors: Mapping[str, dict[str, Any]], config: DSAConfig, unquantised: Mapping[str, bool]
) -> list[str]:
    """The tensors of these projections that are neither a plain weight nor, where taken, fp8's.

    Args:
        tensors: headers by name.
        config: of the checkpoint.
        unquantised: projections that are to be unquantised, each with whether fp8 with a scale
            will do.
    """
    faults = []
    for name, tensor in sorted(tensors.items()):
        match = _INDEXER_TENSOR.fullmatch(name)
        if match is None or match["projection"] not in unquantised:
            continue
        if not config.has_indexer(int(match["layer"])):
            continue
        scales = {f"{match['name']}{suffix}" for suffix in ("weight_scale", "weight_scale_inv")}
        fp8 = unquantised[match["projection"]] and not scales.isdisjoint(tensors)
        if match["suffix"] == "weight":
            plain = tensor["dtype"] in (_UNPACKED if fp8 else _UNQUANTISED)
        else:
            plain = match["suffix"] == "bias" or (fp8 and name in scales)
        if not plain:
            faults.append(f"{name} ({tensor['dtype']} {tensor['shape']})")
    return faults
