"""Writes a model as the Hugging Face folder that transformers, vLLM and SGLang load."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from dsa_plugin.training.batches import END_OF_TEXT
from dsa_plugin.training.model import DsaModel
from dsa_plugin.training.sizes import ModelSizes
from dsa_plugin.training.state import write_atomically

WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LINE_BREAK = "\u010a"  # how a byte-level vocabulary writes "\n"


def export_demo(model: DsaModel, tokenizer_folder: Path, folder: Path) -> None:
    """Writes a model that was made here: with its tokenizer, chat template and stop tokens."""
    export(model, deepseek_v32_config(model.sizes), folder)
    copy_files(tokenizer_folder, folder, TOKENIZER_FILES)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    write_json(folder / "generation_config.json", generation_config(tokenizer))


def export(model: DsaModel, config: Mapping[str, Any], folder: Path) -> None:
    """Writes weights in bf16 and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    # Neither host ties a DeepSeek model's head, so it is stored beside the embedding.
    tensors = {
        name: value.detach().to("cpu", _stored_dtype(name), copy=True).contiguous()
        for name, value in model.state_dict().items()
    }
    write_atomically(
        folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    write_json(folder / "config.json", {**config, "dtype": "bfloat16"})


def copy_files(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copies those of the files `names` that `source` has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _stored_dtype(name: str) -> torch.dtype:
    """Routers' biases are told apart by less than bf16 can say."""
    return torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Greedy; an answer ends with its line."""
    line_break = tokenizer.token_to_id(LINE_BREAK)
    return {
        "eos_token_id": [END_OF_TEXT, line_break],
        "pad_token_id": END_OF_TEXT,
        "do_sample": False,
    }


def deepseek_v32_config(sizes: ModelSizes) -> dict[str, Any]:
    """config.json with the keys of the published ones.

    Written by hand because transformers drops some that servers read. All layers have a dense MLP,
    so the keys about experts say what no weight is made from.
    """
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": END_OF_TEXT,
        "dtype": "bfloat16",
        "eos_token_id": END_OF_TEXT,
        "ep_size": 1,
        "first_k_dense_replace": sizes.num_hidden_layers,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "index_head_dim": sizes.index_head_dim,
        "index_n_heads": sizes.index_n_heads,
        "index_topk": sizes.index_topk,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate_size,
        "kv_lora_rank": sizes.kv_lora_rank,
        "max_position_embeddings": sizes.max_position_embeddings,
        "moe_intermediate_size": 256,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.num_attention_heads,
        "num_experts_per_tok": 2,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_key_value_heads": sizes.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "pad_token_id": END_OF_TEXT,
        "q_lora_rank": sizes.q_lora_rank,
        "qk_nope_head_dim": sizes.qk_nope_head_dim,
        "qk_rope_head_dim": sizes.qk_rope_head_dim,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_parameters": {"rope_theta": sizes.rope_theta, "rope_type": "default"},
        "rope_theta": sizes.rope_theta,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "use_cache": True,
        "v_head_dim": sizes.v_head_dim,
        "vocab_size": sizes.vocab_size,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file of indented JSON with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
