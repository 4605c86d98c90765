"""A rank's part of a checkpoint, read one tensor at a time: never more of it is in memory.

What is split, and along which dimension, is said by the model alone: where a rank's parameter has
fewer rows or columns than the stored tensor, it gets its share of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa_plugin.generate.config import FP8_BLOCK, ModelConfig
from dsa_plugin.generate.model import Model
from dsa_plugin.generate.ranks import Ranks
from dsa_plugin.safetensors_header import read_weight_map

# Both kept in fp32: what they tell apart is less than bf16 can say.
_FP32 = ("mlp.gate.e_score_correction_bias", "indexer.k_norm.weight", "indexer.k_norm.bias")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_model(folder: Path, ranks: Ranks, dtype: torch.dtype) -> Model:
    """The model of a checkpoint's folder, on this rank's device.

    Raises:
        ValueError: the folder is of no such model, lacks weights, or has others than its
            config.json says; or the ranks do not divide it.
    """
    config = ModelConfig.of_folder(folder)
    config.check_ranks(ranks.size)
    with torch.device("meta"):
        model = Model(config, ranks)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with ExitStack() as stack:
        stored = StoredTensors(folder, stack)
        for name, wanted in tensors.items():
            source = _EMBEDDING if name == _HEAD and config.tied_head else name
            kept = torch.float32 if name.endswith(_FP32) else dtype
            value = stored.part(source, tuple(wanted.shape), ranks).to(ranks.device, kept)
            parent, _, leaf = name.rpartition(".")
            is_parameter = isinstance(wanted, nn.Parameter)
            new = nn.Parameter(value, requires_grad=False) if is_parameter else value
            setattr(model.get_submodule(parent), leaf, new)
    return model.eval()


class StoredTensors:
    """The safetensors files of a folder, opened as they are needed and closed with `stack`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._opened: dict[str, Any] = {}
        self._files = dict(self._names_and_files())

    def part(self, name: str, shape: tuple[int, ...], ranks: Ranks) -> Tensor:
        """A rank's part, of a shape; fp8 weights come multiplied by their blocks' scales, in fp32.

        Raises:
            ValueError: there is no such tensor, or of another shape.
        """
        stored = self._slice(name)
        whole = tuple(stored.get_shape())
        where = _share(name, whole, shape, ranks)
        value: Tensor = stored[where]
        if value.dtype != torch.float8_e4m3fn:
            return value
        scales = self._slice(f"{name}_scale_inv")[:].float()
        return value.float() * _per_value(scales, where, whole)

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise ValueError(
                f"{self.folder} has no tensor {name}, which its config.json asks for; download "
                "its .safetensors again"
            )
        return self._open(self._files[name]).get_slice(name)

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._opened:
            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"{path} is named in the index and missing; download it")
            self._opened[file] = self._stack.enter_context(safe_open(path, "pt"))
        return self._opened[file]

    def _names_and_files(self) -> Iterator[tuple[str, str]]:
        weight_map = read_weight_map(self.folder)
        if weight_map is not None:
            yield from weight_map.items()
            return
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.folder} has no .safetensors, the one format that is read")
        for file in files:
            yield from ((name, file) for name in self._open(file).keys())  # noqa: SIM118


def _share(
    name: str, whole: tuple[int, ...], part: tuple[int, ...], ranks: Ranks
) -> tuple[slice, ...]:
    """Which rows and columns of a stored tensor are this rank's."""
    split = [a != b for a, b in zip(whole, part, strict=False)]
    fits = all(a == b * ranks.size for a, b in zip(whole, part, strict=False) if a != b)
    if len(whole) != len(part) or not fits or sum(split) > 1:
        raise ValueError(
            f"{name} has shape {list(whole)}; by its config.json a rank of {ranks.size} has "
            f"{list(part)} of it: config.json and weights are of different models"
        )
    return tuple(
        slice(ranks.rank * size, (ranks.rank + 1) * size) if is_split else slice(0, size)
        for size, is_split in zip(part, split, strict=True)
    )


def _per_value(scales: Tensor, where: tuple[slice, ...], whole: tuple[int, ...]) -> Tensor:
    """The scale of each value at `where`; a share may begin within a block of 128 x 128."""
    rows, columns = (
        torch.arange(size)[part] // FP8_BLOCK for size, part in zip(whole, where, strict=True)
    )
    return scales[rows[:, None], columns]
