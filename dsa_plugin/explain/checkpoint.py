"""A checkpoint's tokenizer and model by transformers; one that cannot fit is not loaded."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from dsa_plugin.explain.selections import WORKSPACE_BYTES
from dsa_plugin.planning.model import ModelShape
from dsa_registry import lookup

_GIB = 1 << 30


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local checkpoint.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; name the folder of a checkpoint")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


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
    config = _read_config(folder)
    dtype = torch.float32
    if device.type != "cpu":
        dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    shape = ModelShape.from_config(str(folder), config)
    _check_memory(shape, device, dtype, tokens)
    model, report = _model_class(shape).from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    _check_weights(shape, report)
    return model.eval().to(device)


def weight_elements(folder: Path, layers: int) -> int:
    """Elements of a checkpoint's tensors, by the files' headers; MTP layers are not loaded."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors, the only format that is read; convert it")
    elements = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                if not _is_of_mtp(name, layers):
                    elements += math.prod(tensors.get_slice(name).get_shape())
    return elements


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; name the folder that holds a checkpoint")
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    if config.get("quantization_config"):
        raise ValueError(
            f"{folder} is quantised, which is not run here; name a checkpoint in bf16, fp16 or fp32"
        )
    return config


def _model_class(shape: ModelShape) -> Any:
    # Named, not AutoModelForCausalLM: importing vLLM maps deepseek_v32 to a dense config there.
    import transformers

    [name] = lookup(shape.model_type).architectures
    if not hasattr(transformers, name):
        raise ValueError(
            f"transformers {transformers.__version__} has no {name}; 5.19 has: install that, in an "
            "environment of its own where a host pins this one"
        )
    return getattr(transformers, name)


def _check_memory(shape: ModelShape, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    cached = shape.kv_lora_rank + shape.qk_rope_head_dim + shape.index_head_dim
    expanded = shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim
    # K and V are expanded to all heads a layer at a time: as one product, and then as K and V.
    of_token = shape.num_hidden_layers * cached + 2 * shape.num_attention_heads * expanded
    weights = weight_elements(Path(shape.name), shape.num_hidden_layers)
    needed = (weights + tokens * of_token) * dtype.itemsize + WORKSPACE_BYTES
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


def _check_weights(shape: ModelShape, report: dict[str, Any]) -> None:
    """report: what transformers says it missed, found too much, or could not fit."""
    problems = {
        kind: [str(key) for key in keys if not _is_of_mtp(str(key), shape.num_hidden_layers)]
        for kind, keys in report.items()
    }
    if found := {kind: keys[:4] for kind, keys in problems.items() if keys}:
        raise ValueError(
            f"the weights of {shape.name} are not those its config.json asks for: {found}; "
            "download it again"
        )


def _is_of_mtp(name: str, layers: int) -> bool:
    found = re.search(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= layers
