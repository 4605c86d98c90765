"""Small Hugging Face checkpoints, made once and kept under the cache root.

``python -m dsa_testbed.checkpoint v32 glm5 ...`` makes them and prints where they are.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dsa_testbed import small_models, tokenizer, weights
from dsa_testbed.cache import cache_root, digest, staged_directory
from dsa_testbed.small_models import SmallModel, small_model


def make_checkpoint(name: str, root: Path | None = None, **overrides: Any) -> Path:
    """The directory of checkpoint ``name``, made if the cache has it not.

    ``name`` and ``overrides`` are those of small_models.small_model(). The directory is
    ``<root>/<name>-<hash of everything that goes into it>``; root is by default
    ``<cache root>/checkpoints``.
    """
    return build(small_model(name, **overrides), root)


def build(spec: SmallModel, root: Path | None = None) -> Path:
    """The directory of a model's checkpoint, made if the cache has it not."""
    key = digest(
        spec.config,
        spec.dtype,
        spec.seed,
        spec.gains,
        *(Path(str(module.__file__)).read_bytes() for module in (weights, tokenizer)),
        tokenizer.shipped_text(),
    )
    target = (root or cache_root() / "checkpoints") / f"{spec.name}-{key}"
    if not target.exists():
        with staged_directory(target) as stage:
            write(spec, stage)
    return target


def write(spec: SmallModel, directory: Path) -> None:
    """Writes a model's checkpoint into an existing directory."""
    config = spec.config
    save_file(
        {name: value.contiguous() for name, value in weights.tensors(spec)},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    generation = {
        "_from_model_config": True,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "do_sample": False,
    }
    for file, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tokenizer.save(directory, config["vocab_size"], config["max_position_embeddings"])


def with_fp8_keys(model: Path, folder: Path) -> tuple[Path, Path]:
    """A copy whose indexers' wk are stored in fp8, alone of its weights; and what it means."""
    copies = [Path(shutil.copytree(model, folder / name)) for name in ("stored", "meant")]
    stored = load_file(model / "model.safetensors")
    meant = dict(stored)
    for name in [name for name in stored if name.endswith(".indexer.wk.weight")]:
        stored[name], scale = weights.quantise_blocks(stored[name])
        stored[f"{name}_scale_inv"] = scale
        meant[name] = weights.dequantise_blocks(stored[name], scale)
    for copy, tensors in zip(copies, (stored, meant), strict=True):
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copies[0], copies[1]


def load_config(checkpoint: Path) -> small_models.Config:
    """config.json of a checkpoint."""
    config: small_models.Config = json.loads((checkpoint / "config.json").read_text())
    return config


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(make_checkpoint(argument), flush=True)
