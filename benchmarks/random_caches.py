"""Caches, block tables and selections of benchmarks, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.dims import INDEX_FP8_BYTES, INDEX_HEAD_DIM, LATENT_DIM, LATENT_FP8_BYTES
from dsa_kernels.layout import index_fp8_views, latent_fp8_views

BLOCK_SIZE = 64
_DISTINCT = 256  # pages that are drawn; the others repeat them


def latent_cache(blocks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[blocks, 64, 576], or 656 bytes if dtype is uint8; there scales are 1."""
    pages = min(blocks, _DISTINCT)
    latent = torch.randn(pages, BLOCK_SIZE, LATENT_DIM, device=device)
    if dtype == torch.uint8:
        cache = torch.empty(pages, BLOCK_SIZE, LATENT_FP8_BYTES, dtype=dtype, device=device)
        nope, scale, rope = latent_fp8_views(cache)
        nope.copy_(latent[..., : nope.shape[-1]])
        scale.fill_(1)
        rope.copy_(latent[..., nope.shape[-1] :])
    else:
        cache = latent.to(dtype)
    return cache[torch.randint(pages, (blocks,), device=device)]


def index_cache(blocks: int, device: torch.device) -> Tensor:
    """[blocks, 64, 132] uint8: keys of unit variance, scales that are powers of two near 1."""
    pages = min(blocks, _DISTINCT)
    cache = torch.empty(pages, BLOCK_SIZE, INDEX_FP8_BYTES, dtype=torch.uint8, device=device)
    key, scale = index_fp8_views(cache)
    key.copy_(torch.randn(pages, BLOCK_SIZE, INDEX_HEAD_DIM, device=device))
    scale.copy_(torch.randint(-2, 3, scale.shape, device=device).exp2())
    return cache[torch.randint(pages, (blocks,), device=device)]


def block_table(requests: int, context: int, device: torch.device) -> Tensor:
    """[requests, context / 64] int32: each page once, in random order."""
    blocks = requests * context // BLOCK_SIZE
    return torch.randperm(blocks, device=device).view(requests, -1).int()


def selected_slots(table: Tensor, queries: int, topk: int) -> Tensor:
    """[requests * queries, topk] int64: slots of ascending random positions in each context."""
    tables = table.long().repeat_interleave(queries, 0)
    context = table.shape[1] * BLOCK_SIZE
    position = torch.empty(len(tables), topk, dtype=torch.int64, device=table.device)
    for row in position:
        row.copy_(torch.randperm(context, device=table.device)[:topk].sort().values)
    return tables.gather(1, position // BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE
