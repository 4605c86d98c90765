"""A model that is none of ours: a tiny Llama with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dsa_testbed import tokenizer

LAYERS, HIDDEN, HEADS, INTERMEDIATE, VOCAB = 2, 128, 2, 256, 2048
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 0,
    "dtype": "float32",
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 1024,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}


def write_llama(folder: Path) -> Path:
    """A checkpoint in a new folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(folder, VOCAB, 1024)
    return folder


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight: torch.Tensor = torch.randn(rows, columns, generator=generator)
        return weight.mul_(columns**-0.5)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN),
        "lm_head.weight": matrix(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = torch.ones(HIDDEN)
        for projection in "qkvo":
            tensors[f"{name}.self_attn.{projection}_proj.weight"] = matrix(HIDDEN, HIDDEN)
        for projection in ("gate", "up"):
            tensors[f"{name}.mlp.{projection}_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
    return tensors
