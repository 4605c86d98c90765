"""Latent caches with known contents, selections of them, and the fp64 attention over those."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from dsa_kernels.testing import make_latent_cache

SCALE = 192**-0.5
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


def eager(q: Tensor, latents: Tensor, slots: Tensor, scale: float = SCALE) -> Tensor:
    """Attention in q's dtype, as transformers runs it; every slot valid."""
    chosen = latents[slots]
    scores = q @ chosen.transpose(1, 2) * scale
    return scores.float().softmax(-1).to(q.dtype) @ chosen[..., :512]


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
