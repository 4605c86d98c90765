"""Specification of topk_select in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.workspace import TILE_BYTES, scratch

_NEVER = torch.iinfo(torch.int64).min
_LAST = torch.iinfo(torch.int32).max
_LEAST = -_LAST + 1  # of two NaNs, which tie


def topk_select(
    logits: Tensor,
    k: int,
    row_start: Tensor | None,
    row_end: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    rows, columns = logits.shape
    if out is None:
        out = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    taken = min(k, columns)
    out[:, taken:] = -1
    column = torch.arange(columns, device=logits.device)
    step = max(1, TILE_BYTES // (8 * max(columns, 1)))
    for first in range(0, rows if taken else 0, step):
        tile = slice(first, first + step)
        start = None if row_start is None else row_start[tile, None]
        key = _keys(logits[tile], column, start, row_end[tile, None])
        key, index = torch.topk(key, taken, sorted=False)
        index = index.int()
        if start is not None:
            index -= start
        index.masked_fill_(key == _NEVER, _LAST)
        index = index.sort().values
        out[tile, :taken] = index.masked_fill_(index == _LAST, -1)
    return out


def _keys(logits: Tensor, column: Tensor, start: Tensor | None, end: Tensor) -> Tensor:
    """One int64 per score, ordered like (score, -column): all differ, so topk meets no ties."""
    # Floats order like their bits, sign and magnitude: -0.0 is 0.0, and a NaN lies beyond infinity
    # on the side of its sign. By integers alone: a GPU's sums turn every NaN into one.
    bits = logits.view(torch.int32)
    magnitude = bits & _LAST
    signed = torch.where(bits < 0, -magnitude, magnitude).clamp_(min=_LEAST)
    key = scratch("keys", tuple(logits.shape), torch.int64, logits.device)
    key.copy_(signed).bitwise_left_shift_(32).sub_(column)
    outside = column >= end
    if start is not None:
        outside |= column < start
    return key.masked_fill_(outside, _NEVER)


def topk_slots(
    topk_indices: Tensor, block_table: Tensor, request_ids: Tensor, block_size: int
) -> Tensor:
    slots = torch.empty(topk_indices.shape, dtype=torch.int64, device=topk_indices.device)
    max_blocks = block_table.shape[1]
    flat = block_table.reshape(-1)
    step = max(1, TILE_BYTES // (8 * max(topk_indices.shape[1], 1)))
    for first in range(0, topk_indices.shape[0], step):
        tile = slice(first, first + step)
        index = topk_indices[tile]
        selected = (index >= 0) & (index < max_blocks * block_size)
        index = index.clamp(0, max_blocks * block_size - 1).long()
        entry = request_ids[tile, None].long() * max_blocks + index // block_size
        block = flat[entry].long()
        slots[tile] = torch.where(
            selected & (block >= 0), block * block_size + index % block_size, -1
        )
    return slots
