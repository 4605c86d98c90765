"""Checks of a checkpoint's files that cost only their headers, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsa_plugin.config import DSAConfig
from dsa_plugin.indexer_tensors import indexer_faults, quantised_projections
from dsa_plugin.safetensors_header import ranks_of, read_header


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
        ValueError: naming every file or tensor at fault and what was expected; or the files are
            cut for ranks.
    """
    if size := ranks_of(directory):
        raise ValueError(
            f"{directory} is cut for {size} ranks of `dsa generate`, which no host reads; serve "
            "the checkpoint that it was made of"
        )
    tensors: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors.update(read_header(path))
    if not tensors:
        return  # The host says so itself, and knows formats and remote stores that we do not.
    faults = []
    for layer, kind in enumerate(config.indexer_types):
        if kind == "full":
            faults += indexer_faults(tensors, layer, config)
    if faults:
        raise ValueError(
            f"The indexer weights of {directory} do not fit its config.json "
            f"({len(faults)} faults):\n- "
            + "\n- ".join(faults[:8])
            + "\nDownload the checkpoint again, or convert it with its indexer weights kept; "
            "if some layers share another layer's selection, config.json must say so "
            "(indexer_types, index_topk_pattern or index_topk_freq)."
        )
    if quantised := quantised_projections(tensors, config, unquantised):
        raise ValueError(
            f"{directory} has quantised what the indexer reads unquantised "
            f"({len(quantised)} tensors):\n- "
            + "\n- ".join(quantised[:8])
            + "\nQuantise the model again with these left out, as the releases do (llm-compressor: "
            f'ignore=["re:.*indexer.*({"|".join(unquantised)})$"]), or take another checkpoint.'
        )
