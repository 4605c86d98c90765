"""sparse_mla: decode of a batch, and a prefill chunk of one request, beside FlashMLA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from benchmark_case import Case, Run, Scale, peer_module
from torch import Tensor

from dsa_kernels.layout import LATENT_DIM, LATENT_FP8_BYTES
from dsa_kernels.sparse_mla import sparse_mla
from dsa_kernels.testing import sparse_mla_bytes, sparse_mla_flops

BLOCK_SIZE = 64
SOFTMAX_SCALE = 192**-0.5
# bf16 weights and results, rounded in another order than ours: twice the error of either.
TOLERANCE = 2.0**-7
FLASH_MLA = "vllm.third_party.flashmla.flash_mla_interface"


def cases(scale: Scale) -> Iterator[Case]:
    topk = 40 if scale.tiny else 2048
    heads = (16,) if scale.tiny else (128, 64, 16)
    for context in (128,) if scale.tiny else (8 << 10, 32 << 10, 128 << 10):
        for batch in (1,) if scale.tiny else (1, 8, 32, 128):
            for h in heads:
                yield _case(scale, "decode", batch, batch, context, h, topk, torch.uint8)
    chunk = 2 if scale.tiny else 4096
    for context in (128,) if scale.tiny else (32 << 10, 128 << 10):
        for h in heads:
            for dtype in (torch.bfloat16, torch.uint8):
                yield _case(scale, "prefill", 1, chunk, context, h, topk, dtype)


def _case(
    scale: Scale,
    step: str,
    requests: int,
    rows: int,
    context: int,
    heads: int,
    topk: int,
    cache_dtype: torch.dtype,
) -> Case:
    """`rows` queries spread evenly over `requests` contexts of `context` tokens."""
    nbytes = sparse_mla_bytes(rows, topk, cache_dtype)
    runs: list[Run] = []
    peer_runs: list[Run] = []
    flash_mla = peer_module(scale, FLASH_MLA)
    for _ in range(scale.copies(nbytes)):
        cache = _cache(requests * context // BLOCK_SIZE, cache_dtype, scale)
        q = torch.randn(rows, heads, LATENT_DIM, device=scale.device).bfloat16()
        slots = _slots(requests, rows // requests, context, topk, scale)
        out = torch.empty(rows, heads, 512, dtype=q.dtype, device=scale.device)
        runs.append(partial(_ours, q, cache, slots, out))
        peer_runs.append(partial(_flash_mla, flash_mla, q, cache, slots.int(), {}))
    kind = "fp8" if cache_dtype == torch.uint8 else "bf16"
    return Case(
        op="sparse_mla",
        name=f"{step} {context >> 10}K, {rows} rows, {heads} heads, {kind}",
        flops=sparse_mla_flops(rows, heads, topk),
        bytes=nbytes,
        runs=runs,
        peers={"FlashMLA": flash_mla if isinstance(flash_mla, str) else peer_runs},
        tolerance=TOLERANCE,
    )


def _ours(q: Tensor, cache: Tensor, slots: Tensor, out: Tensor) -> Tensor:
    return sparse_mla(q, cache, slots, SOFTMAX_SCALE, out=out)[0]


def _flash_mla(
    library: Any, q: Tensor, cache: Tensor, slots: Tensor, state: dict[str, Any]
) -> Tensor:
    """FlashMLA's prefill kernel for bf16, its decode kernel for fp8, one query a request."""
    if cache.dtype == torch.uint8:
        plan = state.setdefault("plan", library.get_mla_metadata()[0])
        out, _ = library.flash_mla_with_kvcache(
            q[:, None],
            cache[:, :, None],
            None,
            None,
            512,
            plan,
            softmax_scale=SOFTMAX_SCALE,
            is_fp8_kvcache=True,
            indices=slots[:, None],
        )
        result: Tensor = out[:, 0]
    else:
        latents = cache.view(-1, 1, LATENT_DIM)
        result = library.flash_mla_sparse_fwd(q, latents, slots[:, None], SOFTMAX_SCALE)[0]
    return result


def _cache(blocks: int, dtype: torch.dtype, scale: Scale) -> Tensor:
    """Pages drawn from at most 256 random ones; in fp8 scales are 1 and codes finite."""
    pages = min(blocks, 256)
    latent = torch.randn(pages, BLOCK_SIZE, LATENT_DIM, device=scale.device)
    if dtype == torch.uint8:
        packed = torch.empty(
            pages, BLOCK_SIZE, LATENT_FP8_BYTES, dtype=torch.uint8, device=scale.device
        )
        packed[..., :512] = latent[..., :512].to(torch.float8_e4m3fn).view(torch.uint8)
        packed[..., 512:528] = torch.ones_like(latent[..., :4]).view(torch.uint8)
        packed[..., 528:] = latent[..., 512:].bfloat16().view(torch.uint8)
        return packed[torch.randint(pages, (blocks,), device=scale.device)]
    return latent.to(dtype)[torch.randint(pages, (blocks,), device=scale.device)]


def _slots(requests: int, queries: int, context: int, topk: int, scale: Scale) -> Tensor:
    """[requests * queries, topk]: ascending random positions of each row, on random pages."""
    tables = torch.randperm(requests * context // BLOCK_SIZE, device=scale.device)
    tables = tables.view(requests, -1).repeat_interleave(queries, 0)
    rows = requests * queries
    position = torch.empty(rows, topk, dtype=torch.int64, device=scale.device)
    for row in range(rows):
        position[row] = torch.randperm(context, device=scale.device)[:topk].sort().values
    return tables.gather(1, position // BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE
