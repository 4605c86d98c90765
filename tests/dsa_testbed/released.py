"""config.json of released checkpoints, in full size: what hosts read before they load a weight.

Dimensions come from the registry; the rest is that of the small checkpoints, which have the keys of
the real ones.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsa_registry import lookup
from dsa_testbed import small_models, tokenizer

_FP8 = small_models.small_model("v32-fp8").config["quantization_config"]
# As QuantTrio writes them.
_AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "version": "gemm",
    "zero_point": True,
    "modules_to_not_convert": ["mlp.gate.", "self_attn", "shared_experts"],
}


def _group(bits: int, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "group_size": 128,
        "strategy": "group",
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights}


_INT4_INT8 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "experts": _group(4, [r"re:.*mlp\.experts\..*"]),
        "others": _group(8, [r"re:.*self_attn\..*"]),
    },
    "ignore": ["lm_head"],
}
QUANTISATION = {
    ("deepseek_v32", "fp8"): _FP8,
    ("deepseek_v32", "w4a16"): _AWQ,
    ("glm_moe_dsa", "fp8"): _FP8,
    ("glm_moe_dsa", "w4a16"): _INT4_INT8,
}


def write_config(folder: Path, model_type: str, weights: str) -> Path:
    """A folder with a family's newest config.json in a precision, and a small tokenizer."""
    checkpoint = lookup(model_type).checkpoints[-1]
    small = small_models.small_model("v32" if model_type == "deepseek_v32" else "glm52").config
    sizes = {k: v for k, v in asdict(checkpoint).items() if k in small}
    config: dict[str, Any] = {
        **small,
        **sizes,
        "num_key_value_heads": checkpoint.num_attention_heads,
        "dtype": "bfloat16",
        "quantization_config": QUANTISATION[model_type, weights],
    }
    if "indexer_types" in small:
        config["indexer_types"] = list(checkpoint.indexer_types)
    if model_type == "deepseek_v32":
        rope = {**small["rope_scaling"], "original_max_position_embeddings": 4096}
        config |= {"n_group": 8, "topk_group": 4, "rope_scaling": rope}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(folder, small_models.VOCAB_SIZE, checkpoint.max_position_embeddings)
    return folder
