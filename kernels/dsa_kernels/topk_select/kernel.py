"""Triton kernels of topk_select.

A row that a program can hold in registers is searched there: its k-th largest key lies between two
bounds, and each step counts the keys at two pivots between them, one where the counts so far say
that it should be, one in the middle. Of a longer row a sample suggests a pivot that some more than
k keys reach, but no more than a program can hold: those are its candidates. One pass over the row
notes their columns, and the k best of them are the row's. Where the pivot was wrong, by its count,
the bounds are narrowed and another sample taken: scores' distribution and order affect the time,
never the result.
"""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_kernels.arch import Arch, arch_of
from dsa_kernels.launch import Launch, launch_config, strides
from dsa_kernels.topk_select.device import (
    as_row,
    complete,
    guess_pivot,
    kth_largest,
    note_candidates,
    ordered,
    row_range,
    write_best,
    write_equals,
)
from dsa_kernels.topk_select.slots_kernel import Pages, config_of_rows
from dsa_kernels.tuning import LaunchConfig


def topk_select(
    logits: Tensor, k: int, row_start: Tensor | None, row_end: Tensor, out: Tensor
) -> None:
    """As the public function, into `out`."""
    for launch in launches(logits, k, row_start, row_end, out, arch_of(logits.device)):
        launch.run()


def topk_select_slots(
    logits: Tensor,
    k: int,
    row_end: Tensor,
    block_table: Tensor,
    request_ids: Tensor,
    block_size: int,
    out: Tensor,
    slots: Tensor,
) -> None:
    """As the public function, into `out` and `slots`."""
    pages = Pages(block_table, request_ids, block_size, slots)
    for launch in launches(logits, k, None, row_end, out, arch_of(logits.device), pages):
        launch.run()


_MAX_PARTS = 16  # of a row, each a program's in the first of two launches
_PROGRAMS_PER_SM = 2  # of that launch
_MOST_ROOM = 1 << 13  # candidates that a program holds, at most: with more it spills
_MOST_THREADS = 512  # of a program that holds them

_LEAST = tl.constexpr(1)  # of the keys
_MOST = tl.constexpr(0xFFFFFFFF)

_NO_PAGES = dict.fromkeys(
    [
        *("block_table", "request_ids", "slots", "max_blocks", "BLOCK_SIZE"),
        *("block_table_r", "block_table_b", "slots_t", "slots_k"),
    ]
)


