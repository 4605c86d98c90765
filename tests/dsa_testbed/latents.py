"""Latent caches with known contents, selections of them, and the fp64 attention over those."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from dsa_kernels.testing import error, make_latent_cache

SCALE = 192**-0.5
# P and the result are rounded to q's dtype; fp32_limit has fp32's.
RMS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# The specification has 0.7 of eager attention's error, and 0.98 seen in the few values of a row.
EAGER = {"reference": 1.0, "cpu": 1.0, "kernel": 0.9}
# Every e4m3fn code, by the format's definition; the two NaN codes would be 480 here.
E4M3 = [
    (-1) ** (code >> 7)
    * (2.0 ** ((code >> 3 & 15) - 7) * (1 + (code & 7) / 8) if code >> 3 & 15 else (code & 7) / 512)
    for code in range(256)
]


def truth(q: Tensor, latents: Tensor, slots: Tensor, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """Row by row, over the valid slots only; latents [num_slots, 576]."""
    q, latents = q.double(), latents.double()
    outs, lses = [], []
    for query, row in zip(q, slots.tolist(), strict=True):
        chosen = latents[[slot for slot in row if 0 <= slot < len(latents)]]
        scores = query @ chosen.T * scale
        outs.append(scores.softmax(-1) @ chosen[:, :512])
        lses.append(scores.logsumexp(-1))
    empty = q.new_empty(0, *q.shape[1:])
    return (
        torch.stack(outs) if outs else empty[..., :512],
        torch.stack(lses) if lses else empty[..., 0],
    )


def fp32_limit(q: Tensor, keys: Tensor, selected: int, scale: float = SCALE) -> float:
    """Of the error of fp32 attention to `selected` of these keys, whatever order its sums have.

    A sum of n terms that is added up one by one is off by up to sqrt(n) * 2^-24 of it, each of its
    roundings being independent. That of a score, scale * sqrt(n) * rms(q) * rms(keys), moves
    weights, and so the result, by that many times it; the sum over the selection adds its own.
    """
    rms = [math.sqrt(x.double().square().sum().item() / max(1, x.numel())) for x in (q, keys)]
    return 2.0**-24 * (scale * q.shape[-1] * math.prod(rms) + math.sqrt(selected))


def eager(q: Tensor, latents: Tensor, slots: Tensor, scale: float = SCALE) -> Tensor:
    """Attention in q's dtype, as transformers runs it."""
    valid = (slots >= 0) & (slots < len(latents))
    chosen = latents[torch.where(valid, slots, 0)].masked_fill(~valid[..., None], 0)
    scores = (q @ chosen.transpose(1, 2) * scale).masked_fill(~valid[:, None], -torch.inf)
    return scores.float().softmax(-1).nan_to_num(0).to(q.dtype) @ chosen[..., :512]


def lse_atol(form: str, dtype: torch.dtype) -> float:
    """Scores and lse are fp32 whatever the dtype is.

    But torch's flash attention has a shorter exponential for 16-bit inputs: 5e-5 seen.
    """
    return 1e-4 if form == "cpu" and dtype != torch.float32 else 1e-5


def check(
    out: Tensor, lse: Tensor, q: Tensor, latents: Tensor, slots: Tensor, form: str = "kernel"
) -> None:
    """At most EAGER of the error of eager attention in that precision, which rounds scores too."""
    expected, expected_lse = truth(q, latents, slots)
    if q.dtype == torch.float32:
        valid = slots[(slots >= 0) & (slots < len(latents))]
        limit = fp32_limit(q, latents[valid], slots.shape[1])
    else:
        eager_error = error(eager(q, latents.to(q.dtype), slots), expected).rms
        limit = min(RMS[q.dtype], EAGER[form] * eager_error)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert error(out, expected).rms <= limit
    atol = lse_atol(form, q.dtype)
    torch.testing.assert_close(lse.double(), expected_lse, atol=atol, rtol=2e-6)


def filled_cache(
    dtype: torch.dtype, blocks: int, block_size: int, used: Tensor, *, gap: int = 0
) -> tuple[Tensor, Tensor]:
    """A cache in which only `used` slots are written, and its slots' values [num_slots, 576]."""
    cache = make_latent_cache(dtype, blocks, block_size, gap=gap)
    values = torch.randn(blocks * block_size, 576).to(dtype)
    cache[used // block_size, used % block_size] = values[used]
    return cache, values


def filled_fp8_cache(
    dtype: torch.dtype, blocks: int, block_size: int, used: Tensor, *, gap: int = 0
) -> tuple[Tensor, Tensor]:
    """The same in 656 bytes, by the layout's definition; scales need not be powers of two."""
    cache = make_latent_cache(torch.uint8, blocks, block_size, gap=gap)
    values = torch.full((blocks * block_size, 576), torch.nan, dtype=torch.float64)
    table = torch.tensor(E4M3, dtype=torch.float64)
    for slot in used.tolist():
        codes = torch.randint(0, 256, (512,))
        codes[codes & 0x7F == 0x7F] = 0x40  # NaN
        scale = torch.rand(4) / 64 + 0.01
        rope = torch.randn(64).bfloat16()
        token = bytes(codes.tolist()) + struct.pack("<4f", *scale.tolist())
        cache[slot // block_size, slot % block_size, :528] = torch.tensor(list(token)).byte()
        cache[slot // block_size, slot % block_size, 528:] = rope.view(torch.uint8)
        exact = table[codes] * scale.double().repeat_interleave(128)
        values[slot] = torch.cat((exact.to(dtype).double(), rope.to(dtype).double()))
    return cache, values


def random_slots(rows: int, k: int, used: Tensor) -> Tensor:
    return torch.stack([used[torch.randperm(len(used))[:k]] for _ in range(rows)])
