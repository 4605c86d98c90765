"""indexer_logits on a CPU: matrix products of tiles, then one pass over them.

Rounding: bf16 and fp8 inputs have each head's dot product (accumulated in fp32) rounded to bf16
before the relu, because CPU matrix products return their inputs' dtype, and fp32 ones run at half
the speed or less. Against the scores of unrounded inputs this adds less than a quarter to the error
that bf16 inputs have anyway, and it is a twentieth of fp8's (tests/ops/test_indexer_logits.py). All
else is fp32.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache as once
from typing import cast

import torch
from torch import Tensor

from dsa_kernels.dims import INDEX_HEAD_DIM
from dsa_kernels.fp8 import decode_e4m3
from dsa_kernels.indexer_logits.reference import gather_index_keys
from dsa_kernels.workspace import scratch

# A tile is [rows x heads, keys]: 4 MB of bf16 products.
_TILE_QUERIES = 2048
_TILE_ELEMENTS = 2048 * 1024


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
    if out is None:
        out = torch.empty(q.shape[0], k.shape[0], dtype=torch.float32)
    _score_rows(q, weights, k, k_scale, row_start, row_end, out)
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
        out = torch.empty(batch * next_n, max_context_len, dtype=torch.float32)
    for request in range(batch):
        end = context_lens[request]
        num_keys = min(int(end.max()), max_context_len)
        k, k_scale = gather_index_keys(cache, block_table[request], num_keys)
        rows = out[request * next_n : (request + 1) * next_n]
        rows[:, num_keys:] = -torch.inf
        _score_rows(
            q[request],
            weights[request],
            k,
            k_scale,
            torch.zeros_like(end),
            end,
            rows[:, :num_keys],
        )
    return out


@torch.no_grad()  # as hosts serve: compiled code holds for the gradient mode it was compiled in
def warm_up() -> None:
    """Compile both forms of the sum over heads: of one row and of several."""
    query, k = torch.zeros(8, INDEX_HEAD_DIM).bfloat16(), torch.zeros(16, INDEX_HEAD_DIM).bfloat16()
    for rows in (1, 2):
        _score(query, torch.zeros(rows, 8 // rows), k)


def _score_rows(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    row_start: Tensor,
    row_end: Tensor,
    out: Tensor,
) -> None:
    """q [rows, heads, 128] against k [keys, 128] into out [rows, keys]."""
    rows, heads, _ = q.shape
    keys = k.shape[0]
    dtype = torch.bfloat16 if q.dtype in (torch.bfloat16, torch.float8_e4m3fn) else torch.float32
    k = _convert(k, dtype)
    row_step = max(1, min(rows, _TILE_QUERIES // heads))
    key_step = max(1, _TILE_ELEMENTS // (row_step * heads))
    for first in range(0, rows, row_step):
        tile = slice(first, first + row_step)
        query = _convert(q[tile], dtype).reshape(-1, INDEX_HEAD_DIM)
        start, end, logits = row_start[tile], row_end[tile], out[tile]
        for first_key in range(max(0, int(start.min())), min(keys, int(end.max())), key_step):
            part = slice(first_key, first_key + key_step)
            scores = _score(query, weights[tile], k[part])
            if k_scale is not None:
                scores *= k_scale[part]
            logits[:, part] = scores
        _mask(logits, start, end)


def _score(query: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """query [rows x heads, 128], weights [rows, heads], k [keys, 128] -> [rows, keys] fp32."""
    rows, heads = weights.shape
    products = scratch("products", (rows * heads * k.shape[0],), query.dtype, query.device)
    if rows == 1:  # with few left rows a matrix product runs at half the speed
        products = torch.mm(k, query.T, out=products.view(-1, heads)).T[None]
    else:
        products = torch.mm(query, k.T, out=products.view(rows * heads, -1)).view(rows, heads, -1)
    return _sum_over_heads(products, weights)


def _mask(logits: Tensor, start: Tensor, end: Tensor) -> None:
    """-inf outside each row's range; columns inside all of them are not touched."""
    keys = logits.shape[1]
    column = torch.arange(keys, dtype=torch.int32)
    head, tail = max(0, int(start.max())), min(max(0, int(end.min())), keys)
    logits[:, :head].masked_fill_(column[:head] < start[:, None], -torch.inf)
    logits[:, tail:].masked_fill_(column[tail:] >= end[:, None], -torch.inf)


def _convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    # Values are read in pairs.
    x = x.clone(memory_format=torch.contiguous_format) if x.storage_offset() % 2 else x.contiguous()
    return decode_e4m3(x, torch.empty(x.shape, dtype=dtype))


def _sum_over_heads(products: Tensor, weights: Tensor) -> Tensor:
    """products [rows, heads, keys], destroyed, and weights [rows, heads] -> [rows, keys] fp32."""
    if products.dtype == torch.bfloat16 and _has_compiler():
        return _compiled()(products, weights)
    products.relu_()
    if products.dtype != torch.float32:
        shape = tuple(products.shape)
        products = scratch("fp32 products", shape, torch.float32, weights.device).copy_(products)
    return torch.bmm(weights[:, None], products)[:, 0]


@once
def _has_compiler() -> bool:
    """torch.compile writes C++ for CPUs."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


@once
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """relu, conversion, product and sum in one pass over the bf16 products: four times as fast."""

    def weighted_relu_sum(products: Tensor, weights: Tensor) -> Tensor:
        return (products.float().relu() * weights[..., None]).sum(1)

    return cast(
        "Callable[[Tensor, Tensor], Tensor]", torch.compile(weighted_relu_sum, dynamic=True)
    )
