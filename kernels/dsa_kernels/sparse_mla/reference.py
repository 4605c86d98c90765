"""Specification of sparse_mla in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.fp8 import decode_e4m3
from dsa_kernels.layout import (
    FP8_BLOCK,
    KV_LORA_RANK,
    LATENT_DIM,
    LATENT_SCALES,
    latent_fp8_views,
    token_rows,
)
from dsa_kernels.workspace import TILE_BYTES, scratch

_PIECE = 512  # latents converted to fp32 at a time: 1.2 MB, about a core's second-level cache


def sparse_mla(
    q: Tensor,
    cache: Tensor,
    slots: Tensor,
    topk_length: Tensor | None,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    rows = q.shape[0]
    k = slots.shape[1]
    if k == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    step = max(1, TILE_BYTES // (k * LATENT_DIM * torch.float32.itemsize))
    # Slots are looked at in larger pieces than latents: they are smaller.
    chunk = step * max(1, TILE_BYTES // (step * k * LATENT_DIM))
    for chunk_start in range(0, rows, chunk):
        piece = slice(chunk_start, chunk_start + chunk)
        length = None if topk_length is None else topk_length[piece, None]
        chosen, valid = _readable(slots[piece], length, cache)
        widths = _widths(valid)
        for offset in range(0, valid.shape[0], step):
            width = max(widths[offset : offset + step])
            piece = slice(offset, min(offset + step, valid.shape[0]))
            tile = slice(chunk_start + piece.start, chunk_start + piece.stop)
            if width == 0:
                out[tile], lse[tile] = 0, -torch.inf
                continue
            latent = _gather(cache, chosen[piece, :width], q.dtype)
            _attend(q[tile], latent, valid[piece, :width], softmax_scale, out[tile], lse[tile])


def _readable(slots: Tensor, length: Tensor | None, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Slots with every ignored entry replaced by one that is not, and which were not ignored.

    The replacement is of the same row: a latent of an unwritten page may be NaN, which survives a
    weight of zero.
    """
    valid = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])
    if length is not None:
        valid &= torch.arange(slots.shape[1], device=slots.device) < length
    kept = torch.where(valid, slots, 0)
    return torch.where(valid, kept, kept.amax(1, keepdim=True)), valid


def _widths(valid: Tensor) -> list[int]:
    """Columns of each row up to its last valid one; all off the CPU, where reading would sync."""
    rows, k = valid.shape
    if valid.device.type != "cpu":
        return [k] * rows
    last = torch.where(valid, torch.arange(1, k + 1, dtype=torch.int32), 0).amax(1)
    return [int(width) for width in last.tolist()]


def _gather(cache: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, k] slots -> [rows, k, 576] of `dtype`."""
    block_size = cache.shape[1]
    rows, block_stride, token_stride = token_rows(cache)
    if block_stride == block_size * token_stride:
        index = slots.flatten() * token_stride
    else:
        index = slots // block_size * block_stride + slots % block_size * token_stride
    gathered = scratch("gathered", (slots.numel(), cache.shape[2]), cache.dtype, cache.device)
    torch.index_select(rows, 0, index.flatten(), out=gathered)
    if cache.dtype == torch.uint8:
        gathered = _dequantise(gathered, dtype)
    return gathered.view(*slots.shape, LATENT_DIM)


def _dequantise(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, 656] uint8 -> [n, 576] of `dtype`; each value is rounded once."""
    (nope,), (scale,), (rope,) = latent_fp8_views(packed[None])
    latent = scratch("latent", (packed.shape[0], LATENT_DIM), dtype, packed.device)
    for first in range(0, packed.shape[0], _PIECE):
        piece = slice(first, first + _PIECE)
        value = scratch("value", tuple(nope[piece].shape), torch.float32, packed.device)
        blocks = decode_e4m3(nope[piece], value).view(-1, LATENT_SCALES, FP8_BLOCK)
        blocks.mul_(scale[piece, :, None])
        latent[piece, :KV_LORA_RANK] = value
    latent[:, KV_LORA_RANK:] = rope
    return latent


def _score(q: Tensor, latent: Tensor) -> Tensor:
    """q [rows, heads, 576] . latent [rows, k, 576] -> [rows, k, heads] fp32.

    Keys are the left operand: with few heads the other order is half as fast.
    """
    rows, k, _ = latent.shape
    query = q.float().transpose(1, 2)
    scores = scratch("scores", (rows, k, q.shape[1]), torch.float32, q.device)
    if latent.dtype == torch.float32:
        return torch.bmm(latent, query, out=scores)
    step = max(1, _PIECE // rows)
    for first in range(0, k, step):
        piece = latent[:, first : first + step]
        key = scratch("key", tuple(piece.shape), torch.float32, q.device).copy_(piece)
        scores[:, first : first + step] = torch.bmm(key, query)
    return scores


def _attend(
    q: Tensor, latent: Tensor, valid: Tensor, softmax_scale: float, out: Tensor, lse: Tensor
) -> None:
    """One tile: q [rows, heads, 576] over latent [rows, k, 576]."""
    rows, heads, _ = q.shape
    k = latent.shape[1]
    scores = _score(q, latent)
    weights = scratch("weights", (rows, heads, k), torch.float32, q.device)
    torch.mul(scores.transpose(1, 2), softmax_scale, out=weights)
    weights.masked_fill_(~valid[:, None], -torch.inf)
    peak = weights.amax(-1, keepdim=True)
    empty = peak == -torch.inf
    weights.sub_(peak.masked_fill(empty, 0)).exp_()
    total = weights.sum(-1, keepdim=True)
    torch.add(peak, total.log(), out=lse[..., None])
    # All 576 columns, the last 64 for nothing: a slice of 512 runs at a third of the speed.
    value = scratch("output", (rows, heads, LATENT_DIM), q.dtype, q.device)
    torch.bmm(weights.div_(total).to(q.dtype), latent, out=value)
    out.copy_(value[..., :KV_LORA_RANK].masked_fill_(empty, 0))
