"""LoRA adapters of a checkpoint's projections, and the checkpoint that means the same."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK = 8


def adapter(tensors: dict[str, Tensor], projections: set[str], directory: Path) -> Path:
    """A LoRA adapter of these projections of every layer, which is merged into `tensors`."""
    low_rank = {}
    for name in sorted(tensors):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in projections or ".layers.4." in name:
            continue
        rows, columns = tensors[name].shape
        a, b = torch.randn(RANK, columns) * columns**-0.5, torch.randn(rows, RANK) * 0.3
        tensors[name] += b @ a
        low_rank[f"base_model.model.{module}.lora_A.weight"] = a
        low_rank[f"base_model.model.{module}.lora_B.weight"] = b
    directory.mkdir()
    save_file(low_rank, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    config |= {"target_modules": sorted(projections)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def with_adapter(model: Path, projections: set[str], folder: Path) -> tuple[Path, Path]:
    """An adapter of these projections, and a copy of the checkpoint into which it is merged."""
    merged = Path(shutil.copytree(model, folder / "merged"))
    tensors = load_file(merged / "model.safetensors")
    path = adapter(tensors, projections, folder / "adapter")
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    return path, merged
