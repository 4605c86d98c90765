"""The indexer's scores in fp64, index caches with known keys, and what both ops make of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_kernels.indexer_logits import indexer_logits, indexer_logits_paged, reference
from dsa_kernels.layout import index_fp8_views
from dsa_kernels.testing import error, make_block_table, make_index_cache, make_slots
from dsa_testbed.kernel_runs import DEVICE

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


def bound(
    q: Tensor, weights: Tensor, k: Tensor, k_scale: Tensor | None = None, form: str = "kernel"
) -> Tensor:
    """What rounding may do: fp32 sums of 128 exact products and of the heads.

    Kernels do the same for every dtype, but Hopper's tensor cores keep 14 bits of a sum of fp8
    products (DeepSeek-V3 report, section 3.3.2). The other forms round dot products to bf16 where
    the inputs are bf16 or fp8.
    """
    few_bits = form == "kernel" and q.dtype == FP8 and DEVICE.type == "cuda"
    size = truth(q.double().abs(), weights.abs(), k.double().abs(), k_scale)
    limit = (2.0**-13 if few_bits else 2.0**-20) * size
    if form != "kernel" and q.dtype in (torch.bfloat16, FP8):
        limit += 2.0**-8 * truth(q, weights.abs(), k, k_scale)
    return limit


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


def check_prefill(
    dtype: torch.dtype, rows: int, heads: int, keys: int, form: str = "kernel"
) -> None:
    q, weights, k = inputs(rows, heads, keys, dtype)
    scale = torch.rand(keys) + 0.5 if dtype == FP8 else None
    start = torch.randint(0, keys + 1, (rows,), dtype=torch.int32)
    end = torch.randint(0, keys + 1, (rows,), dtype=torch.int32)  # half of the ranges are empty
    start[:2], end[:2] = 0, keys
    result = indexer_logits(q, weights, k, start, end, k_scale=scale)
    expected = mask(truth(q, weights, k, scale), start, end)
    assert_within(result, expected, bound(q, weights, k, scale, form))
    if dtype == torch.float32:
        assert error(result, expected).rms < 1e-6


def check_paged(
    dtype: torch.dtype,
    block_size: int,
    next_n: int,
    heads: int,
    lengths: Sequence[int] = (1, 64, 65, 150),
    form: str = "kernel",
) -> None:
    """Requests that share two pages; gaps, unwritten tokens and the table's tail are garbage.

    No input is contiguous.
    """
    batch = len(lengths)
    blocks = sum(-(-length // block_size) for length in lengths) + 3
    cache = make_index_cache(torch.uint8 if dtype == FP8 else dtype, blocks, block_size, gap=1152)
    table = make_block_table([*lengths], block_size, blocks, shared=2).T.contiguous().T
    width = table.shape[1] * block_size
    for row, length in enumerate(lengths):
        k = torch.randn(length, 128).to(dtype)
        scale = torch.rand(length) + 0.5 if dtype == FP8 else None
        fill(cache, make_slots(table[row], torch.arange(length), block_size), k, scale)
    q = torch.randn(batch, heads, next_n, 200).to(dtype)[..., 40:168].transpose(1, 2)
    weights = torch.randn(heads, batch, next_n).permute(1, 2, 0)
    # Draft tokens see one more key each; a request's first rows may see nothing.
    context_lens = (torch.tensor(lengths)[:, None] - next_n + 1 + torch.arange(next_n)).clamp(min=0)
    lens = context_lens.int().repeat(1, 2)[:, :next_n]
    result = indexer_logits_paged(q, weights, cache, table, lens, width)
    result = result.view(batch, next_n, width)
    for row, length in enumerate(lengths):
        k, scale = reference.gather_index_keys(cache, table[row], length)
        expected = truth(q[row], weights[row], k, scale)
        expected = mask(expected, torch.zeros(next_n), context_lens[row])
        assert_within(
            result[row, :, :length], expected, bound(q[row], weights[row], k, scale, form)
        )
        assert (result[row, :, length:] == -torch.inf).all()
