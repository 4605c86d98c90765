"""Reads a Hugging Face folder of a DeepSeek-V3-shaped model, with or without an indexer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dsa_plugin.config_file import read_config
from dsa_plugin.training.model import DsaModel
from dsa_plugin.training.sizes import ModelSizes

MODEL_TYPES = ("deepseek_v3", "deepseek_v32")


@dataclass(frozen=True)
class IndexerSizes:
    """Of an indexer that is added; the defaults are DeepSeek-V3.2's."""

    heads: int = 64
    topk: int = 2048


@dataclass(frozen=True)
class Checkpoint:
    """A model in fp32, the config.json to write for it, and whether its indexer came with it."""

    model: DsaModel
    config: dict[str, Any]
    has_indexer: bool


def load_checkpoint(folder: Path, added: IndexerSizes, seed: int) -> Checkpoint:
    """Loads a model; one without an indexer gets a random one of sizes `added`.

    Its MTP layers are left out, since neither stage trains them.

    Raises:
        ValueError: what the folder lacks, or is and cannot be.
    """
    config = read_config(folder)
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{folder} is a {config.get('model_type')!r}; an indexer can be added to "
            f"{' and '.join(MODEL_TYPES)}"
        )
    config = v32_config(config, added)
    model = DsaModel(ModelSizes.from_config(config))
    tensors = _read_tensors(folder)
    if config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        config["tie_word_embeddings"] = False
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    has_indexer = not any(".indexer." in name for name in missing)
    absent = [name for name in missing if ".indexer." not in name]
    if absent:
        raise ValueError(f"{folder} lacks {len(absent)} tensors, such as {absent[0]}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in wanted.items():
            if name not in tensors:
                _start_indexer(name, value, generator)
            elif tensors[name].shape != value.shape:
                raise ValueError(
                    f"{name} of {folder} has shape {tuple(tensors[name].shape)}; by its "
                    f"config.json it has {tuple(value.shape)}"
                )
            else:
                value.copy_(tensors[name])
    return Checkpoint(model, config, has_indexer)


def v32_config(config: Mapping[str, Any], added: IndexerSizes) -> dict[str, Any]:
    """The config.json of the same model with an indexer."""
    index = {"index_n_heads": added.heads, "index_head_dim": 128, "index_topk": added.topk}
    return {
        **index,
        **config,
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "num_nextn_predict_layers": 0,
    }


def _start_indexer(name: str, value: Tensor, generator: torch.Generator) -> None:
    if value.dim() == 2:
        value.normal_(std=value.shape[1] ** -0.5, generator=generator)
    else:
        value.fill_(0.0 if name.endswith("bias") else 1.0)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors; other formats of weights are not read")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors
