"""A checkpoint to convert, by its config.json and the headers of its files; nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsa_plugin.config_file import read_config
from dsa_plugin.fp8_weights import SCALE_SUFFIX, WEIGHT_BLOCK, scale_shape
from dsa_plugin.safetensors_header import INDEX, ranks_of, read_layout, read_weight_map

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SCALES = {"F32", "BF16", "F8_E8M0"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor where it lies: `nbytes` bytes of `path` from byte `start`."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Source:
    """A checkpoint: its config, and each file's tensors by their names."""

    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, Stored]]

    @property
    def tensors(self) -> dict[str, Stored]:
        """All of them."""
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.items()}


def open_folder(folder: Path) -> Source:
    """A folder's config.json and headers.

    Raises:
        ValueError: no config.json or safetensors, a damaged file, one that the index lacks, or
            weights that are cut for ranks.
    """
    config = read_config(folder)
    if size := ranks_of(folder):
        raise ValueError(
            f"{folder} is cut for {size} ranks; take the checkpoint that it was made of"
        )
    index = read_weight_map(folder) or {}
    names = sorted(set(index.values())) or sorted(
        path.name for path in folder.glob("*.safetensors")
    )
    if not names:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        raise ValueError(
            f"{folder} has no *.safetensors, the only format that is read"
            + (f": {pickled[0]} is pickled, and nothing is unpickled" if pickled else "")
            + ". Take a revision of the checkpoint that has them."
        )
    shards: dict[str, dict[str, Stored]] = {}
    files: dict[str, str] = {}
    for name in names:
        shards[name] = read_shard(folder, name)
        for tensor in shards[name]:
            if tensor in files:
                raise ValueError(f"{tensor} is in both {files[tensor]} and {name} of {folder}")
            files[tensor] = name
    missing = sorted(name for name, file in index.items() if files.get(name) != file)
    if missing:
        raise ValueError(
            f"{folder / INDEX} promises {missing[0]} in {index[missing[0]]}, which lacks it "
            f"({len(missing)} such tensors). Download both again."
        )
    return Source(folder, config, shards)


def open_source(folder: Path) -> Source:
    """A checkpoint that can be converted: unquantised, or FP8 in blocks of 128.

    Raises:
        ValueError: as open_folder, or the checkpoint is quantised in any other way.
    """
    source = open_folder(folder)
    _check_quantisation(source)
    tensors = source.tensors
    for name, tensor in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            weight = tensors.get(name.removesuffix(SCALE_SUFFIX))
            if weight is None or weight.dtype != "F8_E4M3":
                found = "no weight" if weight is None else f"a weight in {weight.dtype}, not FP8"
                raise ValueError(f"{name} of {folder} has {found}. Download the checkpoint again.")
        elif tensor.dtype == "F8_E4M3":
            _check_scale(tensor, tensors.get(name + SCALE_SUFFIX))
        elif tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{name} of {folder} is {tensor.dtype} {list(tensor.shape)}: packed or quantised "
                f"already. {_ALLOWED}"
            )
    return source


_ALLOWED = (
    "What can be converted is bf16, fp16, fp32 and FP8 in blocks of 128 x 128 (e4m3 weights with "
    "weight_scale_inv); take the model's own release."
)


def _check_quantisation(source: Source) -> None:
    quantisation = source.config.get("quantization_config") or {}
    method = quantisation.get("quant_method", "fp8")
    if method != "fp8":
        raise ValueError(f"{source.folder} is quantised already, by {method}. {_ALLOWED}")
    block = quantisation.get("weight_block_size", [WEIGHT_BLOCK] * 2)
    scheme = quantisation.get("activation_scheme", "dynamic")
    if block != [WEIGHT_BLOCK] * 2 or scheme != "dynamic":
        raise ValueError(
            f"{source.folder} has fp8 with weight_block_size {block} and activation_scheme "
            f"{scheme}. {_ALLOWED}"
        )


def _check_scale(weight: Stored, scale: Stored | None) -> None:
    blocks = scale_shape(weight.shape)
    of = f"{weight.name} (FP8 {list(weight.shape)}, {weight.path})"
    if scale is None:
        raise ValueError(
            f"{of} has no {weight.name}{SCALE_SUFFIX} in any file. Download the checkpoint again."
        )
    if len(blocks) != 2 or scale.shape != blocks or scale.dtype not in _SCALES:
        raise ValueError(
            f"{of} has scales {scale.dtype} {list(scale.shape)}; expected {list(blocks)}, one of "
            f"{', '.join(sorted(_SCALES))}. {_ALLOWED}"
        )


def read_shard(folder: Path, name: str) -> dict[str, Stored]:
    """The tensors of a file.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} is missing, which {INDEX} names. Download it again.")
    header, first = read_layout(path)
    found = {}
    for tensor, entry in header.items():
        begin, end = entry["data_offsets"]
        stored = Stored(
            tensor, path, entry["dtype"], tuple(entry["shape"]), first + begin, end - begin
        )
        dtype = TORCH_DTYPES.get(stored.dtype)
        if dtype and math.prod(stored.shape) * dtype.itemsize != stored.nbytes:
            raise ValueError(
                f"{tensor} of {path} has {stored.nbytes} bytes, which is not {stored.dtype} "
                f"{list(stored.shape)}. Download it again."
            )
        found[tensor] = stored
    return found
