"""W8A16 and W4A16 as `dsa convert` writes them: `pack-quantized` of compressed-tensors.

Symmetric integers with a bf16 scale for each 128 inputs of a row. vLLM and SGLang run both by
Marlin kernels from sm80 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BITS: Mapping[str, int] = {"w8a16": 8, "w4a16": 4}
GROUP = 128
"""Inputs of a row that share a scale."""

IGNORE = (
    "lm_head",
    r"re:.*embed_tokens$",
    r"re:.*\.indexer\..*",
    r"re:.*\.mlp\.gate$",
    # Either host splits it into W_UK and W_UV; SGLang reads its plain `weight`.
    r"re:.*\.kv_b_proj$",
    # SGLang 0.5.23 joins the two and refuses their joined `weight_shape`
    # (deepseek_weight_loader.py, cached_a_proj). They make what indexer and cache read.
    r"re:.*\.(q_a_proj|kv_a_proj_with_mqa|fused_qkv_a_proj\w*)$",
    r"re:.*\.(eh_proj|shared_head\.head)$",
)
"""Modules that stay unquantised, as compressed-tensors names them, and hosts' fused names."""


def quantization_config(bits: int) -> dict[str, Any]:
    """Of config.json."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(IGNORE),
    }
