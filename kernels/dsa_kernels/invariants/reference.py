"""Specification of the checks in eager torch.

Nothing here waits for the device or has a shape that depends on values, so that all of it can be
captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.invariants.entries import any_nan, fill, nan_in_blocks, unwritten_and_nan
from dsa_kernels.invariants.findings import FIELDS, NOTES, Check, Kind
from dsa_kernels.invariants.inputs import LayerMemory, Rows, Used

_ELEMENTS = 1 << 22  # that a check of many rows looks at at once
_NOT_WRITTEN = -1
_LAST = torch.iinfo(torch.int32).max

# Of some rows the kind violated, 0 for none, and the numbers of its text; [rows] each.
Finding = tuple[Tensor, Tensor, Tensor]


def mark_rows(rows: Rows, memory: LayerMemory) -> Tensor:
    for cache in (memory.latent_cache, memory.key_cache):
        if cache is not None:
            fill(cache, *rows.entries, rows.stored)
    now = rows.positions.where(rows.stored, _NOT_WRITTEN)
    memory.written[rows.entries] = now.to(torch.int32)
    misplaced = rows.misplaced & rows.real
    place = misplaced * Check.PLACE, misplaced * Kind.PLACE, rows.slots, rows.lens
    findings = torch.zeros(len(now) + 1, NOTES, dtype=torch.int64, device=now.device)
    findings[:-1] = torch.stack(place, 1)
    return findings


def check_rows(rows: Rows, memory: LayerMemory, used: Used, findings: Tensor) -> None:
    part = used.rows
    slots = rows.slots[part]
    found: dict[Check, Finding] = {Check.LATENT: _check_entries(rows, memory, Check.LATENT, part)}
    if memory.key_cache is not None:
        found[Check.KEY] = _check_entries(rows, memory, Check.KEY, part)
    if used.query is not None:
        nan = any_nan(used.query[0][part]) | any_nan(used.query[1][part])
        found[Check.QUERY] = nan * Kind.QUERY_NAN, slots, slots
    found[Check.READ] = _check_page(rows, memory, part)
    if used.selected:
        count = (used.topk_indices[part] >= 0).sum(-1)
        due = rows.lens[part].clamp(max=used.topk_indices.shape[1])
        found[Check.COUNT] = (count != due) * Kind.COUNT, count, due
    found[Check.USED] = _check_used(rows, memory, used)
    first = _first(found, torch.zeros_like(slots))
    _note(first, rows.real[part], findings[part])


def keep_first(
    rows: Rows, findings: Tensor, out: Tensor, layer: Tensor, number: Tensor, first: Tensor
) -> None:
    findings, nan = findings[:-1], any_nan(out)
    noted = nan * Check.OUT, nan * Kind.OUT_NAN, rows.slots, rows.slots
    _note(torch.stack(noted, 1), rows.real, findings)
    # Not indexed by a scalar tensor, which is read by the host for that.
    check = findings[:, 0]
    row = check.where(check != 0, _LAST).argmin(keepdim=True)
    _, kind, at, seen = findings[row].unbind(1)
    values = {
        "kind": kind,
        "layer": layer,
        "pass": number,
        "row": row,
        "request": rows.requests[row],
        "position": rows.positions[row],
        "at": at,
        "seen": seen,
    }
    new = torch.cat([values[field] for field in FIELDS])
    first.copy_(torch.where(first[0] == 0, new * (kind != 0), first))


def _check_entries(rows: Rows, memory: LayerMemory, check: Check, part: slice) -> Finding:
    """What the pass has written to one of the caches."""
    cache, unwritten_kind, nan_kind = {
        Check.LATENT: (memory.latent_cache, Kind.LATENT_UNWRITTEN, Kind.LATENT_NAN),
        Check.KEY: (memory.key_cache, Kind.KEY_UNWRITTEN, Kind.KEY_NAN),
    }[check]
    assert cache is not None
    blocks, offsets = rows.entries
    unwritten, nan = unwritten_and_nan(cache, blocks[part], offsets[part])
    kind = (nan * nan_kind).masked_fill_(unwritten | ~rows.stored[part], unwritten_kind)
    return kind, rows.slots[part], rows.slots[part]


def _check_page(rows: Rows, memory: LayerMemory, part: slice) -> Finding:
    """Of each row's request one page."""
    blocks, positions = rows.page_blocks[part], rows.page_positions[part]
    visible = rows.page_visible[part]
    held = memory.written[blocks]
    kinds = (_is_stale(memory, held, positions, blocks[:, None]) & visible) * Kind.STALE
    if (key_cache := memory.key_cache) is not None:
        inside = blocks.clamp(max=rows.num_blocks - 1)
        step = max(1, _ELEMENTS // key_cache[0].numel())
        nan = torch.cat([nan_in_blocks(key_cache, some) for some in inside.split(step)])
        kinds.masked_fill_(nan & visible, Kind.READ_KEY_NAN)
    kind, at, seen = _greatest(kinds, positions, held)
    return kind, at, seen


def _check_used(rows: Rows, memory: LayerMemory, used: Used) -> Finding:
    part, parts = used.rows, []
    step = max(1, _ELEMENTS // used.topk_indices.shape[1])
    for start in range(part.start, part.stop, step):
        some = slice(start, min(start + step, part.stop))
        slots = None if used.slots is None else used.slots[start - part.start :][:step]
        parts.append(_check_selection(rows, memory, used.topk_indices[some], some, slots))
    kind, at, seen = (torch.cat(each) for each in zip(*parts, strict=True))
    return kind, at, seen


def _check_selection(
    rows: Rows, memory: LayerMemory, indices: Tensor, part: slice, slots: Tensor | None
) -> Finding:
    size, chosen, positions = rows.block_size, indices >= 0, indices.clamp(min=0)
    blocks = rows.blocks(part, positions // size)
    offsets = positions % size
    held = memory.written[blocks, offsets]
    stale = _is_stale(memory, held, indices, blocks)
    kinds = (chosen & stale).to(torch.int8) * Kind.STALE
    if slots is None:
        slots = held
    else:
        kinds.masked_fill_(chosen & (slots != blocks * size + offsets), Kind.PAGES)
    # What is padding comes last, so an index after it does not follow it either.
    before = indices[:, :-1].masked_fill(~chosen[:, :-1], _LAST)
    kinds[:, 1:].masked_fill_(chosen[:, 1:] & (indices[:, 1:] <= before), Kind.ORDER)
    unseen = (indices >= rows.lens[part, None]) | (indices < -1)
    kinds.masked_fill_(unseen, Kind.RANGE)
    kind, at, slot, held = _greatest(kinds, indices, slots, held)
    return kind, at, slot.where(kind == Kind.PAGES, held)


def _is_stale(memory: LayerMemory, held: Tensor, positions: Tensor, blocks: Tensor) -> Tensor:
    if memory.ours_alone:
        return held != positions
    return (blocks == 0) | (blocks == len(memory.written) - 1)


def _greatest(kinds: Tensor, *values: Tensor) -> list[Tensor]:
    """[rows] each: at the first column of the row's greatest kind; all [rows, columns]."""
    column = kinds.argmax(-1, keepdim=True)
    return [each.gather(1, column)[:, 0] for each in (kinds, *values)]


def _first(found: dict[Check, Finding], none: Tensor) -> Tensor:
    """[rows, NOTES]: of each row the first of what several checks found; `none` is [rows] zeros."""
    checks = range(min(found), max(found) + 1)
    columns = zip(*(found.get(check, (none,) * 3) for check in map(Check, checks)), strict=True)
    values = [torch.stack(column, 1) for column in columns]
    number = values[0].clamp(max=1).argmax(1, keepdim=True)
    kind, at, seen = (each.gather(1, number) for each in values)
    return torch.cat([(number + checks.start) * (kind != 0), kind, at, seen], 1)


def _note(found: Tensor, real: Tensor, findings: Tensor) -> None:
    """Note what was found of rows, both [rows, NOTES], that are checked and have nothing so far."""
    new = (found[:, :1] != 0) & (findings[:, :1] == 0) & real[:, None]
    findings.copy_(found.where(new, findings))
