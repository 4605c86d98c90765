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
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_kernels.arch import Arch, arch_of
from dsa_kernels.launch import Launch, launch_config, strides
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


def topk_slots(
    topk_indices: Tensor, block_table: Tensor, request_ids: Tensor, block_size: int, out: Tensor
) -> None:
    """As the public function, into `out`."""
    arch = arch_of(topk_indices.device)
    for launch in slots_launches(topk_indices, block_table, request_ids, block_size, out, arch):
        launch.run()


@dataclass(frozen=True)
class Pages:
    """Where the last round finds the slots of what it selects, and writes them."""

    block_table: Tensor
    request_ids: Tensor
    block_size: int
    slots: Tensor

    def arguments(self) -> dict[str, Any]:
        return {
            "block_table": self.block_table,
            "request_ids": self.request_ids.contiguous(),
            "slots": self.slots,
            "max_blocks": self.block_table.shape[1],
            **strides("block_table", self.block_table, "rb"),
            **strides("slots", self.slots, "tk"),
            "BLOCK_SIZE": self.block_size,
        }


_MAX_PARTS = 16  # of a row, each a program's in the first of two launches
_PROGRAMS_PER_SM = 2  # of that launch
_MOST_ROOM = 1 << 13  # candidates that a program holds, at most: with more it spills
_MOST_THREADS = 512  # of a program that holds them

_RUN = tl.constexpr(16)  # neighbours of a tile that lie below each other
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
        config = _config("select", columns, arch)
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


def slots_launches(
    topk_indices: Tensor,
    block_table: Tensor,
    request_ids: Tensor,
    block_size: int,
    out: Tensor,
    arch: Arch,
) -> list[Launch]:
    rows, k = topk_indices.shape
    if out.numel() == 0:
        return []
    config = _config("slots", k, arch)
    arguments = {
        "topk_indices": topk_indices,
        "num_rows": rows,
        "k": k,
        **strides("topk_indices", topk_indices, "tk"),
        **Pages(block_table, request_ids, block_size, out).arguments(),
    }
    blocks = config.blocks
    grid = (triton.cdiv(rows, blocks["BLOCK_ROWS"]), triton.cdiv(k, blocks["BLOCK_COLUMNS"]))
    return [Launch(_find_slots, grid, arguments, config)]


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
    k = 2048
    (launch,) = slots_launches(
        meta(64, k), meta(64, 2048), meta(64), 64, meta(64, k, dtype=torch.int64), arch
    )
    yield "slots", launch


