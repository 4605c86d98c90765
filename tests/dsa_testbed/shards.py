"""A small model's checkpoint in several files, with an index, as the releases come."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsa_testbed import checkpoint
from dsa_testbed.small_models import SmallModel, small_model
from dsa_testbed.weights import quantise_blocks

INDEX = "model.safetensors.index.json"


def write_shards(spec: SmallModel, folder: Path, files: int) -> Path:
    """A checkpoint dealt out tensor by tensor, so that many an FP8 weight and its scale part."""
    folder.mkdir(parents=True)
    checkpoint.write(spec, folder)
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = [f"model-{n + 1:05}-of-{files:06}.safetensors" for n in range(files)]
    dealt = {name: names[n % files] for n, name in enumerate(sorted(tensors))}
    for file in names:
        kept = {name: tensors[name] for name in tensors if dealt[name] == file}
        save_file(kept, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dealt}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def write_tiny(folder: Path, files: int = 6) -> Path:
    """A folder that is no model but is converted like one, in less time: FP8 experts and more."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(small_model("v32-fp8").config))
    (folder / "tokenizer.json").write_text("{}")
    index: dict[str, str] = {}
    for number in range(files):
        layer = f"model.layers.{number}."
        tensors = {layer + "mlp.gate.weight": torch.randn(8, 256).bfloat16()}
        for stem in ("mlp.experts.0.up_proj", "self_attn.o_proj", "self_attn.indexer.wq_b"):
            weight, scale = quantise_blocks(torch.randn(384, 256))
            tensors[f"{layer}{stem}.weight"] = weight
            # Each file has the scales of the next.
            tensors[f"model.layers.{(number + 1) % files}.{stem}.weight_scale_inv"] = scale
        name = f"model-{number + 1:05}-of-{files:06}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def load_shards(folder: Path) -> Mapping[str, Tensor]:
    """Every tensor of a folder's files, by safetensors' own reader."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
