"""Specification of indexer_logits in eager torch: all of it in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.layout import index_fp8_views
from dsa_kernels.workspace import TILE_BYTES


def indexer_logits(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    *,
    k_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    rows, heads, _ = q.shape
    keys = k.shape[0]
    if out is None:
        out = torch.empty(rows, keys, dtype=torch.float32, device=q.device)
    column = torch.arange(keys, dtype=torch.int32, device=q.device)
    step = max(1, TILE_BYTES // max(1, heads * keys * torch.float32.itemsize))
    for first in range(0, rows, step):
        tile = slice(first, first + step)
        products = (q[tile].float() @ k.float().T).relu_()
        logits = torch.bmm(weights[tile, None], products)[:, 0]
        if k_scale is not None:
            logits *= k_scale
        outside = (column < row_start[tile, None]) | (column >= row_end[tile, None])
        out[tile] = logits.masked_fill_(outside, -torch.inf)
    return out


def indexer_logits_paged(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    max_context_len: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    batch, next_n, _, _ = q.shape
    if out is None:
        out = torch.empty(batch * next_n, max_context_len, dtype=torch.float32, device=q.device)
    for request in range(batch):
        k, k_scale = gather_index_keys(cache, block_table[request], max_context_len)
        end = context_lens[request]
        rows = out[request * next_n : (request + 1) * next_n]
        indexer_logits(
            q[request], weights[request], k, torch.zeros_like(end), end, k_scale=k_scale, out=rows
        )
    return out


def gather_index_keys(
    cache: Tensor, block_table_row: Tensor, num_keys: int
) -> tuple[Tensor, Tensor | None]:
    blocks, block_size, _ = cache.shape
    pages = block_table_row[: -(-num_keys // block_size)].clamp(0, max(blocks - 1, 0))
    if cache.dtype != torch.uint8:
        return cache.index_select(0, pages).flatten(0, 1)[:num_keys], None
    key, scale = index_fp8_views(cache)
    key = key.view(torch.uint8).index_select(0, pages).flatten(0, 1)[:num_keys]
    return key.view(torch.float8_e4m3fn), scale.index_select(0, pages).flatten()[:num_keys]
