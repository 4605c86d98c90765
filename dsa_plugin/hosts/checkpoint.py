"""Checks of a checkpoint's files that cost only their headers, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsa_plugin.config import DSAConfig
from dsa_plugin.safetensors_header import read_header

_UNQUANTISED = {"F32", "F16", "BF16"}
_UNPACKED = {*_UNQUANTISED, "F8_E4M3"}
_INDEXER_TENSOR = re.compile(
    r"(?P<name>model\.layers\.(?P<layer>\d+)\.self_attn\.indexer\.(?P<projection>\w+)\.)(?P<suffix>\w+)"
)


def check_checkpoint(
    directory: Path, config: DSAConfig, *, unquantised: Mapping[str, bool]
) -> None:
    """Refuse truncated safetensors files and indexer weights that the host would not load.

    Hosts load a layer's indexer weights into one fused parameter and do not notice when half of it
    is missing, or pass over names that they do not know; the model then selects the wrong tokens
    silently.

    Args:
        directory: the checkpoint's.
        config: its config.json's.
        unquantised: the indexer's projections that the host keeps unquantised whatever the model's
            quantisation, each with whether it takes one stored in fp8 with a scale.

    Raises:
        ValueError: naming every file or tensor at fault and what was expected.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors.update(read_header(path))
    if not tensors:
        return  # The host says so itself, and knows formats and remote stores that we do not.
    faults = []
    for layer, kind in enumerate(config.indexer_types):
        if kind == "full":
            faults += _indexer_faults(tensors, layer, config)
    if faults:
        raise ValueError(
            f"The indexer weights of {directory} do not fit its config.json "
            f"({len(faults)} faults):\n- "
            + "\n- ".join(faults[:8])
            + "\nDownload the checkpoint again, or convert it with its indexer weights kept; "
            "if some layers share another layer's selection, config.json must say so "
            "(indexer_types, index_topk_pattern or index_topk_freq)."
        )
    if quantised := _quantised(tensors, config, unquantised):
        raise ValueError(
            f"{directory} has quantised what the indexer reads unquantised "
            f"({len(quantised)} tensors):\n- "
            + "\n- ".join(quantised[:8])
            + "\nQuantise the model again with these left out, as the releases do (llm-compressor: "
            f'ignore=["re:.*indexer.*({"|".join(unquantised)})$"]), or take another checkpoint.'
        )


def _indexer_faults(tensors: dict[str, dict[str, Any]], layer: int, config: DSAConfig) -> list[str]:
    heads, dim = config.index_n_heads, config.index_head_dim
    shapes = {
        "wq_b.weight": [heads * dim, config.q_lora_rank],
        "wk.weight": [dim, config.hidden_size],
        "weights_proj.weight": [heads, config.hidden_size],
        "k_norm.weight": [dim],
        "k_norm.bias": [dim],
    }
    faults = []
    for suffix, shape in shapes.items():
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


def _quantised(
    tensors: Mapping[str, dict[str, Any]], config: DSAConfig, unquantised: Mapping[str, bool]
) -> list[str]:
    """The tensors of these projections that are neither a plain weight nor, where taken, fp8's."""
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
