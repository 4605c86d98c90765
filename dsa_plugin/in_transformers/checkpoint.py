"""A checkpoint's tokenizer and model by transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch

from dsa_plugin.config_file import read_config
from dsa_registry import lookup


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local checkpoint.

    Raises:
        ValueError: there is none, or transformers is not installed.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; name the folder of a checkpoint")
    return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_pretrained(folder: Path, dtype: torch.dtype | Literal["auto"]) -> Any:
    """The model of a local checkpoint, in eval mode; auto: in the dtype that it is stored in.

    Raises:
        ValueError: it is no DSA checkpoint or lacks weights, or transformers has no such model.
    """
    transformers, config = _transformers(), read_config(folder)
    # Named, not AutoModelForCausalLM: importing vLLM maps deepseek_v32 to a dense config there.
    [name] = lookup(str(config.get("model_type"))).architectures
    if not hasattr(transformers, name):
        raise ValueError(
            f"transformers {transformers.__version__} has no {name}; 5.19 has: install that, in an "
            "environment of its own where a host pins this one"
        )
    model, report = getattr(transformers, name).from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    layers = config["num_hidden_layers"]
    # By kind, what transformers says it missed, found too much, or could not fit.
    problems = {
        kind: [str(key) for key in keys if not is_of_mtp(str(key), layers)]
        for kind, keys in report.items()
    }
    if found := {kind: keys[:4] for kind, keys in problems.items() if keys}:
        raise ValueError(
            f"the weights of {folder} are not those its config.json asks for: {found}; "
            "download it again"
        )
    return model.eval()


def is_of_mtp(name: str, layers: int) -> bool:
    """Whether a tensor is of an MTP layer, which transformers has not."""
    found = re.search(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= layers


def _transformers() -> Any:
    """The library, silent."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "transformers, which runs the model here, is not installed: pip install it"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
