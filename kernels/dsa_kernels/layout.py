"""Byte layouts of the two paged caches: the one definition that every reader and writer uses.

Their sizes are numbers of `dims.py`.

A cache is a strided view that the host allocated: `cache[block, offset]` is one token's entry,
blocks may lie further apart than their size (another layer's cache in between), and only a page is
dense.

Latent cache, MLA's compressed KV (512 values after RMSNorm, then 64 RoPE values):
    float   [num_blocks, block_size, 576]
    fp8     [num_blocks, block_size, 656] uint8, each token: 512 e4m3 | 4 fp32 scales, one per 128
            values | 64 bf16 RoPE values (vLLM's and FlashMLA's "fp8_ds_mla")
Index-key cache, the lightning indexer's single key head (64 RoPE values first, then 64 without):
    float   [num_blocks, block_size, 128]
    fp8     [num_blocks, block_size, 132] uint8, each page split: block_size x 128 e4m3, then
            block_size fp32 scales (DeepGEMM's paged layout); the token axis is nominal only
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from dsa_kernels.dims import (
    INDEX_FP8_BYTES,
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    LATENT_DIM,
    LATENT_FP8_BYTES,
    LATENT_SCALES,
)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_latent_cache(cache: Tensor) -> None:
    """Raise ValueError unless `cache` is a latent cache in one of the two layouts."""
    _check_dtype("latent cache", cache.dtype)
    width = LATENT_FP8_BYTES if cache.dtype == torch.uint8 else LATENT_DIM
    _check_pages("latent cache", cache, width)
    if cache.dtype == torch.uint8:
        _check_alignment("latent cache", cache, (cache.stride(0), cache.stride(1)))


def check_index_cache(cache: Tensor) -> None:
    """Raise ValueError unless `cache` is an index-key cache in one of the two layouts."""
    _check_dtype("index cache", cache.dtype)
    width = INDEX_FP8_BYTES if cache.dtype == torch.uint8 else INDEX_HEAD_DIM
    _check_pages("index cache", cache, width)
    if cache.dtype == torch.uint8:
        if cache.stride(1) != width:
            raise ValueError(
                f"index cache: tokens of an fp8 page lie {cache.stride(1)} bytes apart; the page "
                f"is block-split and must be dense, so its token stride must be {width}"
            )
        _check_alignment("index cache", cache, (cache.stride(0),))


def latent_fp8_views(cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Typed views of an fp8 latent cache; nothing is copied.

    Args:
        cache: [num_blocks, block_size, 656] uint8.

    Returns:
        nope [num_blocks, block_size, 512] float8_e4m3fn, scale [num_blocks, block_size, 4] fp32,
        rope [num_blocks, block_size, 64] bf16.
    """
    scales_end = KV_LORA_RANK + 4 * LATENT_SCALES
    return (
        cache[..., :KV_LORA_RANK].view(torch.float8_e4m3fn),
        cache[..., KV_LORA_RANK:scales_end].view(torch.float32),
        cache[..., scales_end:].view(torch.bfloat16),
    )


def index_fp8_views(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Typed views of an fp8 index-key cache; nothing is copied.

    Args:
        cache: [num_blocks, block_size, 132] uint8, pages dense.

    Returns:
        key [num_blocks, block_size, 128] float8_e4m3fn, scale [num_blocks, block_size] fp32.
    """
    blocks, block_size, _ = cache.shape
    page, start = cache.stride(0), cache.storage_offset()
    keys = block_size * INDEX_HEAD_DIM
    key = cache.as_strided((blocks, block_size, INDEX_HEAD_DIM), (page, INDEX_HEAD_DIM, 1), start)
    scale = cache.as_strided((blocks, 4 * block_size), (page, 1), start + keys)
    return key.view(torch.float8_e4m3fn), scale.view(torch.float32)


def token_rows(cache: Tensor) -> tuple[Tensor, int, int]:
    """The tokens of a strided cache as rows of one matrix, so that one index_select gathers them.

    Rows may overlap and include the gaps between blocks: for reading, at the returned row numbers
    only.

    Args:
        cache: [num_blocks, block_size, width], last stride 1.

    Returns:
        rows [_, width], and the strides, in rows, of a block and of a token.
    """
    blocks, block_size, width = cache.shape
    block, token = cache.stride(0), cache.stride(1)
    unit = gcd(block, token) or width
    last = (max(blocks, 1) - 1) * block + (max(block_size, 1) - 1) * token
    rows = cache.as_strided((last // unit + 1, width), (unit, 1))
    return rows, block // unit, token // unit


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype != torch.uint8 and dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name}: dtype {dtype} is not supported; use float32, bfloat16, float16, or uint8 for "
            "the fp8 layout"
        )


def _check_pages(name: str, cache: Tensor, width: int) -> None:
    if cache.dim() != 3 or cache.shape[2] != width:
        raise ValueError(
            f"{name}: shape {tuple(cache.shape)}; for {cache.dtype} it must be "
            f"[num_blocks, block_size, {width}]"
        )
    if cache.stride(2) != 1:
        raise ValueError(
            f"{name}: values of a token lie {cache.stride(2)} elements apart; "
            "the last stride must be 1"
        )


def _check_alignment(name: str, cache: Tensor, strides: tuple[int, ...]) -> None:
    if any(stride % 4 for stride in strides) or cache.storage_offset() % 4:
        raise ValueError(
            f"{name}: strides {tuple(cache.stride())}, offset {cache.storage_offset()} in bytes; "
            "an fp8 cache holds fp32 scales, so each must be a multiple of 4"
        )
