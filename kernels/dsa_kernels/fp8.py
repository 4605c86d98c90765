"""Reading and writing e4m3 with power-of-two scales, where torch's own way is slow or inexact."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dsa_kernels.dims import FP8_MAX
from dsa_kernels.workspace import scratch


def round_up_to_power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two >= scale, for fp32 > 0: ue8m0, as DeepSeek scales fp8."""
    # By the exponent: a logarithm may round across an exact power of two.
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def quantise_ue8m0(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale per vector: 2^ceil(log2(max(amax, 1e-4) / 448)).

    DeepSeek-V3.2-Exp's act_quant with scale_fmt "ue8m0" (inference/kernel.py); vLLM's
    `_fp8_ue8m0_quantize` computes the same.

    Args:
        x: [..., n] float.

    Returns:
        [..., n] float8_e4m3fn and [...] fp32, whose product is x, rounded.
    """
    x = x.float()
    amax = torch.linalg.vector_norm(x, torch.inf, -1).clamp(1e-4, torch.finfo(x.dtype).max)
    scale = round_up_to_power_of_two(amax / FP8_MAX)
    return encode_e4m3(x / scale[..., None]), scale


def encode_e4m3(x: Tensor) -> Tensor:
    """fp32, at most 448 in size where it is finite -> float8_e4m3fn; infinities become NaN.

    e4m3 has none, and torch would make them 448, as if nothing had been wrong.
    """
    return x.masked_fill(x.isinf(), torch.nan).to(torch.float8_e4m3fn)


def decode_e4m3(values: Tensor, out: Tensor) -> Tensor:
    """Exactly out.copy_(values), nine times as fast on a CPU: torch converts value by value there.

    Args:
        values: float8_e4m3fn, last dimension dense and even, all else even numbers of bytes apart.
        out: float32, bfloat16 or float16 (all hold every e4m3 value) of the same shape, written.
    """
    if values.device.type != "cpu":
        return out.copy_(values)
    pairs = values.view(torch.int16)
    index = scratch("e4m3 pairs", tuple(pairs.shape), torch.int32, values.device)
    index.copy_(pairs).bitwise_and_(0xFFFF)
    decoded = scratch("e4m3 decoded", (index.numel(),), torch.int32, values.device)
    torch.index_select(_pair_table(), 0, index.view(-1), out=decoded)
    return out.copy_(decoded.view(torch.bfloat16).view(values.shape))


@cache
def _pair_table() -> Tensor:
    """[65536] int32: two e4m3 bytes, as one number -> the two bf16 values, as one number."""
    pairs = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return pairs.view(torch.float8_e4m3fn).to(torch.bfloat16).view(torch.int32)
