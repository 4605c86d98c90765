"""A rank's part of a checkpoint, read one tensor at a time: never more of it is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa_plugin.generate.config import ModelConfig
from dsa_plugin.generate.cuts import Cut, check_shape, cuts, lacks, unloaded, whole_shapes
from dsa_plugin.generate.model import Model
from dsa_plugin.generate.ranks import Ranks
from dsa_plugin.safetensors_header import rank_file, ranks_of, read_header, read_weight_map

# Both kept in fp32: what they tell apart is less than bf16 can say.
_FP32 = ("mlp.gate.e_score_correction_bias", "indexer.k_norm.weight", "indexer.k_norm.bias")


def load_model(folder: Path, ranks: Ranks, dtype: torch.dtype) -> Model:
    """The model of a checkpoint's folder, on this rank's device.

    Raises:
        ValueError: the folder is of no such model, lacks weights, or has others than its
            config.json says; or it cannot be run by so many ranks.
    """
    config = ModelConfig.of_folder(folder)
    with ExitStack() as stack:
        stored = StoredTensors(folder, ranks, stack)
        config.check_ranks(ranks.size)
        model = unloaded(config, ranks)
        for name, cut in cuts(model, whole_shapes(config)).items():
            kept = torch.float32 if name.endswith(_FP32) else dtype
            value = stored.part(cut).to(ranks.device, kept)
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            is_parameter = isinstance(getattr(module, leaf), nn.Parameter)
            new = nn.Parameter(value, requires_grad=False) if is_parameter else value
            setattr(module, leaf, new)
    return model.eval()


class StoredTensors:
    """The safetensors files that a rank reads, opened as they are needed and closed with `stack`.

    Of a folder that is cut for ranks that is the rank's own.
    """

    def __init__(self, folder: Path, ranks: Ranks, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._opened: dict[str, Any] = {}
        self._own = _own_file(folder, ranks)
        self._files = dict(self._names_and_files())

    def part(self, cut: Cut) -> Tensor:
        """A rank's part of a tensor; fp8 comes multiplied by its blocks' scales, in fp32.

        Raises:
            ValueError: there is no such tensor, or of another shape.
        """
        value = self._read(cut)
        if value.dtype != torch.float8_e4m3fn:
            return value
        return value.float() * cut.per_value(self._read(cut.scales).float())

    def _read(self, cut: Cut) -> Tensor:
        if cut.name not in self._files:
            raise lacks(self.folder, cut.name)
        stored = self._open(self._files[cut.name]).get_slice(cut.name)
        expected = cut.shape if self._own else cut.whole
        check_shape(self.folder, cut.name, stored.get_shape(), expected)
        read: Tensor = stored[:] if self._own else stored[cut.where]
        return read

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._opened:
            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"{path} is named in the index and missing; download it")
            read_header(path)  # refuses a truncated file by name
            self._opened[file] = self._stack.enter_context(safe_open(path, "pt"))
        return self._opened[file]

    def _names_and_files(self) -> Iterator[tuple[str, str]]:
        weight_map = None if self._own else read_weight_map(self.folder)
        if weight_map is not None:
            yield from weight_map.items()
            return
        files = (
            [self._own] if self._own else sorted(p.name for p in self.folder.glob("*.safetensors"))
        )
        if not files:
            raise ValueError(f"{self.folder} has no .safetensors, the one format that is read")
        for file in files:
            yield from ((name, file) for name in self._open(file).keys())  # noqa: SIM118


def _own_file(folder: Path, ranks: Ranks) -> str | None:
    """The rank's file of a folder that is cut for so many ranks; None: the folder is not cut."""
    size = ranks_of(folder)
    if size is None:
        return None
    if size != ranks.size:
        raise ValueError(
            f"{folder} is cut for {size} ranks, not {ranks.size}: use --nproc-per-node {size}, or "
            "the checkpoint that it was made of"
        )
    own = rank_file(ranks.rank, size)
    if not (folder / own).is_file():
        raise ValueError(f"{folder} lacks {own}; make it by the same dsa convert again")
    return own
