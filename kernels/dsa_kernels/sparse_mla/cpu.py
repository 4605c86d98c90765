"""sparse_mla on a CPU: gather each row's latents, then torch's flash attention over them.

Scores, softmax and sums are fp32 inside it, and weights meet the values in q's dtype, as the
specification says; where the CPU has bf16 matrix units it uses them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.dims import FP8_BLOCK, KV_LORA_RANK, LATENT_DIM, LATENT_SCALES
from dsa_kernels.fp8 import decode_e4m3
from dsa_kernels.layout import latent_fp8_views, token_rows
from dsa_kernels.sparse_mla.reference import selection
from dsa_kernels.workspace import TILE_BYTES, scratch

# Behind torch's scaled_dot_product_attention; called by name because it also returns the lse.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

_PIECE = 512  # latents dequantised at a time: 1 MB of fp32, within a core's second-level cache
_GROUP_BYTES = 128 << 20  # most that the dequantised latents of a group of rows may take


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
    row_bytes = k * LATENT_DIM * q.dtype.itemsize
    threads = torch.get_num_threads()
    step = threads * max(1, TILE_BYTES // (threads * row_bytes))
    group = step * max(1, _GROUP_BYTES // (step * row_bytes))
    for first in range(0, rows, group):
        length = None if topk_length is None else topk_length[first : first + group, None]
        chosen, valid = _readable(slots[first : first + group], length, cache)
        latents, index = _latents(cache, chosen, q.dtype)
        widths = _widths(valid)
        for offset in range(0, len(widths), step):
            width = max(widths[offset : offset + step])
            part = slice(offset, min(offset + step, len(widths)))
            tile = slice(first + part.start, first + part.stop)
            if width == 0:
                out[tile], lse[tile] = 0, -torch.inf
                continue
            gathered = _gather(latents, index[part, :width])
            _attend(q[tile], gathered, valid[part, :width], softmax_scale, out[tile], lse[tile])


def masked_mha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_indices: Tensor,
    softmax_scale: float,
    out: Tensor,
) -> None:
    keys, width = v.shape[1:]
    if keys == 0 or out.numel() == 0:  # the operator divides by their number
        out.zero_()
        return
    selected = selection(topk_indices, keys)
    mask = torch.full(selected.shape, -torch.inf).masked_fill_(selected, 0)
    attended, _ = _flash(
        _dense(q).transpose(0, 1)[None],
        _dense(k)[None],
        torch.nn.functional.pad(v, (0, q.shape[2] - width))[None],
        attn_mask=mask[None, None],
        scale=softmax_scale,
    )
    out.copy_(attended[0, ..., :width].transpose(0, 1))


def _dense(x: Tensor) -> Tensor:
    """The operator takes it that the values of a row lie side by side, and does not look."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _readable(slots: Tensor, length: Tensor | None, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Slots with every ignored entry replaced by one that is not, and which were not ignored.

    The replacement is of the same row: a latent of an unwritten page may be NaN, which survives a
    weight of zero.
    """
    valid = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])
    if length is not None:
        valid &= torch.arange(slots.shape[1]) < length
    kept = torch.where(valid, slots, 0)
    return torch.where(valid, kept, kept.amax(1, keepdim=True)), valid


def _widths(valid: Tensor) -> list[int]:
    """Columns of each row up to its last valid one."""
    last = torch.where(valid, torch.arange(1, valid.shape[1] + 1, dtype=torch.int32), 0).amax(1)
    return [int(width) for width in last.tolist()]


def _latents(cache: Tensor, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix [n, 576] of `dtype` that holds the slots' latents, and the row of each slot in it.

    fp8 latents are dequantised, each once however many rows selected it.
    """
    rows, block_stride, token_stride = token_rows(cache)

    def row_of(slots: Tensor) -> Tensor:
        block_size = cache.shape[1]
        if block_stride == block_size * token_stride:
            return slots * token_stride
        return slots // block_size * block_stride + slots % block_size * token_stride

    if cache.dtype != torch.uint8:
        return rows, row_of(slots)
    distinct, index = torch.unique(slots, return_inverse=True)
    return _dequantise(_gather(rows, row_of(distinct)), dtype), index


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """[n, width] and [...] -> [..., width]."""
    gathered = scratch("gathered", (index.numel(), rows.shape[1]), rows.dtype, rows.device)
    torch.index_select(rows, 0, index.flatten(), out=gathered)
    return gathered.view(*index.shape, -1)


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


def _attend(
    q: Tensor, latent: Tensor, valid: Tensor, softmax_scale: float, out: Tensor, lse: Tensor
) -> None:
    """One tile: q [rows, heads, 576] over latent [rows, k, 576].

    All heads of a row share its latents, so to the operator they are queries of one head. It wants
    values as wide as keys: the last 64 columns of its result are for nothing.
    """
    rows, heads, _ = q.shape
    mask = None
    if not valid.all():
        mask = torch.zeros(valid.shape).masked_fill_(~valid, -torch.inf)[:, None, None]
        mask = mask.expand(rows, 1, heads, -1)
    attended, sums = _flash(
        _dense(q)[:, None], latent[:, None], latent[:, None], attn_mask=mask, scale=softmax_scale
    )
    out.copy_(attended[:, 0, :, :KV_LORA_RANK])
    lse.copy_(sums.view(rows, heads))
    if mask is not None:
        empty = ~valid.any(1)
        out[empty], lse[empty] = 0, -torch.inf
