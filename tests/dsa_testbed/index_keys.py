"""The indexer's scores in fp64, and index caches with known keys."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.layout import index_fp8_views

FP8 = torch.float8_e4m3fn


def truth(q: Tensor, weights: Tensor, k: Tensor, k_scale: Tensor | None = None) -> Tensor:
    """sum_h relu(q . k) w, all [M, heads, N] at once, in fp64."""
    scores = torch.einsum("mhd,nd->mhn", q.double(), k.double()).relu()
    logits = torch.einsum("mhn,mh->mn", scores, weights.double())
    return logits if k_scale is None else logits * k_scale.double()


def mask(logits: Tensor, start: Tensor, end: Tensor) -> Tensor:
    column = torch.arange(logits.shape[1])
    outside = (column < start[:, None]) | (column >= end[:, None])
    return logits.masked_fill(outside, -torch.inf)


def assert_within(result: Tensor, expected: Tensor, limit: Tensor) -> None:
    inside = expected.isfinite()
    assert torch.equal(result[~inside].double(), expected[~inside])
    excess = ((result.double() - expected).abs() - limit)[inside]
    assert not (excess > 0).any(), f"bound exceeded by up to {excess.max()}"
    assert not result.isnan().any()


def inputs(rows: int, heads: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(rows, heads, 128).to(dtype), torch.randn(keys, 128).to(dtype)
    return q, torch.randn(rows, heads), k


def fill(cache: Tensor, slots: Tensor, k: Tensor, k_scale: Tensor | None) -> None:
    block, offset = slots // cache.shape[1], slots % cache.shape[1]
    if k_scale is None:
        cache[block, offset] = k
        return
    keys, scales = index_fp8_views(cache)
    keys.view(torch.uint8)[block, offset] = k.view(torch.uint8)
    scales[block, offset] = k_scale
