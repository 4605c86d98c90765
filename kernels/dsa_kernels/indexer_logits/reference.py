"""Specification of indexer_logits in eager torch.

Rounding: on a CPU, bf16 and fp8 inputs have each head's dot product (accumulated in fp32) rounded
to bf16 before the relu, because CPU matrix products return their inputs' dtype and fp32 ones run at
half the speed. Against the scores of unrounded inputs this adds less than a quarter to the error
that bf16 inputs have anyway, and it is a twentieth of fp8's (tests/test_indexer_logits.py). All
else is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.fp8 import decode_e4m3
from dsa_kernels.layout import INDEX_HEAD_DIM, index_fp8_views
from dsa_kernels.workspace import scratch

# A tile is [rows x heads, keys]: 2 MB of bf16 products and 4 MB of fp32 ones stay in the cache.
_TILE_QUERIES = 1024
_TILE_ELEMENTS = 1024 * 1024


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
    dtype = _product_dtype(q)
    k = _convert(k, dtype)
    column = torch.arange(keys, dtype=torch.int32, device=q.device)
    row_step, key_step = _tile(rows, heads)
    for first in range(0, rows, row_step):
        tile = slice(first, first + row_step)
        start, end = row_start[tile, None], row_end[tile, None]
        low, high = _bounds(start, end, keys)
        logits = out[tile]
        logits[:, :low] = -torch.inf
        logits[:, high:] = -torch.inf
        query = _convert(q[tile], dtype).reshape(-1, INDEX_HEAD_DIM)
        for first_key in range(low, high, key_step):
            part = slice(first_key, min(first_key + key_step, high))
            scale = None if k_scale is None else k_scale[part]
            outside = (column[part] < start) | (column[part] >= end)
            _score(query, weights[tile], k[part], scale, outside, logits[:, part])
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
    batch, next_n, heads, _ = q.shape
    if out is None:
        out = torch.empty(batch * next_n, max_context_len, dtype=torch.float32, device=q.device)
    dtype = _product_dtype(q)
    column = torch.arange(max_context_len, dtype=torch.int32, device=q.device)
    block_size = cache.shape[1]
    row_step, key_step = _tile(next_n, heads)
    key_step = max(1, key_step // block_size) * block_size
    for request in range(batch):
        for first in range(0, next_n, row_step):
            rows = slice(first, min(first + row_step, next_n))
            logits = out[request * next_n + rows.start : request * next_n + rows.stop]
            end = context_lens[request, rows, None]
            _, high = _bounds(torch.zeros_like(end), end, max_context_len)
            logits[:, high:] = -torch.inf
            query = _convert(q[request, rows], dtype).reshape(-1, INDEX_HEAD_DIM)
            for first_key in range(0, high, key_step):
                part = slice(first_key, min(first_key + key_step, high))
                pages = block_table[request, first_key // block_size : -(-part.stop // block_size)]
                k, scale = gather_index_keys(cache, pages, part.stop - first_key)
                outside = column[part] >= end
                weight = weights[request, rows]
                _score(query, weight, _convert(k, dtype), scale, outside, logits[:, part])
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


def _product_dtype(q: Tensor) -> torch.dtype:
    half = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float8_e4m3fn)
    return torch.bfloat16 if half else torch.float32


def _convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    return decode_e4m3(x, torch.empty(x.shape, dtype=dtype, device=x.device))


def _tile(rows: int, heads: int) -> tuple[int, int]:
    row_step = max(1, min(rows, _TILE_QUERIES // heads))
    return row_step, max(1, min(8192, _TILE_ELEMENTS // (row_step * heads)))


def _bounds(start: Tensor, end: Tensor, keys: int) -> tuple[int, int]:
    """A range that holds every row's range. Off the CPU, reading it would sync: all keys."""
    if start.device.type != "cpu" or start.numel() == 0:
        return 0, keys
    low, high = max(0, int(start.min())), min(keys, int(end.max()))
    return (low, high) if low < high else (keys, keys)


def _score(
    query: Tensor,
    weights: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    outside: Tensor,
    out: Tensor,
) -> None:
    """One tile: query [rows x heads, 128] against k [keys, 128] into out [rows, keys]."""
    rows, heads = weights.shape
    shape = (rows * heads, k.shape[0])
    products = scratch("products", shape, query.dtype, query.device)
    torch.mm(query, k.T, out=products)
    if products.dtype != torch.float32:
        products = scratch("products", shape, torch.float32, query.device).copy_(products)
    products = products.relu_().view(rows, heads, -1)
    # Not summed into `out` itself: into a strided result this product is three times slower.
    logits = torch.bmm(weights[:, None], products)[:, 0]
    if k_scale is not None:
        logits *= k_scale
    out.copy_(logits.masked_fill_(outside, -torch.inf))
