"""Specification of sparse_mla in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.dims import FP8_BLOCK, KV_LORA_RANK, LATENT_DIM
from dsa_kernels.layout import latent_fp8_views
from dsa_kernels.workspace import TILE_BYTES


def sparse_mla(
    q: Tensor,
    cache: Tensor,
    slots: Tensor,
    topk_length: Tensor | None,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    rows, k = slots.shape
    if k == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    step = max(1, TILE_BYTES // (k * LATENT_DIM * torch.float32.itemsize))
    for first in range(0, rows, step):
        tile = slice(first, first + step)
        valid = (slots[tile] >= 0) & (slots[tile] < cache.shape[0] * cache.shape[1])
        if topk_length is not None:
            valid &= torch.arange(k, device=slots.device) < topk_length[tile, None]
        slot = torch.where(valid, slots[tile], 0)
        token = cache[slot // cache.shape[1], slot % cache.shape[1]]
        latent = _dequantise(token, q.dtype).float()
        # An ignored latent may be NaN, which a weight of zero would not remove.
        latent.masked_fill_(~valid[..., None], 0)

        scores = q[tile].float() @ latent.transpose(1, 2) * softmax_scale
        scores.masked_fill_(~valid[:, None], -torch.inf)
        lse[tile] = scores.logsumexp(-1)
        empty = ~valid.any(-1)[:, None, None]
        weights = (scores - scores.amax(-1, keepdim=True).masked_fill(empty, 0)).exp()
        total = weights.sum(-1, keepdim=True)
        attended = weights.to(q.dtype).float() @ latent[..., :KV_LORA_RANK] / total
        out[tile] = attended.masked_fill(empty, 0)


def masked_mha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_indices: Tensor,
    softmax_scale: float,
    out: Tensor,
) -> None:
    rows, heads, _ = q.shape
    keys = k.shape[1]
    step = max(1, TILE_BYTES // max(1, heads * keys * torch.float32.itemsize))
    for first in range(0, rows, step):
        tile = slice(first, first + step)
        masked = ~selection(topk_indices[tile], keys)
        scores = q[tile].float().transpose(0, 1) @ k.float().transpose(1, 2) * softmax_scale
        weights = scores.masked_fill_(masked, -torch.inf).softmax(-1).nan_to_num_(0)
        out[tile] = (weights.to(q.dtype).float() @ v.float()).transpose(0, 1)


def selection(topk_indices: Tensor, keys: int) -> Tensor:
    """[T, k] indices, negative ones ignored -> [T, keys] bool."""
    selected = torch.zeros(
        topk_indices.shape[0], keys + 1, dtype=torch.bool, device=topk_indices.device
    )
    column = torch.where(topk_indices < 0, keys, topk_indices).long()
    return selected.scatter_(1, column, True)[:, :keys]


def gather_latents(
    cache: Tensor, block_table_row: Tensor, num_keys: int, dtype: torch.dtype
) -> Tensor:
    blocks, block_size, _ = cache.shape
    pages = block_table_row[: -(-num_keys // block_size)].clamp(0, max(blocks - 1, 0))
    return _dequantise(cache[pages].flatten(0, 1)[:num_keys], dtype)


def _dequantise(token: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., 576] as it is; [..., 656] uint8 -> [..., 576]; a value times its scale rounds once."""
    if token.dtype != torch.uint8:
        return token
    nope, scale, rope = latent_fp8_views(token)
    nope = (nope.float().unflatten(-1, (-1, FP8_BLOCK)) * scale[..., None]).flatten(-2)
    return torch.cat((nope.to(dtype), rope.to(dtype)), -1)
