"""Triton kernels of the checks: three a layer in a decode, each with a program a row.

A prefill has one more for each part of its rows that attention goes through by itself.
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
from dsa_kernels.dims import (
    INDEX_FP8_BYTES,
    INDEX_HEAD_DIM,
    LATENT_DIM,
    LATENT_FP8_BYTES,
)
from dsa_kernels.invariants.bits import (
    BFLOAT16,
    E4M3,
    FLOAT16,
    FLOAT32,
    fill_key,
    fill_latent,
    has_nan,
    look_at_keys,
    look_at_latent,
)
from dsa_kernels.invariants.device import (
    CHECK_COUNT,
    CHECK_KEY,
    CHECK_LATENT,
    CHECK_OUT,
    CHECK_PLACE,
    CHECK_QUERY,
    CHECK_READ,
    CHECK_USED,
    COUNT,
    KEY_NAN,
    KEY_UNWRITTEN,
    LATENT_NAN,
    LATENT_UNWRITTEN,
    OUT_NAN,
    PAGES,
    PLACE,
    QUERY_NAN,
    find_block,
    kind_and_column,
    look_at_page,
    look_at_selection,
    note,
    slot_of,
)
from dsa_kernels.invariants.findings import FIELDS, NOTES
from dsa_kernels.invariants.inputs import LayerMemory, Rows, Used
from dsa_kernels.launch import Launch, launch_config, strides
from dsa_kernels.tuning import LaunchConfig

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_GREATEST = {
    torch.float8_e4m3fn: E4M3.value,
    torch.float16: FLOAT16.value,
    torch.bfloat16: BFLOAT16.value,
    torch.float32: FLOAT32.value,
    torch.uint8: 0,  # an fp8 cache, whose parts have dtypes of their own
}

_NOTES = tl.constexpr(NOTES)
_HEAD_DIM = tl.constexpr(INDEX_HEAD_DIM)
_NO_ROW = tl.constexpr(2**63 - 1)


def mark_rows(rows: Rows, memory: LayerMemory, findings: Tensor) -> None:
    """As the public function, into `findings`."""
    for launch in mark_launches(rows, memory, findings, arch_of(findings.device)):
        launch.run()


def check_rows(rows: Rows, memory: LayerMemory, used: Used, findings: Tensor) -> None:
    """As the public function."""
    for launch in launches(rows, memory, used, findings, arch_of(findings.device)):
        launch.run()


def keep_first(
    rows: Rows, findings: Tensor, out: Tensor, layer: Tensor, number: Tensor, first: Tensor
) -> None:
    """As the public function."""
    arch = arch_of(findings.device)
    for launch in keep_launches(rows, findings, out, (layer, number, first), arch):
        launch.run()


def mark_launches(rows: Rows, memory: LayerMemory, findings: Tensor, arch: Arch) -> list[Launch]:
    tokens = len(rows.slots)
    if tokens == 0:
        return []
    arguments = {
        "findings": findings,
        "positions": rows.positions.contiguous(),
        "num_rows": tokens,
        **_places(rows, memory),
        **_caches(memory),
    }
    return [Launch(_mark_rows, (tokens,), arguments, launch_config("invariants", arch, "mark"))]


def launches(
    rows: Rows, memory: LayerMemory, used: Used, findings: Tensor, arch: Arch
) -> list[Launch]:
    tokens = used.rows.stop - used.rows.start
    if tokens == 0:
        return []
    query, weights = used.query or (None, None)
    caches = _caches(memory)
    arguments = {
        "findings": findings,
        **_places(rows, memory),
        **caches,
        "query": None if query is None else _bits(query),
        "query_weights": None if weights is None else _bits(weights),
        "topk_indices": used.topk_indices,
        "topk_slots": used.slots,
        "first_row": used.rows.start,
        "heads": 0 if query is None else query.shape[1],
        "k": used.topk_indices.shape[1],
        **strides("query", query, "thd"),
        **strides("query_weights", weights, "th"),
        **strides("topk_indices", used.topk_indices, "tk"),
        **strides("topk_slots", used.slots, "tk"),
        "LATENT_GREATEST": _GREATEST[memory.latent_cache.dtype],
        "KEY_GREATEST": 0 if memory.key_cache is None else _GREATEST[memory.key_cache.dtype],
        "QUERY_GREATEST": 0 if query is None else _GREATEST[query.dtype],
        "OURS_ALONE": memory.ours_alone,
        "SELECTED": used.selected,
    }
    wide = memory.latent_cache.dtype == torch.float32
    config = _cut(
        launch_config("invariants", arch, "check float32" if wide else "check"),
        BLOCK_TOKENS=rows.block_size,
        BLOCK_HEADS=arguments["heads"],
        BLOCK_COLUMNS=used.topk_indices.shape[1],
    )
    return [Launch(_check_rows, (tokens,), arguments, config)]


def keep_launches(
    rows: Rows, findings: Tensor, out: Tensor, record: tuple[Tensor, Tensor, Tensor], arch: Arch
) -> list[Launch]:
    """`record`: numbers of the layer and the pass, and the first violation."""
    tokens, heads, width = out.shape
    if tokens == 0:
        return []
    layer, number, first = record
    arguments = {
        "findings": findings,
        "out": _bits(out),
        "requests": rows.requests.contiguous(),
        "positions": rows.positions.contiguous(),
        "slots": rows.slots.contiguous(),
        "layer": layer,
        "number": number,
        "first": first,
        "num_rows": tokens,
        "heads": heads,
        "width": width,
        **strides("out", out, "thd"),
        "BLOCK_SIZE": rows.block_size,
        "GREATEST": _GREATEST[out.dtype],
        "WIDTH": triton.next_power_of_2(width),
    }
    config = _cut(launch_config("invariants", arch, "keep"), BLOCK_HEADS=heads)
    return [Launch(_keep_first, (tokens,), arguments, config)]


def compile_cases(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """Each kind of caches, with and without an index query, slots, or an indexer.

    float16's differ from bfloat16's by a constant.
    """

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, blocks, size, int32 = 64, 1000, 64, torch.int32
    ids, table = meta(tokens, dtype=int32), meta(8, 64, dtype=int32)
    rows = Rows(ids, meta(tokens), ids, meta(tokens), table, size, blocks)
    findings, indices = meta(tokens + 1, NOTES), meta(tokens, 2048, dtype=int32)
    slots, written = meta(tokens, 2048), meta(blocks + 1, size, dtype=int32)
    every = slice(0, tokens)
    for dtype in (torch.bfloat16, torch.float32, torch.uint8):
        fp8 = dtype == torch.uint8
        name = "fp8" if fp8 else str(dtype).removeprefix("torch.")
        latents = meta(blocks, size, LATENT_FP8_BYTES if fp8 else LATENT_DIM, dtype=dtype)
        keys = meta(blocks, size, INDEX_FP8_BYTES if fp8 else INDEX_HEAD_DIM, dtype=dtype)
        q = meta(tokens, 64, INDEX_HEAD_DIM, dtype=torch.float8_e4m3fn if fp8 else dtype)
        query = q, meta(tokens, 64, dtype=torch.float32)
        memory = LayerMemory(latents, keys, written, ours_alone=True)
        shared = replace(memory, key_cache=None)
        for what, of in {"": memory, " without keys": shared}.items():
            (launch,) = mark_launches(rows, of, findings, arch)
            yield f"mark {name}{what}", launch
        for what, of, used in (
            ("", memory, Used(every, indices, slots, True, query)),
            (" without slots", memory, Used(every, indices, None, True, query)),
            (" without query", memory, Used(every, indices, slots, True, None)),
            (" without keys", shared, Used(every, indices, slots, False, None)),
        ):
            (launch,) = launches(rows, of, used, findings, arch)
            yield f"check {name}{what}", launch
        if not fp8:
            for width in (128, 256):
                out = meta(tokens, 128, width, dtype=dtype)
                record = meta(1), meta(1), meta(len(FIELDS))
                (launch,) = keep_launches(rows, findings, out, record, arch)
                yield f"keep {name} {width}", launch


def _places(rows: Rows, memory: LayerMemory) -> dict[str, Any]:
    return {
        "requests": rows.requests.contiguous(),
        "lens": rows.lens.contiguous(),
        "slots": rows.slots.contiguous(),
        "block_table": rows.block_table,
        "written": memory.written,
        "num_blocks": rows.num_blocks,
        "max_blocks": rows.block_table.shape[1],
        **strides("block_table", rows.block_table, "rb"),
        "BLOCK_SIZE": rows.block_size,
    }


def _caches(memory: LayerMemory) -> dict[str, Any]:
    latents, keys = memory.latent_cache, memory.key_cache
    return {
        "latent_cache": _bits(latents),
        "key_cache": None if keys is None else _bits(keys),
        **strides("latent_cache", latents, "bt"),
        **strides("key_cache", keys, "bt"),
        "LATENT_FP8": latents.dtype == torch.uint8,
        "KEY_FP8": keys is not None and keys.dtype == torch.uint8,
    }


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.itemsize])


def _cut(config: LaunchConfig, **sizes: int) -> LaunchConfig:
    """The table's entry, each of these blocks cut to what there is."""
    cut = {
        name: min(config.blocks[name], triton.next_power_of_2(max(size, 1)))
        for name, size in sizes.items()
    }
    return replace(config, blocks={**config.blocks, **cut})


