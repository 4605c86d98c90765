"""A checkpoint's model by transformers; one that cannot fit is not loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from dsa_plugin.config_file import read_config
from dsa_plugin.in_transformers.checkpoint import is_of_mtp, load_pretrained
from dsa_plugin.planning.model import ModelShape
from dsa_plugin.safetensors_header import read_header

_GIB = 1 << 30
_WORKSPACE_BYTES = 2 << 30  # of a pass: a chunk's scores with their copies, and all that is smaller


def load_model(folder: Path, device: torch.device, tokens: int) -> Any:
    """The model of a local checkpoint, in eval mode.

    On a CPU it is fp32, since products in bf16 are slow there; on a GPU the checkpoint's own dtype.

    Args:
        folder: with config.json and safetensors weights.
        device: where it runs.
        tokens: how long the context gets; caches and the expanded K and V grow with it.

    Raises:
        ValueError: it is no DSA checkpoint, is quantised, does not fit into the memory that is
            free, or lacks weights; or transformers has no such model.
    """
    config = read_config(folder)
    if config.get("quantization_config"):
        raise ValueError(
            f"{folder} is quantised, which is not run here; name a checkpoint in bf16, fp16 or fp32"
        )
    dtype = torch.float32
    if device.type != "cpu":
        dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    shape = ModelShape.from_config(str(folder), config)
    _check_memory(shape, device, dtype, tokens)
    return load_pretrained(folder, dtype).to(device)


def weight_elements(folder: Path, layers: int) -> int:
    """Elements of a checkpoint's tensors, by the files' headers; MTP layers are not loaded."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors, the only format that is read; convert it")
    return sum(
        math.prod(tensor["shape"])
        for file in files
        for name, tensor in read_header(file).items()
        if not is_of_mtp(name, layers)
    )


def _check_memory(shape: ModelShape, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    cached = shape.kv_lora_rank + shape.qk_rope_head_dim + shape.index_head_dim
    expanded = shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim
    # K and V are expanded to all heads a layer at a time: as one product, and then as K and V.
    of_token = shape.num_hidden_layers * cached + 2 * shape.num_attention_heads * expanded
    weights = weight_elements(Path(shape.name), shape.num_hidden_layers)
    needed = (weights + tokens * of_token) * dtype.itemsize + _WORKSPACE_BYTES
    free = _free_bytes(device)
    if needed > free:
        raise ValueError(
            f"{shape.name} needs about {needed / _GIB:.1f} GiB ({weights / 1e9:.2f}B parameters in "
            f"{str(dtype).removeprefix('torch.')}, {tokens:,} tokens), and {free / _GIB:.1f} GiB "
            f"of the {device}'s are free; free some, or take a larger machine, a shorter prompt or "
            "a smaller checkpoint"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)
