"""Triton kernels of topk_select.

A program holds a piece of a row in registers and finds the k-th largest of its keys bit by bit,
from the top: a radix selection with digits of one bit, whose histogram is one count. It keeps what
is larger, and of what is equal the first, in their order. Where a row is longer than a piece, the
pieces' winners, k of each, are the next round's row. The scores' distribution does not matter.
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
    """A launch a round; the winners of all but the last take k / piece of the logits' memory."""
    rows, columns = logits.shape
    taken = min(k, columns)
    piece = launch_config("topk_select", arch, "select").blocks["BLOCK"]
    if columns > piece and taken > piece // 2:
        raise ValueError(
            f"k: {k}; of rows longer than {piece} the Triton kernel for {arch.name} selects at "
            f"most {piece // 2}. DSA_KERNELS=torch has no such limit."
        )
    if rows == 0:
        return []
    rounds: list[Launch] = []
    candidates, width = None, columns
    while True:
        config = _config("select", width, arch)
        pieces = max(1, triton.cdiv(width, config.blocks["BLOCK_COLUMNS"]))
        last = pieces == 1
        winners = out if last else logits.new_empty(rows, pieces * taken, dtype=torch.int32)
        arguments = {
            "logits": logits,
            "candidates": candidates,
            "row_start": row_start if row_start is None else row_start.contiguous(),
            "row_end": row_end.contiguous(),
            "winners": winners,
            "num_rows": rows,
            "num_columns": columns,
            "width": width,
            "k": k,
            "room": k if last else taken,
            **strides("logits", logits, "tn"),
            **strides("winners", winners, "tk"),
            **(pages.arguments() if pages and last else _NO_PAGES),
        }
        grid = (triton.cdiv(rows, config.blocks["BLOCK_ROWS"]), pieces)
        rounds.append(Launch(_select, grid, arguments, config))
        if last:
            return rounds
        candidates, width = winners, pieces * taken


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
    """Rows of one piece, whole or several a program, and both rounds of longer ones."""

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    k = 2048
    for columns in (4096, 16384, 131072):
        logits = meta(64, columns, dtype=torch.float32)
        for start in (None, meta(64)):
            rounds = launches(logits, k, start, meta(64), meta(64, k), arch)
            for number, launch in enumerate(rounds, 1):
                ranged = "" if start is None else " ranges"
                yield f"select {columns}{ranged} round {number}", launch
        pages = Pages(meta(64, 2048), meta(64), 64, meta(64, k, dtype=torch.int64))
        *_, launch = launches(logits, k, None, meta(64), meta(64, k), arch, pages)
        yield f"select {columns} slots", launch
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


@triton.jit(
    do_not_specialize=[
        *("row_start", "row_end", "block_table", "request_ids"),
        *("num_rows", "num_columns", "width", "max_blocks", "block_table_r"),
    ]
)
def _select(
    logits,
    candidates,
    row_start,
    row_end,
    winners,
    block_table,
    request_ids,
    slots,
    num_rows,
    num_columns,
    width,
    k,
    room,
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
    """The best k of one piece of each row: their indices, ascending, then -1 up to `room`.

    With `slots`, those of the indices too.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    piece = tl.program_id(1)
    is_row = row < num_rows
    end = tl.minimum(tl.load(row_end + row, mask=is_row, other=0), num_columns)
    if row_start is None:
        # 0, or the range is empty. A known 0 would have Triton load four keys a thread, to move
        # them and what follows from them into another layout before the store.
        start = tl.minimum(end, 0)
    else:
        start = tl.load(row_start + row, mask=is_row, other=0).to(end.dtype)
    offset = piece * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if candidates is None:
        column = tl.minimum(tl.maximum(start, 0), num_columns)[:, None] + offset[None, :]
        valid = column < end[:, None]
    else:
        chosen = tl.load(
            candidates + row[:, None] * width + offset[None, :],
            mask=is_row[:, None] & (offset < width)[None, :],
            other=-1,
        )
        column = start[:, None] + chosen
        valid = chosen >= 0
    num_valid = tl.sum(valid.to(tl.int32), 1)

    winners += row * winners_t + piece * room * winners_k
    if tl.max(num_valid) > 0:
        address = logits + row[:, None] * logits_t + column.to(tl.int64) * logits_n
        key = tl.where(valid, _ordered(tl.load(address, mask=valid, other=0.0)), 0)
        threshold = _kth_largest(key, num_valid, k)[:, None]
        above, equal = key > threshold, key == threshold
        wanted = k - tl.sum(above.to(tl.int32), 1)[:, None]  # of the equal ones
        # One scan for two counts: above in the lower half of each sum, equal in the upper. Neither
        # passes 2^14, the largest block.
        counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 1)
        num_above, num_equal = counts & 0xFFFF, counts >> 16
        taken = above | (equal & (num_equal <= wanted))
        place = num_above + tl.minimum(num_equal, wanted) - 1
        index = (column - start[:, None]).to(tl.int32)
        tl.store(winners[:, None] + place * winners_k, index, mask=taken)
    BLOCK_PLACES: tl.constexpr = BLOCK_COLUMNS // 8 if BLOCK_COLUMNS > 8 else 1
    if slots is not None:
        request = tl.load(request_ids + row, mask=is_row, other=0).to(tl.int64)
        table = block_table + request[:, None] * block_table_r
        slots += row * slots_t
        tl.debug_barrier()  # the winners are read again: in order, and by fewer registers
    for first in range(0, room, BLOCK_PLACES):
        place = first + tl.arange(0, BLOCK_PLACES)[None, :]
        unused = (place >= num_valid[:, None]) & (place < room)
        tl.store(winners[:, None] + place * winners_k, -1, mask=is_row[:, None] & unused)
        if slots is not None:
            used = is_row[:, None] & (place < tl.minimum(num_valid, room)[:, None])
            index = tl.load(winners[:, None] + place * winners_k, mask=used, other=-1)
            slot = _slot(index, used, table, max_blocks, block_table_b, BLOCK_SIZE)
            tl.store(slots[:, None] + place * slots_k, slot, mask=is_row[:, None] & (place < room))


@triton.jit
def _ordered(value):
    """fp32 -> uint32 >= 1 in the same order, -0.0 equal to 0.0, NaN beyond infinity by its sign."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    bits ^= tl.where(bits < 0x80000000, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return tl.maximum(bits, 1)  # of two NaNs, which tie


@triton.jit
def _kth_largest(key, num_valid, k):
    """key [rows, n] uint32, 0 where invalid -> [rows] the largest t with k keys >= t; 1 if none.

    It stops early where exactly k keys are that large: then any such t separates the same keys.
    """
    threshold = tl.zeros_like(num_valid).to(tl.uint32)
    at_least = num_valid
    bit = tl.where(tl.max(at_least) > k, 31, -1)
    while bit >= 0:
        pivot = threshold | (tl.full((1,), 1, tl.uint32) << bit.to(tl.uint32))
        count = tl.sum((key >= pivot[:, None]).to(tl.int32), 1)
        enough = count >= k
        threshold = tl.where(enough, pivot, threshold)
        at_least = tl.where(enough, count, at_least)
        bit = tl.where(tl.max(at_least) > k, bit - 1, -1)
    return tl.maximum(threshold, 1)


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