@triton.jit(
    do_not_specialize=[
        *("requests", "positions", "lens", "slots", "block_table"),
        *("num_rows", "num_blocks", "max_blocks", "block_table_r"),
    ]
)
def _mark_rows(
    findings,
    requests,
    positions,
    lens,
    slots,
    block_table,
    written,
    latent_cache,
    key_cache,
    num_rows,
    num_blocks,
    max_blocks,
    block_table_r,
    block_table_b,
    latent_cache_b,
    latent_cache_t,
    key_cache_b,
    key_cache_t,
    BLOCK_SIZE: tl.constexpr,
    LATENT_FP8: tl.constexpr,
    KEY_FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    length = tl.load(lens + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    if (slot >= BLOCK_SIZE) & (slot < num_blocks.to(tl.int64) * BLOCK_SIZE):
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        entry = latent_cache + block * latent_cache_b + offset * latent_cache_t
        fill_latent(entry, LATENT_FP8)
        if key_cache is not None:
            fill_key(key_cache, block, offset, key_cache_b, key_cache_t, BLOCK_SIZE, KEY_FP8)
        tl.store(written + slot, position.to(tl.int32))

    table = block_table + tl.load(requests + row).to(tl.int64) * block_table_r
    block = find_block(table, position // BLOCK_SIZE, block_table_b, max_blocks, num_blocks)
    place = block * BLOCK_SIZE + position % BLOCK_SIZE
    misplaced = (slot != place) | (length != position + 1) | (position < 0)
    wrong = ((slot >= BLOCK_SIZE) & misplaced).to(tl.int64)
    finding = findings + row * _NOTES
    tl.store(finding, wrong * CHECK_PLACE)
    tl.store(finding + 1, wrong * PLACE)
    tl.store(finding + 2, wrong * slot)
    tl.store(finding + 3, wrong * length)
    if row == 0:
        first_come = findings + num_rows.to(tl.int64) * _NOTES
        tl.store(first_come, tl.full((), _NO_ROW, tl.int64))
        tl.store(first_come + 1, 0)


@triton.jit(
    do_not_specialize=[
        *("requests", "lens", "slots", "block_table"),
        *("first_row", "num_blocks", "max_blocks", "block_table_r"),
    ]
)
def _check_rows(
    findings,
    requests,
    lens,
    slots,
    block_table,
    written,
    latent_cache,
    key_cache,
    query,
    query_weights,
    topk_indices,
    topk_slots,
    first_row,
    num_blocks,
    max_blocks,
    heads,
    k,
    block_table_r,
    block_table_b,
    latent_cache_b,
    latent_cache_t,
    key_cache_b,
    key_cache_t,
    query_t,
    query_h,
    query_d,
    query_weights_t,
    query_weights_h,
    topk_indices_t,
    topk_indices_k,
    topk_slots_t,
    topk_slots_k,
    BLOCK_SIZE: tl.constexpr,
    LATENT_FP8: tl.constexpr,
    KEY_FP8: tl.constexpr,
    LATENT_GREATEST: tl.constexpr,
    KEY_GREATEST: tl.constexpr,
    QUERY_GREATEST: tl.constexpr,
    OURS_ALONE: tl.constexpr,
    SELECTED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    of_part = tl.program_id(0).to(tl.int64)
    row = first_row + of_part
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= BLOCK_SIZE:
        finding = findings + row * _NOTES
        found = tl.load(finding)
        length = tl.load(lens + row).to(tl.int64)
        table = block_table + tl.load(requests + row).to(tl.int64) * block_table_r

        stored = slot < num_blocks.to(tl.int64) * BLOCK_SIZE
        inside = tl.where(stored, slot, 0)
        block, offset = inside // BLOCK_SIZE, inside % BLOCK_SIZE
        entry = latent_cache + block * latent_cache_b + offset * latent_cache_t
        filled, nan = look_at_latent(entry, LATENT_GREATEST, LATENT_FP8)
        kind = tl.where(filled | (stored == 0), LATENT_UNWRITTEN, tl.where(nan, LATENT_NAN, 0))
        found = note(finding, found, CHECK_LATENT, kind, slot, slot)
        if key_cache is not None:
            offsets = offset + tl.arange(0, 1)
            filled, nan = look_at_keys(
                key_cache, block, offsets, offsets >= 0, key_cache_b, key_cache_t, BLOCK_SIZE,
                KEY_GREATEST, KEY_FP8,
            )  # fmt: skip
            kind = tl.max(tl.where(nan != 0, KEY_NAN, 0), 0)
            kind = tl.where((tl.max(filled, 0) != 0) | (stored == 0), KEY_UNWRITTEN, kind)
            found = note(finding, found, CHECK_KEY, kind, slot, slot)
        if query is not None:
            of_row, weights = query + row * query_t, query_weights + row * query_weights_t
            nan = has_nan(
                of_row, heads, _HEAD_DIM, query_h, query_d, QUERY_GREATEST, BLOCK_HEADS, _HEAD_DIM
            )
            nan |= has_nan(weights, heads, 1, query_weights_h, 1, FLOAT32, BLOCK_HEADS, 1)
            found = note(finding, found, CHECK_QUERY, tl.where(nan, QUERY_NAN, 0), slot, slot)

        page = length % tl.maximum((length + BLOCK_SIZE - 1) // BLOCK_SIZE, 1)
        block = find_block(table, page, block_table_b, max_blocks, num_blocks)
        greatest = look_at_page(
            written, key_cache, block, page, length, num_blocks, key_cache_b, key_cache_t,
            BLOCK_SIZE, KEY_GREATEST, KEY_FP8, OURS_ALONE, BLOCK_TOKENS,
        )  # fmt: skip
        kind, column = kind_and_column(greatest)
        if kind != 0:
            held = tl.load(written + block * BLOCK_SIZE + column)
            found = note(finding, found, CHECK_READ, kind, page * BLOCK_SIZE + column, held)

        topk_indices += row * topk_indices_t
        if topk_slots is not None:
            topk_slots += of_part * topk_slots_t
        count, greatest = look_at_selection(
            topk_indices, topk_slots, written, table, length, k, num_blocks, max_blocks,
            block_table_b, topk_indices_k, topk_slots_k, BLOCK_SIZE, OURS_ALONE, BLOCK_COLUMNS,
        )  # fmt: skip
        if SELECTED:
            due = tl.minimum(length, k)
            kind = tl.where(count != due, COUNT, 0)
            found = note(finding, found, CHECK_COUNT, kind, count, due)
        kind, column = kind_and_column(greatest)
        if kind != 0:
            index = tl.load(topk_indices + column * topk_indices_k)
            at = slot_of(table, index, block_table_b, max_blocks, num_blocks, BLOCK_SIZE)
            seen = tl.load(written + at).to(tl.int64)
            if topk_slots is not None:
                looked_for = tl.load(topk_slots + column * topk_slots_k)
                seen = tl.where(kind == PAGES, looked_for, seen)
            note(finding, found, CHECK_USED, kind, index, seen)


@triton.jit(do_not_specialize=["requests", "positions", "slots", "num_rows"])
def _keep_first(
    findings,
    out,
    requests,
    positions,
    slots,
    layer,
    number,
    first,
    num_rows,
    heads,
    width,
    out_t,
    out_h,
    out_d,
    BLOCK_SIZE: tl.constexpr,
    GREATEST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """The row that comes last keeps the first finding; they come in any order."""
    row = tl.program_id(0).to(tl.int64)
    check = tl.load(findings + row * _NOTES)
    if (tl.load(slots + row) >= BLOCK_SIZE) & (check == 0):
        nan = has_nan(out + row * out_t, heads, width, out_h, out_d, GREATEST, BLOCK_HEADS, WIDTH)
        check = tl.where(nan, CHECK_OUT, check)
    first_come = findings + num_rows.to(tl.int64) * _NOTES
    # Checks are less than 2^31 and come before rows.
    tl.atomic_min(first_come, (check << 32) | row, mask=check != 0)
    if tl.atomic_add(first_come + 1, 1) == num_rows - 1:
        least = tl.atomic_min(first_come, tl.full((), _NO_ROW, tl.int64))
        if (least != _NO_ROW) & (tl.load(first) == 0):
            row, check = least & 0xFFFFFFFF, least >> 32
            finding, slot = findings + row * _NOTES, tl.load(slots + row).to(tl.int64)
            is_out = check == CHECK_OUT
            tl.store(first, tl.where(is_out, OUT_NAN, tl.load(finding + 1)))
            tl.store(first + 1, tl.load(layer))
            tl.store(first + 2, tl.load(number))
            tl.store(first + 3, row)
            tl.store(first + 4, tl.load(requests + row).to(tl.int64))
            tl.store(first + 5, tl.load(positions + row).to(tl.int64))
            tl.store(first + 6, tl.where(is_out, slot, tl.load(finding + 2)))
            tl.store(first + 7, tl.where(is_out, slot, tl.load(finding + 3)))
