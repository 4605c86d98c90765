"""How a checkpoint is cut among ranks, for who reads a rank's part and who writes it to a file.

What is split, and along which dimension, is said by the model alone: where a rank's parameter has
fewer rows or columns than the whole model's, it gets its share of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsa_plugin.fp8_weights import SCALE_SUFFIX, WEIGHT_BLOCK, scale_shape
from dsa_plugin.generate.config import ModelConfig
from dsa_plugin.generate.model import Model
from dsa_plugin.generate.ranks import Ranks

Shape = tuple[int, ...]
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Cut:
    """A rank's part of a tensor.

    Attributes:
        name: the tensor's, in the checkpoint.
        whole: its shape there.
        where: the rank's rows and columns of it.
    """

    name: str
    whole: Shape
    where: tuple[slice, ...]

    @property
    def shape(self) -> Shape:
        """The part's."""
        return tuple(part.stop - part.start for part in self.where)

    @property
    def scales(self) -> Cut:
        """Of an FP8 tensor's scales, those that the part needs; it may begin within a block."""
        return Cut(
            self.name + SCALE_SUFFIX,
            scale_shape(self.whole),
            tuple(slice(p.start // WEIGHT_BLOCK, -(-p.stop // WEIGHT_BLOCK)) for p in self.where),
        )

    def per_value(self, scales: Tensor) -> Tensor:
        """`scales` as they are stored -> the scale of each value, [rows, columns]."""
        rows, columns = (
            torch.arange(part.start, part.stop) // WEIGHT_BLOCK - part.start // WEIGHT_BLOCK
            for part in self.where
        )
        return scales[rows[:, None], columns]


def unloaded(config: ModelConfig, ranks: Ranks) -> Model:
    """A rank's model, without storage."""
    with torch.device("meta"):
        return Model(config, ranks)


def whole_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Of every tensor, uncut, by its name in the model."""
    return _shapes(unloaded(config, Ranks(0, 1, torch.device("cpu"))))


def cuts(model: Model, whole: Mapping[str, Shape]) -> dict[str, Cut]:
    """What a rank has of the checkpoint, by the names of its model's tensors.

    Args:
        model: the rank's.
        whole: by whole_shapes().
    """
    tied, ranks = model.config.tied_head, model.ranks
    return {
        name: Cut(
            _EMBEDDING if name == _HEAD and tied else name,
            whole[name],
            tuple(
                slice(0, size) if size == of else slice(ranks.rank * size, (ranks.rank + 1) * size)
                for size, of in zip(shape, whole[name], strict=True)
            ),
        )
        for name, shape in _shapes(model).items()
    }


def lacks(folder: Path, name: str) -> ValueError:
    """What to raise where a folder has no such tensor."""
    return ValueError(
        f"{folder} has no tensor {name}, which its config.json asks for; download its "
        ".safetensors again"
    )


def check_shape(folder: Path, name: str, found: Sequence[int], expected: Shape) -> None:
    """Raises ValueError unless a folder's tensor has the shape that its config.json says."""
    if tuple(found) != expected:
        raise ValueError(
            f"{name} has shape {list(found)} in {folder}, whose config.json says {list(expected)}: "
            "config.json and weights are of different models"
        )


def _shapes(model: Model) -> dict[str, Shape]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
