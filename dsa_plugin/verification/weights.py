"""One layer's weights, read tensor by tensor; fp8 is dequantised. Each is looked at as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dsa_plugin.config import DSAConfig
from dsa_plugin.fp8_weights import SCALES, WEIGHT_BLOCK
from dsa_plugin.verification.findings import Finding
from dsa_plugin.verification.headers import Headers

# rms * sqrt(columns), by which a linear layer multiplies the size of its input: about 1 in trained
# and in random models, thousands where fp8 values of up to 448 go without their scale.
_LARGEST_GAIN = 300.0
_AGAIN = "download the checkpoint again, or convert it anew"


@dataclass(frozen=True)
class IndexerWeights:
    """fp32; names and shapes are the checkpoint's."""

    wq_b: Tensor
    wk: Tensor
    weights_proj: Tensor
    k_norm: Tensor
    k_norm_bias: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """The attention of a layer, fp32; names and shapes are the checkpoint's.

    `indexer` is None in a layer that shares the selection of another.
    """

    input_layernorm: Tensor
    q_a_proj: Tensor
    q_a_layernorm: Tensor
    q_b_proj: Tensor
    kv_a_proj: Tensor
    kv_a_layernorm: Tensor
    kv_b_proj: Tensor
    indexer: IndexerWeights | None


class Tensors:
    """Reads tensors of a local checkpoint; `findings` has what is wrong with those read."""

    def __init__(self, folder: Path, headers: Headers, device: torch.device) -> None:
        self._folder, self._headers, self._device = folder, headers, device
        self.findings: dict[str, Finding] = {}

    def read(self, name: str) -> Tensor:
        """A tensor in fp32, dequantised where it is fp8."""
        values = self._stored(name)
        if values.dtype != torch.float8_e4m3fn:
            self._check(name, values.float())
            return values.float().to(self._device)
        stem = name.removesuffix("weight")
        scale_name = next(stem + s for s in SCALES if stem + s in self._headers.tensors)
        scale = self._stored(scale_name).float()
        self._check_scale(scale_name, scale)
        weight = dequantised(values, scale)
        self._check(name, weight)
        return weight.to(self._device)

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """[len(rows), columns] fp32 of a tensor that is not quantised; each row is read once."""
        places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        with safe_open(self._folder / self._headers.files[name], "pt") as file:
            part = file.get_slice(name)
            read = torch.cat([part[row : row + 1] for row in places]).float()
        return read[[places[row] for row in rows]].to(self._device)

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._folder / self._headers.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _check(self, name: str, weight: Tensor) -> None:
        if not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            self._found(name, f"holds {bad} NaN or infinite values of {weight.numel()}")
        elif not weight.any() and not name.endswith("bias"):
            self._found(name, "is zero everywhere")
        elif weight.dim() == 2:
            gain = float(weight.double().square().mean().sqrt()) * weight.shape[1] ** 0.5
            if gain > _LARGEST_GAIN:
                of_fp8 = torch.equal(weight.to(torch.float8_e4m3fn).float(), weight)
                why = ": they are fp8 values whose scale was dropped" if of_fp8 else ""
                self._found(name, f"multiplies its input by {gain:.0f}; about 1 is usual{why}")

    def _check_scale(self, name: str, scale: Tensor) -> None:
        if not scale.isfinite().all():
            self._found(name, "holds NaN or infinite scales")
        elif (scale <= 0).any():
            self._found(name, f"holds {int((scale <= 0).sum())} scales that are not positive")
        elif (scale == 1).all():
            self._found(name, "is 1 everywhere: the scales of the fp8 weight were dropped")

    def _found(self, name: str, what: str) -> None:
        self.findings[name] = Finding("wrong", name, what, _AGAIN)


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    """[N, K] fp8 -> fp32, by one scale for all, for each row, or for each 128 x 128 block."""
    rows, columns = weight.shape
    if scale.numel() in (1, rows):
        return weight.float() * scale.view(-1, 1)
    blocks = scale.repeat_interleave(WEIGHT_BLOCK, 0)[:rows]
    return weight.float() * blocks.repeat_interleave(WEIGHT_BLOCK, 1)[:, :columns]


def read_layer(tensors: Tensors, config: DSAConfig, layer: int) -> LayerWeights:
    """All that a layer's attention reads but its output projection."""
    prefix = f"model.layers.{layer}."
    attention = prefix + "self_attn."
    indexer = None
    if config.has_indexer(layer):
        indexer = IndexerWeights(
            wq_b=tensors.read(f"{attention}indexer.wq_b.weight"),
            wk=tensors.read(f"{attention}indexer.wk.weight"),
            weights_proj=tensors.read(f"{attention}indexer.weights_proj.weight"),
            k_norm=tensors.read(f"{attention}indexer.k_norm.weight"),
            k_norm_bias=tensors.read(f"{attention}indexer.k_norm.bias"),
        )
    return LayerWeights(
        input_layernorm=tensors.read(f"{prefix}input_layernorm.weight"),
        q_a_proj=tensors.read(f"{attention}q_a_proj.weight"),
        q_a_layernorm=tensors.read(f"{attention}q_a_layernorm.weight"),
        q_b_proj=tensors.read(f"{attention}q_b_proj.weight"),
        kv_a_proj=tensors.read(f"{attention}kv_a_proj_with_mqa.weight"),
        kv_a_layernorm=tensors.read(f"{attention}kv_a_layernorm.weight"),
        kv_b_proj=tensors.read(f"{attention}kv_b_proj.weight"),
        indexer=indexer,
    )
