"""A config.json for hosts to read where nothing was downloaded."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from dsa_plugin.fp8_weights import WEIGHT_BLOCK
from dsa_plugin.planning.model import ModelShape
from dsa_registry import lookup
from dsa_registry.schema import ModelSizes

# What hosts insist on, and no choice of kernels depends on.
_COMMON = {
    "attention_bias": False,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "n_group": 1,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10_000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
}
_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [WEIGHT_BLOCK, WEIGHT_BLOCK],
}


def model_folder(name: str, model: ModelShape, scratch: Path) -> Path:
    """A folder that a host takes for the model's, as long as it loads neither weights nor text.

    Args:
        name: where that is a folder, it is the answer.
        scratch: else one is written here; 4-bit weights are left out, which DSA does not ask for.
    """
    if Path(name).is_dir():
        return Path(name)
    entry = lookup(model.model_type)
    sizes = {field.name: getattr(model, field.name) for field in fields(ModelSizes)}
    config: dict[str, Any] = {
        **_COMMON,
        **sizes,
        "model_type": model.model_type,
        "architectures": list(entry.architectures),
        "indexer_rope_interleave": entry.indexer_rope_interleave,
        "indexer_types": list(model.indexer_types),
        "num_key_value_heads": model.num_attention_heads,
    }
    if model.weights_dtype == "fp8":
        config["quantization_config"] = _FP8
    folder = scratch / name.replace("/", "--")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder
