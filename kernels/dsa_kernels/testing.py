"""Inputs, caches, counts and error measures that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_kernels.dims import (
    INDEX_FP8_BYTES,
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    LATENT_DIM,
    LATENT_FP8_BYTES,
    ROPE_DIM,
    index_bytes_per_token,
    latent_bytes_per_token,
)

POISON = 0xFF  # as bytes: NaN in e4m3 and in every wider float


@dataclass(frozen=True)
class Model:
    """The sizes of a model that its attention's ops see, by the names of config.json."""

    num_attention_heads: int
    head_dim: int
    """qk_nope_head_dim + qk_rope_head_dim."""
    v_head_dim: int
    index_n_heads: int


V32 = Model(num_attention_heads=128, head_dim=192, v_head_dim=128, index_n_heads=64)
GLM_5 = Model(num_attention_heads=64, head_dim=256, v_head_dim=256, index_n_heads=32)
INDEX_TOPK = 2048  # of both


def make_cos_sin_cache(
    max_position: int, *, theta: float = 1e4, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[max_position, 64]: 32 cosines then 32 sines, plain RoPE frequencies."""
    half = ROPE_DIM // 2
    frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(max_position, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1).to(dtype)


def make_cache(
    width: int,
    dtype: torch.dtype,
    num_blocks: int,
    block_size: int,
    *,
    gap: int = 0,
) -> Tensor:
    """A cache as a host lays it out: a strided view whose every byte, gaps too, is poison.

    Args:
        width: values a token: 576 or 128, in fp8 656 or 132 bytes.
        dtype: of the view; uint8 is fp8.
        num_blocks: pages.
        block_size: tokens a page.
        gap: bytes between pages, a multiple of 4 (another layer's cache).
    """
    page = block_size * width * dtype.itemsize
    storage = torch.full((num_blocks * (page + gap) + gap,), POISON, dtype=torch.uint8)
    size = dtype.itemsize
    return storage.view(dtype).as_strided(
        (num_blocks, block_size, width), ((page + gap) // size, width, 1), gap // size
    )


def make_latent_cache(
    dtype: torch.dtype, num_blocks: int, block_size: int, *, gap: int = 0
) -> Tensor:
    """A poisoned latent cache; uint8 is fp8_ds_mla."""
    width = LATENT_FP8_BYTES if dtype == torch.uint8 else LATENT_DIM
    return make_cache(width, dtype, num_blocks, block_size, gap=gap)


def make_index_cache(
    dtype: torch.dtype, num_blocks: int, block_size: int, *, gap: int = 0
) -> Tensor:
    """A poisoned index-key cache; uint8 is the block-split fp8 layout."""
    width = INDEX_FP8_BYTES if dtype == torch.uint8 else INDEX_HEAD_DIM
    return make_cache(width, dtype, num_blocks, block_size, gap=gap)


def make_block_table(
    lengths: list[int], block_size: int, num_blocks: int, *, shared: int = 0
) -> Tensor:
    """[requests, max_blocks] int32: random distinct pages, garbage past each request's end.

    Args:
        lengths: tokens of each request.
        block_size: tokens a page.
        num_blocks: pages there are to choose from.
        shared: leading pages that all requests have in common (a cached prefix).
    """
    need = [-(-length // block_size) for length in lengths]
    pages = iter(torch.randperm(num_blocks).tolist())
    prefix = [next(pages) for _ in range(shared)]
    table = torch.full((len(lengths), max(need, default=0)), 2**30, dtype=torch.int32)
    for row, blocks in enumerate(need):
        own = [next(pages) for _ in range(max(0, blocks - shared))]
        table[row, :blocks] = torch.tensor((prefix + own)[:blocks], dtype=torch.int32)
    return table


def make_slots(block_table_row: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """[T] int64 slots of one request's tokens."""
    return block_table_row[positions // block_size].long() * block_size + positions % block_size


@dataclass(frozen=True)
class Error:
    """How far a result is from the truth, both relative to the truth's root mean square."""

    rms: float
    max: float


def error(result: Tensor, truth: Tensor) -> Error:
    """Compare with fp64 over the finite entries; raises AssertionError where only one is finite."""
    result, truth = result.double(), truth.double()
    finite = truth.isfinite()
    if not torch.equal(finite, result.isfinite()) or not torch.equal(
        result[~finite], truth[~finite]
    ):
        raise AssertionError("infinities or NaNs differ from the truth's")
    if not finite.any():
        return Error(0.0, 0.0)
    difference, scale = (result - truth)[finite], truth[finite].square().mean().sqrt()
    scale = scale if scale > 0 else torch.ones_like(scale)
    return Error(
        (difference.square().mean().sqrt() / scale).item(), (difference.abs().max() / scale).item()
    )


def indexer_flops(rows: int, heads: int, keys: int) -> int:
    """Multiply-adds of the dot products, counted as two; keys is the average over the rows."""
    return 2 * rows * heads * keys * INDEX_HEAD_DIM


def indexer_bytes(rows: int, requests: int, keys: int, cache_dtype: torch.dtype) -> int:
    """Least traffic: each request's keys once, each logit once."""
    return requests * keys * index_bytes_per_token(cache_dtype.itemsize) + 4 * rows * keys


def sparse_mla_flops(rows: int, heads: int, k: int) -> int:
    """Both products: 576 wide for the scores, 512 for the values."""
    return 2 * rows * heads * k * (LATENT_DIM + KV_LORA_RANK)


def sparse_mla_bytes(rows: int, k: int, cache_dtype: torch.dtype) -> int:
    """Least traffic without reuse between rows: each selected latent once."""
    return rows * k * latent_bytes_per_token(cache_dtype.itemsize)