def _config(kernel: str, columns: int, arch: Arch) -> LaunchConfig:
    """The table's entry for a shape key, the kernel, its block cut to the row's length.

    A program takes several short rows, in half a block: each row's counts need registers, too.
    """
    config = launch_config("topk_select", arch, kernel)
    block = config.blocks["BLOCK"]
    width = min(block, triton.next_power_of_2(max(columns, 1)))
    blocks = {"BLOCK_ROWS": max(1, block // 2 // width), "BLOCK_COLUMNS": width}
    return replace(config, blocks=blocks)


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
    start, first, end = _range(row_start, row_end, row, is_row, num_columns)
    column = first[:, None] + tl.arange(0, BLOCK_COLUMNS)[None, :]
    valid = column < end[:, None]
    address = logits + row[:, None] * logits_t + column.to(tl.int64) * logits_n
    key = tl.where(valid, _ordered(tl.load(address, mask=valid, other=0.0)), 0)
    least = tl.min(tl.where(valid, key, 0xFFFFFFFF), 1)
    num_valid = end - first
    none = tl.zeros_like(num_valid)
    threshold, allowed = _kth_largest(key, least, num_valid, k)
    winners += row * winners_t
    _write_best(key, column, start, threshold, allowed, winners, winners_k)
    table, slots_row = block_table, slots
    if slots is not None:
        request = tl.load(request_ids + row, mask=is_row, other=0).to(tl.int64)
        table = block_table + request * block_table_r
        slots_row = slots + row * slots_t
    PLACES: tl.constexpr = BLOCK_COLUMNS // 4 if BLOCK_COLUMNS > 4 else 1
    _complete(
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
    _, first, end = _range(row_start, row_end, row, True, num_columns)
    logits += row * logits_t
    candidates += (row * parts + part) * ROOM
    counts += row * (parts + 1)
    from_tile = part * part_tiles
    to_tile = tl.minimum(tl.cdiv(end, TILE), from_tile + part_tiles)
    from_tile = tl.maximum(first // TILE, from_tile)
    count = 0
    if (part == 0) | (from_tile < to_tile):
        least, most = tl.full((), _LEAST, tl.uint32), tl.full((), _MOST, tl.uint32)
        pivot = _guess(
            logits, logits_n, first, end, k, least, most, end - first, 0, 0, SAMPLE, ROOM
        )
        if part == 0:
            tl.store(counts + parts, pivot.to(tl.int32, bitcast=True))
        count = _pass(
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
    start, first, end = _range(row_start, row_end, row, True, num_columns)
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
            pivot = _guess(
                logits, logits_n, first, end, k, least, most, at_least, above, attempt, SAMPLE, ROOM
            )
            tl.debug_barrier()  # of two passes' notes in one place the later one's stays
            count = _pass(
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
        key = tl.where(is_candidate, _ordered(score), 0)[None, :]
        threshold, allowed = _kth_largest(key, _one(pivot), _one(count), k)
        _write_best(key, column[None, :], _one(start), threshold, allowed, _one(winners), winners_k)
    else:
        equals = tl.where(at_least > k, k - above, k)
        _write_equals(
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
        table = _one(block_table + request * block_table_r)
        slots_row = _one(slots + row * slots_t)
    PLACES: tl.constexpr = ROOM // 2 if ROOM < 4096 else 2048
    _complete(
        _one(winners),
        winners_k,
        _one(tl.minimum(num_valid, k)),
        _one(k),
        k,
        table,
        block_table_b,
        max_blocks,
        slots_row,
        slots_k,
        BLOCK_SIZE,
        PLACES,
    )


@triton.jit
def _range(row_start, row_end, row, is_row, num_columns):
    """What a row's indices count from, and its range within the columns there are: [first, end)."""
    end = tl.minimum(tl.load(row_end + row, mask=is_row, other=0), num_columns)
    if row_start is None:
        start = tl.zeros_like(end)
    else:
        start = tl.load(row_start + row, mask=is_row, other=0).to(end.dtype)
    first = tl.minimum(tl.maximum(start, 0), num_columns).to(tl.int32)
    return start, first, tl.maximum(end, first).to(tl.int32)


@triton.jit
def _one(value):
    """A scalar as a block of one row."""
    return value + tl.arange(0, 1)


@triton.jit
def _ordered(value):
    """fp32 -> uint32 >= 1 in the same order, -0.0 equal to 0.0, NaN beyond infinity by its sign."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    bits ^= tl.where(bits < 0x80000000, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return tl.maximum(bits, 1)  # of two NaNs, which tie


@triton.jit
def _kth_largest(key, least, num_valid, k):
    """key [rows, n] uint32, 0 where invalid, else >= least [rows] -> what separates the k largest.

    Returns:
        threshold [rows], and how many of the keys that equal it are among the k largest.
    """
    most = tl.max(key, 1)
    none = tl.zeros_like(num_valid)
    threshold, at_least, above = _narrow(key, least, most, num_valid, none, none + k, none + k)
    return threshold, tl.where(at_least > k, k - above, k)


@triton.jit
def _narrow(key, least, most, at_least, above, fewest, enough):
    """A bound of key [rows, n] that as many keys reach as is wanted: fewest, up to enough.

    Args:
        least, most: the bound lies between them, [rows] uint32.
        at_least, above: how many keys reach `least`, and how many exceed `most`.
        fewest, enough: at_least >= fewest > above.

    Returns:
        The bound, how many keys reach it, and how many exceed it. The first is at least `fewest`
        and more than `enough` only if the second is less than `fewest`. The second is known then.
    """
    wanted = (fewest + enough).to(tl.float32) * 0.5
    active = (at_least > enough) & (least < most)
    while tl.max(active.to(tl.int32), 0) > 0:
        span = most - least
        middle = least + (span >> 1) + (span & 1)
        # As if the keys between the bounds were spread evenly.
        share = (wanted - above) / tl.maximum(at_least - above, 1)
        step = tl.minimum(tl.maximum(share, 0.0), 0.99) * span.to(tl.float32)
        guess = most - tl.minimum(step.to(tl.uint32), tl.maximum(span, 1) - 1)
        low, high = tl.minimum(middle, guess), tl.maximum(middle, guess)
        # One sum for two counts, neither of which passes 2^14, the most keys that a program holds.
        reach = (key >= low[:, None]).to(tl.int32) + ((key >= high[:, None]).to(tl.int32) << 16)
        reach = tl.sum(reach, 1)
        reach_low, reach_high = reach & 0xFFFF, reach >> 16
        raise_to_high = active & (reach_high >= fewest)
        raise_to_low = active & (reach_low >= fewest) & (reach_high < fewest)
        lower_to_low = active & (reach_low < fewest)
        most = tl.where(raise_to_low, high - 1, tl.where(lower_to_low, low - 1, most))
        above = tl.where(raise_to_low, reach_high, tl.where(lower_to_low, reach_low, above))
        least = tl.where(raise_to_high, high, tl.where(raise_to_low, low, least))
        at_least = tl.where(raise_to_high, reach_high, tl.where(raise_to_low, reach_low, at_least))
        active = (at_least > enough) & (least < most)
    return least, at_least, above


@triton.jit
def _guess(
    logits,
    logits_n,
    first,
    end,
    k,
    least,
    most,
    at_least,
    above,
    attempt,
    SAMPLE: tl.constexpr,
    ROOM: tl.constexpr,
):
    """A pivot that at least k of a row's keys reach, and at most ROOM, by a sample of them.

    It lies beyond `least`, unless the whole row has room, and not beyond `most`.
    """
    pivot = least
    num_valid = end - first
    if num_valid > ROOM:
        # From each of SAMPLE equal parts one key, somewhere: periodic scores are not met in step.
        index = tl.arange(0, SAMPLE)
        stride, rest = num_valid // SAMPLE, num_valid % SAMPLE
        somewhere = ((index + attempt * SAMPLE).to(tl.uint32) * 0x9E3779B1) >> 16
        column = first + index * stride + index * rest // SAMPLE
        column += ((somewhere * stride.to(tl.uint32)) >> 16).to(tl.int32)
        key = _ordered(tl.load(logits + column.to(tl.int64) * logits_n))
        # What a share of the keys between the bounds is, of those of the sample.
        scale = 1.0 / (at_least - above)
        counts = tl.sum((key >= least).to(tl.int32) + ((key > most).to(tl.int32) << 16), 0)
        sample_above = counts >> 16
        between = (counts & 0xFFFF) - sample_above
        few = (k - above) * scale * between
        many = tl.minimum((ROOM - above) * scale, 1.0) * between
        fewest = sample_above + tl.maximum((few + 0.4375 * (many - few)).to(tl.int32), 1)
        enough = sample_above + tl.maximum((few + 0.5625 * (many - few)).to(tl.int32), 1)
        lowest = tl.maximum(tl.min(key, 0), least)
        highest = tl.minimum(tl.max(key, 0), most)
        bound, _, _ = _narrow(
            key[None, :],
            _one(lowest),
            _one(highest),
            _one(counts & 0xFFFF),
            _one(sample_above),
            _one(fewest),
            _one(enough),
        )
        # The middle, where the sample has nothing between the bounds or has misled.
        span = most - least
        middle = least + (span >> 1) + (span & 1)
        pivot = tl.where((between > 0) & (attempt % 2 == 0), tl.max(bound, 0), middle)
        pivot = tl.minimum(tl.maximum(pivot, least + 1), most)
    return pivot


@triton.jit
def _tile(logits, logits_n, num_columns, tile, TILE: tl.constexpr):
    """The scores of a tile of a row, and their columns, [_RUN, TILE // _RUN].

    A thread then has neighbours, which lie below each other, and counts most of them on its own.
    """
    offset = tl.arange(0, _RUN)[:, None] + tl.arange(0, TILE // _RUN)[None, :] * _RUN
    column = tile * TILE + offset
    logits += tl.full((), tile * TILE, tl.int64) * logits_n
    address = logits + offset.to(tl.int64) * logits_n
    # A mask would have each thread load its four neighbours one by one.
    if tile * TILE + TILE <= num_columns:
        score = tl.load(address)
    else:
        score = tl.load(address, mask=column < num_columns, other=0.0)
    return score, column


@triton.jit
def _comparison(pivot):
    """What makes of `_ordered(score) >= pivot` one comparison: (bits ^ flip) >= bound, in int32.

    Among floats that are not negative int32 bits order as scores do, and negative ones are below
    them; where the pivot is negative or zero, flipped bits do, with the others above.
    """
    positive = pivot > 0x80000000
    bits = tl.where(positive, pivot ^ 0x80000000, pivot ^ 0xFFFFFFFF)
    bits = tl.where(pivot == 0x80000000, 0x80000000, bits)  # -0.0
    bits = tl.where(pivot == 1, 0xFFFFFFFF, bits)  # of two NaNs, which tie
    flip = tl.where(positive, 0, 0x7FFFFFFF).to(tl.int32)
    return flip, bits.to(tl.uint32).to(tl.int32, bitcast=True) ^ flip


@triton.jit
def _pass(
    logits,
    logits_n,
    first,
    end,
    num_columns,
    from_tile,
    to_tile,
    pivot,
    candidates,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Note the columns of keys that reach the pivot, in order, unless there is no room.

    Returns:
        How many keys reach it.
    """
    flip, bound = _comparison(pivot)
    count = 0
    for tile in range(from_tile, to_tile):
        score, column = _tile(logits, logits_n, num_columns, tile, TILE)
        reaches = (score.to(tl.int32, bitcast=True) ^ flip) >= bound
        if (tile * TILE < first) | (tile * TILE + TILE > end):
            reaches &= (column >= first) & (column < end)
        one = reaches.to(tl.int32)
        of_run = tl.sum(one, 0)
        place = tl.cumsum(one, 0) + (tl.cumsum(of_run, 0) - of_run)[None, :] - 1
        here = tl.sum(of_run, 0)
        if count + here <= ROOM:
            tl.store(candidates + count + place, column, mask=reaches)
        count += here
    return count


@triton.jit
def _write_best(key, column, start, threshold, allowed, winners, winners_k):
    """Indices of the keys [rows, n] above a threshold, and of the first `allowed` equal to it."""
    above, equal = key > threshold[:, None], key == threshold[:, None]
    # One scan for two counts: above in the lower half of each sum, equal in the upper. Neither
    # passes 2^14, the most keys that a program holds.
    counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 1)
    num_above, num_equal = counts & 0xFFFF, counts >> 16
    taken = above | (equal & (num_equal <= allowed[:, None]))
    place = num_above + tl.minimum(num_equal, allowed[:, None]) - 1
    index = (column - start[:, None]).to(tl.int32)
    tl.store(winners[:, None] + place * winners_k, index, mask=taken)


@triton.jit
def _write_equals(
    logits,
    logits_n,
    start,
    first,
    end,
    num_columns,
    threshold,
    allowed,
    winners,
    winners_k,
    TILE: tl.constexpr,
):
    """As `_write_best`, of a row that is not held: in one more pass over it."""
    written = tl.full((), 0, tl.int64)
    for tile in range(first // TILE, tl.cdiv(end, TILE)):
        score, column = _tile(logits, logits_n, num_columns, tile, TILE)
        key = tl.where((column >= first) & (column < end), _ordered(score), 0)
        key, column = tl.ravel(tl.trans(key)), tl.ravel(tl.trans(column))
        row = winners + written * winners_k
        _write_best(
            key[None, :],
            column[None, :],
            _one(start),
            _one(threshold),
            _one(allowed),
            _one(row),
            winners_k,
        )
        num_equal = tl.minimum(tl.sum((key == threshold).to(tl.int32), 0), allowed)
        allowed -= num_equal
        written += num_equal + tl.sum((key > threshold).to(tl.int32), 0)


@triton.jit
def _complete(
    winners,
    winners_k,
    num_winners,
    room,
    k,
    table,
    block_table_b,
    max_blocks,
    slots,
    slots_k,
    BLOCK_SIZE: tl.constexpr,
    PLACES: tl.constexpr,
):
    """-1 behind the winners, up to `room`; with `slots`, where the winners lie, and -1."""
    if slots is not None:
        tl.debug_barrier()  # the winners are read again: in order, and by fewer registers
    for first in range(0, k, PLACES):
        place = first + tl.arange(0, PLACES)[None, :]
        inside, used = place < room[:, None], place < num_winners[:, None]
        tl.store(winners[:, None] + place * winners_k, -1, mask=inside & ~used)
        if slots is not None:
            index = tl.load(winners[:, None] + place * winners_k, mask=inside & used, other=-1)
            slot = _slot(
                index, inside & used, table[:, None], max_blocks, block_table_b, BLOCK_SIZE
            )
            tl.store(slots[:, None] + place * slots_k, slot, mask=inside)


@triton.jit(
    do_not_specialize=["block_table", "request_ids", "num_rows", "max_blocks", "block_table_r"]
)
def _find_slots(
    topk_indices,
    block_table,
    request_ids,
    slots,
    num_rows,
    k,
    max_blocks,
    topk_indices_t,
    topk_indices_k,
    block_table_r,
    block_table_b,
    slots_t,
    slots_k,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (row < num_rows) & (column < k)
    index = tl.load(
        topk_indices + row * topk_indices_t + column * topk_indices_k, mask=inside, other=-1
    )
    request = tl.load(request_ids + row, mask=row < num_rows, other=0).to(tl.int64)
    table = block_table + request * block_table_r
    slot = _slot(index, inside, table, max_blocks, block_table_b, BLOCK_SIZE)
    tl.store(slots + row * slots_t + column * slots_k, slot, mask=inside)


@triton.jit
def _slot(index, wanted, table, max_blocks, block_table_b, BLOCK_SIZE: tl.constexpr):
    """Where a request's index lies, by its row of the block table; -1 if that does not say."""
    selected = wanted & (index >= 0) & (index // BLOCK_SIZE < max_blocks)
    entry = table + (index // BLOCK_SIZE).to(tl.int64) * block_table_b
    block = tl.load(entry, mask=selected, other=-1).to(tl.int64)
    return tl.where(block >= 0, block * BLOCK_SIZE + index % BLOCK_SIZE, -1)
