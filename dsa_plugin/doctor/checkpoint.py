"""What a bug report says of a checkpoint: its config's numbers and its files' headers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsa_kernels.dims import INDEX_PAGE, index_bytes_per_token, latent_bytes_per_token
from dsa_plugin.config import DSAConfig
from dsa_plugin.env import Env
from dsa_plugin.safetensors_header import read_header
from dsa_registry import lookup

# All other strings of a config are names, of people's folders too.
_WORDS = {"activation_scheme", "architectures", "dtype", "fmt", "hidden_act", "index_topk_pattern"}
_WORDS |= {"indexer_types", "model_type", "quant_method", "rope_type", "scale_fmt", "scoring_func"}
_WORDS |= {"topk_method", "torch_dtype", "transformers_version", "type"}
_LIST = 200  # items of a list that says something


def config_numbers(found: Any, name: str = "") -> Any:
    """A config.json without its strings, but those whose words are the field's; None: left out."""
    if isinstance(found, Mapping):
        kept = {key: config_numbers(item, key) for key, item in found.items()}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(found, list):
        return [config_numbers(item, name) for item in found[:_LIST]] or None
    if isinstance(found, str) and name not in _WORDS:
        return None
    return found


def files(folder: Path) -> dict[str, Any]:
    """Tensors by name with its numbers replaced: how many, dtypes and shapes; no weights."""
    groups: dict[str, Counter[str]] = {}
    damaged = []
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        try:
            header = read_header(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for name, tensor in header.items():
            group = groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), Counter())
            group[f"{tensor['dtype']} {tensor['shape']}"] += 1
    return {
        "files": len(paths),
        "bytes": sum(path.stat().st_size for path in paths),
        "damaged": damaged,
        "tensors": {name: dict(group) for name, group in sorted(groups.items())},
    }


def decisions(config: Mapping[str, Any], env: Env) -> dict[str, Any]:
    """What the plugin makes of a config: its entry, RoPE, sharing and caches.

    Raises:
        ValueError: no DSA model, or a value that no op supports.
    """
    dsa = DSAConfig.from_hf(config)
    entry = lookup(dsa.model_type)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fp8_keys = env.index_cache_is_fp8(device)
    said = "indexer_rope_interleave" in config
    return {
        "entry": entry.model_type,
        "architectures": entry.architectures,
        "indexer_rope": "interleaved" if dsa.indexer_rope_interleave else "half-split",
        "indexer_rope_from": "config.json" if said else "the registry",
        "sharing": dsa.index_topk_pattern,
        "index_cache": f"{'fp8' if fp8_keys else 'the model dtype'}, pages of {INDEX_PAGE}",
        "bytes_a_token_and_layer": {
            "latents": {name: latent_bytes_per_token(n) for name, n in (("bf16", 2), ("fp8", 1))},
            "index_keys": index_bytes_per_token(1 if fp8_keys else 2),
        },
        "sizes": {key: value for key, value in asdict(dsa).items() if isinstance(value, int)},
    }
