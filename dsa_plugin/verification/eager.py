"""The same layer by the ops' eager forms: its errors against fp64 say what rounding costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_kernels.cache_write import reference as cache_write
from dsa_kernels.dims import (
    INDEX_FP8_BYTES,
    INDEX_HEAD_DIM,
    INDEX_PAGE,
    KV_LORA_RANK,
    LATENT_DIM,
    LATENT_FP8_BYTES,
    ROPE_DIM,
)
from dsa_kernels.indexer_logits import reference as indexer_logits
from dsa_kernels.sparse_mla import reference as sparse_mla
from dsa_plugin import attention
from dsa_plugin.verification.inputs import Request


@dataclass(frozen=True)
class Eager:
    """[L, 576] and [L, 128] fp32 of the caches, and scores [R, L], -inf of what a row sees not."""

    latents: Tensor
    keys: Tensor | None
    scores: Tensor | None


def run(
    mla: attention.MLAWeights, indexer: attention.Indexer | None, request: Request, fp8: bool
) -> tuple[Eager, Tensor]:
    """What the caches hold and the scores; and the latent cache, for `attend`."""
    length, device = len(request.kv), request.kv.device
    positions = torch.arange(length, device=device)
    pages = torch.arange(-(-length // INDEX_PAGE), device=device)
    dtype = torch.uint8 if fp8 else request.kv.dtype

    def cache(width: int, fp8_bytes: int) -> Tensor:
        shape = (len(pages), INDEX_PAGE, fp8_bytes if fp8 else width)
        return torch.zeros(shape, dtype=dtype, device=device)

    latent_cache = cache(LATENT_DIM, LATENT_FP8_BYTES)
    cache_write.latent_cache_write(
        request.kv, mla.kv_norm, mla.rope, positions, latent_cache, positions
    )
    latents = sparse_mla.gather_latents(latent_cache, pages, length, torch.float32)
    if indexer is None or request.keys is None:
        return Eager(latents, None, None), latent_cache
    assert request.index_q is not None
    assert request.index_weights is not None
    key_cache = cache(INDEX_HEAD_DIM, INDEX_FP8_BYTES)
    cache_write.index_cache_write(
        request.keys, indexer.k_norm, indexer.rope, positions, key_cache, positions, hadamard=fp8
    )
    k, scale = indexer_logits.gather_index_keys(key_cache, pages, length)
    q, weights = cache_write.index_query(
        request.index_q, request.index_weights, indexer.rope, request.rows, hadamard=fp8, fp8=fp8
    )
    end = request.rows.int() + 1
    scores = indexer_logits.indexer_logits(q, weights, k, torch.zeros_like(end), end, k_scale=scale)
    keys = k.float() if scale is None else k.float() * scale[:, None]
    return Eager(latents, keys, scores), latent_cache


def attend(
    mla: attention.MLAWeights, request: Request, latent_cache: Tensor, topk_indices: Tensor
) -> Tensor:
    """[R, heads, v_head_dim]: the rows over what they selected."""
    q = request.q
    query = q.new_empty(*q.shape[:2], LATENT_DIM)
    nope, pe = q[..., :-ROPE_DIM], q[..., -ROPE_DIM:]
    query[..., :KV_LORA_RANK] = torch.bmm(nope.transpose(0, 1), mla.w_uk).transpose(0, 1)
    query[..., KV_LORA_RANK:] = cache_write.apply_rope(pe, mla.rope, request.rows)
    out = q.new_empty(*q.shape[:2], KV_LORA_RANK)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    slots = topk_indices.long()
    sparse_mla.sparse_mla(query, latent_cache, slots, None, mla.softmax_scale, out, lse)
    return torch.bmm(out.transpose(0, 1), mla.w_uv).transpose(0, 1)
