"""Triton kernel of gather_latents: a request's latents out of its pages, side by side."""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_kernels.arch import Arch, arch_of
from dsa_kernels.dims import FP8_BLOCK, KV_LORA_RANK, LATENT_DIM, LATENT_FP8_BYTES
from dsa_kernels.launch import Launch, launch_config, strides
from dsa_kernels.primitives import load_block
from dsa_kernels.sparse_mla.kernel import load_nope, load_rope

_LATENT_DIM, _NOPE = tl.constexpr(LATENT_DIM), tl.constexpr(KV_LORA_RANK)
_GROUP = tl.constexpr(FP8_BLOCK)


def gather_latents(cache: Tensor, block_table_row: Tensor, latents: Tensor) -> None:
    """As the public function, into `latents`."""
    for launch in launches(cache, block_table_row, latents, arch_of(cache.device)):
        launch.run()


def launches(cache: Tensor, block_table_row: Tensor, latents: Tensor, arch: Arch) -> list[Launch]:
    keys = len(latents)
    if keys == 0:
        return []
    blocks, block_size, _ = cache.shape
    arguments = {
        "cache": cache,
        "block_table": block_table_row,
        "latents": latents,
        "num_keys": keys,
        "num_blocks": blocks,
        **strides("cache", cache, "bt"),
        **strides("block_table", block_table_row, "b"),
        "BLOCK_SIZE": block_size,
        "FP8": cache.dtype == torch.uint8,
        "HAS_E4M3": arch.has_e4m3,
    }
    config = launch_config("sparse_mla", arch, "gather")
    grid = (triton.cdiv(keys, config.blocks["BLOCK_TOKENS"]),)
    return [Launch(_gather_latents, grid, arguments, config)]


def compile_cases(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """Each kind of cache; of fp8 into each dtype."""
    keys = 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for fp8 in (False, True):
            width, cache_dtype = (LATENT_FP8_BYTES, torch.uint8) if fp8 else (LATENT_DIM, dtype)
            with torch.device("meta"):
                (launch,) = launches(
                    torch.empty(1000, 64, width, dtype=cache_dtype),
                    torch.empty(keys // 64, dtype=torch.int32),
                    torch.empty(keys, LATENT_DIM, dtype=dtype),
                    arch,
                )
            yield f"gather {name}{' from fp8' if fp8 else ''}", launch


@triton.jit(do_not_specialize=["block_table", "num_keys", "num_blocks"])
def _gather_latents(
    cache,
    block_table,
    latents,
    num_keys,
    num_blocks,
    cache_b,
    cache_t,
    block_table_b,
    BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """A run of tokens a program."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    real = token < num_keys
    block = load_block(block_table + token // BLOCK_SIZE * block_table_b, real, num_blocks)
    entry = block * cache_b + token % BLOCK_SIZE * cache_t
    dtype: tl.constexpr = latents.dtype.element_ty
    latent, mask = latents + token[:, None] * _LATENT_DIM, real[:, None]
    for group in tl.static_range(_NOPE // _GROUP):
        dim = group * _GROUP + tl.arange(0, _GROUP)[None, :]
        value = load_nope(cache, entry, real, group, dtype, FP8, HAS_E4M3)
        tl.store(latent + dim, value, mask=mask)
    rope_dim = tl.arange(0, _LATENT_DIM - _NOPE)[None, :]
    tl.store(latent + _NOPE + rope_dim, load_rope(cache, entry, real, dtype, FP8), mask=mask)