def launches(
    logits: Tensor,
    k: int,
    row_start: Tensor | None,
    row_end: Tensor,
    out: Tensor,
    arch: Arch,
    pages: Pages | None = None,
) -> list[Launch]:
    """Short rows, or many: one launch. Long rows that are few: their parts' candidates first.

    Candidates take 4 bytes of scratch each, as many as a program holds for each part: 16 KiB.
    """
    rows, columns = logits.shape
    if rows == 0:
        return []
    arguments = {
        "logits": logits,
        "row_start": row_start if row_start is None else row_start.contiguous(),
        "row_end": row_end.contiguous(),
        "num_rows": rows,
        "num_columns": columns,
        "k": k,
        **strides("logits", logits, "tn"),
    }
    results = {
        "winners": out,
        **strides("winners", out, "tk"),
        **(pages.arguments() if pages else _NO_PAGES),
    }
    if columns <= launch_config("topk_select", arch, "select").blocks["BLOCK"]:
        config = config_of_rows("select", columns, arch)
        grid = (triton.cdiv(rows, config.blocks["BLOCK_ROWS"]),)
        return [Launch(_select, grid, arguments | results, config)]

    sift, finish = (_long_config(kernel, k, arch) for kernel in ("sift", "finish"))
    del arguments["num_rows"]
    tiles = triton.cdiv(columns, sift.blocks["TILE"])
    parts = max(1, min(_MAX_PARTS, _PROGRAMS_PER_SM * arch.num_sms // rows, tiles // 2))
    int32: Any = {"dtype": torch.int32, "device": logits.device}
    arguments |= {
        "candidates": torch.empty(rows, parts, finish.blocks["ROOM"], **int32),
        "counts": torch.empty(rows, parts + 1, **int32),
        "parts": parts,
    }
    finishing = Launch(_finish, (rows,), arguments | results, finish)
    if parts == 1:
        return [finishing]
    part_tiles = triton.cdiv(tiles, parts)
    return [Launch(_sift, (rows, parts), arguments | {"part_tiles": part_tiles}, sift), finishing]


def compile_cases(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """Rows that a program holds; of longer ones the pass over a part, and a whole row's choice."""

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for columns, k in ((4096, 2048), (8192, 2048), (131072, 2048), (131072, 4096)):
        logits = meta(8, columns, dtype=torch.float32)
        size = f"{columns}" if k == 2048 else f"{columns} k {k}"
        for start in (None, meta(8)):
            for launch in launches(logits, k, start, meta(8), meta(8, k), arch):
                ranged = "" if start is None else " ranges"
                yield f"{launch.kernel.__name__.strip('_')} {size}{ranged}", launch
        pages = Pages(meta(8, 2048), meta(8), 64, meta(8, k, dtype=torch.int64))
        *_, launch = launches(logits, k, None, meta(8), meta(8, k), arch, pages)
        yield f"{launch.kernel.__name__.strip('_')} {size} slots", launch


def _long_config(kernel: str, k: int, arch: Arch) -> LaunchConfig:
    """The table's entry for a long row's kernel, with room for twice as many candidates as k.

    More than `_MOST_ROOM` a program does not hold: a larger k is found by passes over the row.
    """
    config = launch_config("topk_select", arch, kernel)
    blocks, num_warps = dict(config.blocks), config.num_warps
    room = min(triton.next_power_of_2(2 * k), _MOST_ROOM)
    if room > blocks["ROOM"]:
        blocks["ROOM"], num_warps = room, _MOST_THREADS // arch.warp_size
    if kernel == "finish":
        blocks["MAX_PARTS"] = _MAX_PARTS
    return replace(config, blocks=blocks, num_warps=num_warps)


@triton.jit(
    do_not_specialize=[
        *("row_start", "row_end", "block_table", "request_ids"),
        *("num_rows", "num_columns", "max_blocks", "block_table_r"),
    ]
)
def _select(
    logits,
    row_start,
    row_end,
    winners,
    block_table,
    request_ids,
    slots,
    num_rows,
    num_columns,
    k,
    max_blocks,
    logits_t,
    logits_n,
    winners_t,
    winners_k,
    block_table_r,
    block_table_b,
    slots_t,
    slots_k,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The best k of each row: their indices, ascending, then -1. With `slots`, those too."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    start, first, end = row_range(row_start, row_end, row, is_row, num_columns)
    column = first[:, None] + tl.arange(0, BLOCK_COLUMNS)[None, :]
    valid = column < end[:, None]
    address = logits + row[:, None] * logits_t + column.to(tl.int64) * logits_n
    key = tl.where(valid, ordered(tl.load(address, mask=valid, other=0.0)), 0)
    least = tl.min(tl.where(valid, key, 0xFFFFFFFF), 1)
    num_valid = end - first
    none = tl.zeros_like(num_valid)
    threshold, allowed = kth_largest(key, least, num_valid, k)
    winners += row * winners_t
    write_best(key, column, start, threshold, allowed, winners, winners_k)
    table, slots_row = block_table, slots
    if slots is not None:
        request = tl.load(request_ids + row, mask=is_row, other=0).to(tl.int64)
        table = block_table + request * block_table_r
        slots_row = slots + row * slots_t
    PLACES: tl.constexpr = BLOCK_COLUMNS // 4 if BLOCK_COLUMNS > 4 else 1
    complete(
        winners,
        winners_k,
        tl.minimum(num_valid, k),
        tl.where(is_row, k, none),
        k,
        table,
        block_table_b,
        max_blocks,
        slots_row,
        slots_k,
        BLOCK_SIZE,
        PLACES,
    )


@triton.jit(do_not_specialize=["row_start", "row_end", "num_columns", "parts", "part_tiles"])
def _sift(
    logits,
    row_start,
    row_end,
    candidates,
    counts,
    num_columns,
    k,
    parts,
    part_tiles,
    logits_t,
    logits_n,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    ROOM: tl.constexpr,
):
    """The candidates of a part of a row and their number; of the row, the pivot they reach."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, first, end = row_range(row_start, row_end, row, True, num_columns)
    logits += row * logits_t
    candidates += (row * parts + part) * ROOM
    counts += row * (parts + 1)
    from_tile = part * part_tiles
    to_tile = tl.minimum(tl.cdiv(end, TILE), from_tile + part_tiles)
    from_tile = tl.maximum(first // TILE, from_tile)
    count = 0
    if (part == 0) | (from_tile < to_tile):
        least, most = tl.full((), _LEAST, tl.uint32), tl.full((), _MOST, tl.uint32)
        pivot = guess_pivot(
            logits, logits_n, first, end, k, least, most, end - first, 0, 0, SAMPLE, ROOM
        )
        if part == 0:
            tl.store(counts + parts, pivot.to(tl.int32, bitcast=True))
        count = note_candidates(
            logits,
            logits_n,
            first,
            end,
            num_columns,
            from_tile,
            to_tile,
            pivot,
            candidates,
            TILE,
            ROOM,
        )
    tl.store(counts + part, count)


@triton.jit(
    do_not_specialize=[
        *("row_start", "row_end", "block_table", "request_ids"),
        *("num_columns", "parts", "max_blocks", "block_table_r"),
    ]
)
def _finish(
    logits,
    row_start,
    row_end,
    candidates,
    counts,
    winners,
    block_table,
    request_ids,
    slots,
    num_columns,
    k,
    parts,
    max_blocks,
    logits_t,
    logits_n,
    winners_t,
    winners_k,
    block_table_r,
    block_table_b,
    slots_t,
    slots_k,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    ROOM: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """The best k of a row, as `_select` writes them, by candidates: `_sift`'s, or its own."""
    row = tl.program_id(0).to(tl.int64)
    start, first, end = row_range(row_start, row_end, row, True, num_columns)
    num_valid = end - first
    logits += row * logits_t
    candidates += row * parts * ROOM
    counts += row * (parts + 1)
    winners += row * winners_t

    # The k-th largest key is no less than `least`, which `at_least` keys reach, and no more than
    # `most`, which `above` keys exceed.
    least, most = tl.full((), _LEAST, tl.uint32), tl.full((), _MOST, tl.uint32)
    at_least, above = num_valid, 0
    pivot, count = least, 0
    place = tl.arange(0, ROOM)
    source = place
    if parts > 1:
        pivot = tl.load(counts + parts).to(tl.uint32, bitcast=True)
        for part in tl.static_range(MAX_PARTS):
            here = tl.load(counts + part, mask=part < parts, other=0)
            count += here
            source += tl.where(place >= count, ROOM - here, 0)
    attempt = 0
    searching = True
    while searching:
        if (parts == 1) | (attempt > 0):
            pivot = guess_pivot(
                logits, logits_n, first, end, k, least, most, at_least, above, attempt, SAMPLE, ROOM
            )
            tl.debug_barrier()  # of two passes' notes in one place the later one's stays
            count = note_candidates(
                logits,
                logits_n,
                first,
                end,
                num_columns,
                first // TILE,
                tl.cdiv(end, TILE),
                pivot,
                candidates,
                TILE,
                ROOM,
            )
            source = place
        if count >= k:
            least, at_least = pivot, count
        else:
            most, above = pivot - 1, count
        searching = (count > ROOM) | (count < tl.minimum(k, num_valid))
        searching &= (least < most) & (at_least > k)
        attempt += 1

    tl.debug_barrier()  # other threads noted the candidates
    if (count <= ROOM) & (count >= tl.minimum(k, num_valid)):
        is_candidate = place < count
        column = tl.load(candidates + source, mask=is_candidate, other=0)
        score = tl.load(logits + column.to(tl.int64) * logits_n, mask=is_candidate, other=0.0)
        key = tl.where(is_candidate, ordered(score), 0)[None, :]
        threshold, allowed = kth_largest(key, as_row(pivot), as_row(count), k)
        write_best(
            key, column[None, :], as_row(start), threshold, allowed, as_row(winners), winners_k
        )
    else:
        equals = tl.where(at_least > k, k - above, k)
        write_equals(
            logits,
            logits_n,
            start,
            first,
            end,
            num_columns,
            least,
            equals,
            winners,
            winners_k,
            TILE,
        )
    table, slots_row = block_table, slots
    if slots is not None:
        request = tl.load(request_ids + row).to(tl.int64)
        table = as_row(block_table + request * block_table_r)
        slots_row = as_row(slots + row * slots_t)
    PLACES: tl.constexpr = ROOM // 2 if ROOM < 4096 else 2048
    complete(
        as_row(winners),
        winners_k,
        as_row(tl.minimum(num_valid, k)),
        as_row(k),
        k,
        table,
        block_table_b,
        max_blocks,
        slots_row,
        slots_k,
        BLOCK_SIZE,
        PLACES,
    )
