"""The arithmetic: FP8 blocks to fp32, and fp32 to packed integers with a scale a group."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_plugin.fp8_weights import WEIGHT_BLOCK
from dsa_plugin.packed_weights import GROUP

_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def dequantise(weight: Tensor, scales: Tensor) -> Tensor:
    """FP8 rows to fp32; exact, since 4 bits of mantissa times 24 are rounded to 24 once.

    Args:
        weight: [N, K] e4m3, its first row the first of a block.
        scales: [ceil(N / 128), ceil(K / 128)] fp32, what a block's values are multiplied by.
    """
    # PyTorch's own conversion takes twice the time.
    values = torch.from_numpy(_E4M3.take(weight.view(torch.uint8).numpy()))
    factors = scales.repeat_interleave(WEIGHT_BLOCK, 1)[:, : weight.shape[1]]
    for rows, factor in zip(values.split(WEIGHT_BLOCK), factors, strict=True):
        rows *= factor
    return values


def quantise(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rows in fp32 to the nearest integers of `bits` bits, whose range is each group's.

    The scale is rounded up to bf16, so no value is more than half a scale off.

    Args:
        weight: [N, K] fp32, K a multiple of 128.
        bits: 4 or 8.

    Returns:
        packed [N, K * bits / 32] int32, each 32 / bits values with the first in the lowest bits
        and 2^(bits - 1) added; scale [N, K / 128] bf16, finite where all values of a group are.
    """
    groups = weight.unflatten(1, (-1, GROUP))
    half = 1 << (bits - 1)
    scale = _rounded_up(groups.abs().amax(2) / (half - 0.5))
    # Of a group of zeros; any scale but 0 is right.
    scale = torch.where(scale == 0, 1, scale)
    values = groups / scale.float().unsqueeze(2)
    unsigned = values.round_().clamp_(-half, half - 1).add_(half).to(torch.uint8).flatten(1)
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32), scale


def unpack(packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The inverse of quantise(), in fp32: [N, K]."""
    unsigned = packed.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), 2).flatten(1)
    values = unsigned.float() - (1 << (bits - 1))
    grouped: Tensor = values.unflatten(1, (-1, GROUP)) * scale.float().unsqueeze(2)
    return grouped.flatten(1)


def _rounded_up(positive: Tensor) -> Tensor:
    """fp32, not negative, to the next bf16 that is not smaller."""
    upper = (positive.contiguous().view(torch.int32) + 0xFFFF) >> 16
    return upper.to(torch.int16).view(torch.bfloat16)
