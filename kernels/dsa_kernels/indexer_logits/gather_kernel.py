"""Triton kernel of gather_index_keys: a request's keys out of its pages, side by side."""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_kernels.arch import Arch, arch_of
from dsa_kernels.dims import INDEX_FP8_BYTES, INDEX_HEAD_DIM
from dsa_kernels.launch import Launch, launch_config, strides
from dsa_kernels.primitives import load_block

_HEAD_DIM = tl.constexpr(INDEX_HEAD_DIM)


def gather_index_keys(
    cache: Tensor, block_table_row: Tensor, k: Tensor, k_scale: Tensor | None
) -> None:
    """As the public function, into k, in fp8 as bytes, and k_scale."""
    for launch in launches(cache, block_table_row, k, k_scale, arch_of(cache.device)):
        launch.run()


def launches(
    cache: Tensor, block_table_row: Tensor, k: Tensor, k_scale: Tensor | None, arch: Arch
) -> list[Launch]:
    keys = len(k)
    if keys == 0:
        return []
    blocks, block_size, _ = cache.shape
    arguments = {
        "cache": cache,
        "block_table": block_table_row,
        "k": k,
        "k_scale": k_scale,
        "num_keys": keys,
        "num_blocks": blocks,
        "cache_b": cache.stride(0),
        "cache_t": cache.stride(1) if k_scale is None else INDEX_HEAD_DIM,
        **strides("block_table", block_table_row, "b"),
        "BLOCK_SIZE": block_size,
    }
    config = launch_config("indexer_logits", arch, "gather")
    grid = (triton.cdiv(keys, config.blocks["BLOCK_TOKENS"]),)
    return [Launch(_gather, grid, arguments, config)]


def compile_cases(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """Each kind of cache."""
    keys = 8192
    for dtype in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
        fp8 = dtype == torch.uint8
        with torch.device("meta"):
            cache = torch.empty(1000, 64, INDEX_FP8_BYTES if fp8 else INDEX_HEAD_DIM, dtype=dtype)
            (launch,) = launches(
                cache,
                torch.empty(keys // 64, dtype=torch.int32),
                torch.empty(keys, INDEX_HEAD_DIM, dtype=dtype),
                torch.empty(keys) if fp8 else None,
                arch,
            )
        yield f"gather {'fp8' if fp8 else str(dtype).removeprefix('torch.')}", launch


@triton.jit(do_not_specialize=["block_table", "num_keys", "num_blocks"])
def _gather(
    cache,
    block_table,
    k,
    k_scale,
    num_keys,
    num_blocks,
    cache_b,
    cache_t,
    block_table_b,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """A run of tokens a program."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = token < num_keys
    block = load_block(block_table + token // BLOCK_SIZE * block_table_b, is_token, num_blocks)
    page, slot = cache + block * cache_b, token % BLOCK_SIZE
    dim = tl.arange(0, _HEAD_DIM)[None, :]
    key = tl.load(page[:, None] + slot[:, None] * cache_t + dim, mask=is_token[:, None])
    tl.store(k + token[:, None] * _HEAD_DIM + dim, key, mask=is_token[:, None])
    if k_scale is not None:
        scales = (page + BLOCK_SIZE * _HEAD_DIM).to(tl.pointer_type(tl.float32))
        tl.store(k_scale + token, tl.load(scales + slot, mask=is_token), mask=is_token)
