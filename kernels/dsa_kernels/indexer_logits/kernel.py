"""Triton kernels of indexer_logits.

A program holds the queries of a few rows, all heads side by side, and walks over tiles of keys.
Keys are the rows of the matrix product and heads its columns: the sum over heads stays within a few
threads, and of each row's scores only the sum leaves the registers.
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
from dsa_kernels.dims import INDEX_FP8_BYTES, INDEX_HEAD_DIM
from dsa_kernels.launch import Launch, check_near_heads, launch_config, strides
from dsa_kernels.primitives import dot, e4m3_to_fp16, load_block
from dsa_kernels.tuning import LaunchConfig

_HEAD_DIM = tl.constexpr(INDEX_HEAD_DIM)
_MIN_COLUMNS = 16  # of the matrix instructions of some chips
_PROGRAMS_PER_SM = 8  # few enough to load queries seldom, enough for a short last wave
_KEYS_PER_SM = 512  # of the tiles of a decode's programs


def indexer_logits(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    k_scale: Tensor | None,
    out: Tensor,
) -> None:
    """As the public function, into `out`."""
    for launch in launches(q, weights, k, row_start, row_end, k_scale, out, arch_of(q.device)):
        launch.run()


def indexer_logits_paged(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
) -> None:
    """As the public function, into `out`, whose width is max_context_len."""
    for launch in paged_launches(
        q, weights, cache, block_table, context_lens, out, arch_of(q.device)
    ):
        launch.run()


def launches(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    k_scale: Tensor | None,
    out: Tensor,
    arch: Arch,
) -> list[Launch]:
    rows, keys = out.shape
    if out.numel() == 0:
        return []
    config = _config("prefill", q, rows, arch)
    groups = triton.cdiv(rows, _rows_a_program(config))
    programs = _PROGRAMS_PER_SM * arch.num_sms
    tiles, segments = _split_keys(keys, groups, config, programs)
    arguments = {
        **_queries(q, weights, arch),
        "keys": _bytes_if_fp8(k),
        "key_scales": None if k_scale is None else k_scale.contiguous(),
        "row_start": row_start.contiguous(),
        "row_end": row_end.contiguous(),
        "out": out,
        "num_rows": rows,
        "num_keys": keys,
        "tiles": tiles,
        **strides("keys", k, "nd"),
        **strides("out", out, "tn"),
    }
    return [Launch(_score_rows, (groups, segments), arguments, config)]


def paged_launches(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    arch: Arch,
) -> list[Launch]:
    batch, next_n, _, _ = q.shape
    keys = out.shape[1]
    if out.numel() == 0:
        return []
    q, weights = q.flatten(0, 1), weights.flatten(0, 1)
    config = _config("paged", q, next_n, arch)
    groups = triton.cdiv(next_n, _rows_a_program(config))
    programs = paged_programs_per_sm(config) * arch.num_sms
    tiles, segments = _split_keys(keys, batch * groups, config, programs)
    blocks, block_size, _ = cache.shape
    arguments = {
        **_queries(q, weights, arch),
        "cache": cache,
        "block_table": block_table,
        "context_lens": context_lens.contiguous(),
        "out": out,
        "next_n": next_n,
        "num_keys": keys,
        "num_blocks": blocks,
        "tiles": tiles,
        "cache_b": cache.stride(0),
        "cache_t": INDEX_HEAD_DIM if cache.dtype == torch.uint8 else cache.stride(1),
        **strides("block_table", block_table, "rb"),
        **strides("out", out, "tn"),
        "BLOCK_SIZE": block_size,
    }
    return [Launch(_score_requests, (batch * groups, segments), arguments, config)]


def compile_cases(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """Both kernels, for each precision and for the head counts of the models we know."""
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    variants = [(fp8, 64), (fp8, 32), (fp8, 8), (bf16, 64), (bf16, 32)]
    for dtype, heads in (*variants, (torch.float16, 64), (torch.float32, 64)):
        name = f"{str(dtype).removeprefix('torch.')} heads {heads}"
        yield f"prefill {name}", _prefill_case(dtype, heads, arch)
        for next_n in (1, 2):
            yield f"paged {name} next_n {next_n}", _paged_case(dtype, heads, next_n, arch)


def _prefill_case(dtype: torch.dtype, heads: int, arch: Arch) -> Launch:
    rows, keys = 4096, 8192
    bound = _meta(rows, dtype=torch.int32)
    (launch,) = launches(
        _meta(rows, heads, INDEX_HEAD_DIM, dtype=dtype),
        _meta(rows, heads),
        _meta(keys, INDEX_HEAD_DIM, dtype=dtype),
        bound,
        bound,
        _meta(keys) if dtype == torch.float8_e4m3fn else None,
        _meta(rows, keys),
        arch,
    )
    return launch


def _paged_case(dtype: torch.dtype, heads: int, next_n: int, arch: Arch) -> Launch:
    fp8 = dtype == torch.float8_e4m3fn
    width = INDEX_FP8_BYTES if fp8 else INDEX_HEAD_DIM
    (launch,) = paged_launches(
        _meta(8, next_n, heads, INDEX_HEAD_DIM, dtype=dtype),
        _meta(8, next_n, heads),
        _meta(1000, 64, width, dtype=torch.uint8 if fp8 else dtype),
        _meta(8, 512, dtype=torch.int32),
        _meta(8, next_n, dtype=torch.int32),
        _meta(8 * next_n, 32768),
        arch,
    )
    return launch


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _config(phase: str, q: Tensor, rows: int, arch: Arch) -> LaunchConfig:
    """The table's entry, its product narrowed to the columns that `rows` rows can fill.

    The shape key is (prefill or paged, bits of a query's value); of fp8 also how many heads, 32, or
    64 where they are more, in a decode of one row a request.
    """
    heads, bits = _block_heads(q), 8 * q.dtype.itemsize
    many = heads > 32 and (phase == "prefill" or rows == 1)
    key = (phase, bits) if bits > 8 else (phase, bits, 64 if many else 32)
    config = launch_config("indexer_logits", arch, key)
    needed = max(heads, min(config.blocks["BLOCK_COLUMNS"], heads * triton.next_power_of_2(rows)))
    blocks = {**config.blocks, "BLOCK_COLUMNS": max(needed, _MIN_COLUMNS), "BLOCK_HEADS": heads}
    return replace(config, blocks=blocks)


def paged_programs_per_sm(config: LaunchConfig) -> int:
    """Programs of a decode that one SM takes: of wide tiles fewer."""
    return min(_PROGRAMS_PER_SM, _KEYS_PER_SM // config.blocks["BLOCK_KEYS"])


def _block_heads(q: Tensor) -> int:
    return int(triton.next_power_of_2(q.shape[1]))


def _rows_a_program(config: LaunchConfig) -> int:
    return config.blocks["BLOCK_COLUMNS"] // config.blocks["BLOCK_HEADS"]


def _split_keys(keys: int, groups: int, config: LaunchConfig, programs: int) -> tuple[int, int]:
    """Tiles a program, and programs that share the keys of one group of rows."""
    tiles = triton.cdiv(keys, config.blocks["BLOCK_KEYS"])
    segments = min(tiles, triton.cdiv(programs, groups))
    tiles_a_program = triton.cdiv(tiles, segments)
    return tiles_a_program, triton.cdiv(tiles, tiles_a_program)


def _bytes_if_fp8(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _queries(q: Tensor, weights: Tensor, arch: Arch) -> dict[str, Any]:
    check_near_heads(q=q, weights=weights)
    return {
        "q": _bytes_if_fp8(q),
        "weights": weights,
        "heads": q.shape[1],
        **strides("q", q, "thd"),
        **strides("weights", weights, "th"),
        "FP8": q.dtype == torch.float8_e4m3fn,
        "HAS_E4M3": arch.has_e4m3,
    }


@triton.jit(do_not_specialize=["row_start", "row_end", "num_rows", "num_keys", "tiles"])
def _score_rows(
    q,
    weights,
    keys,
    key_scales,
    row_start,
    row_end,
    out,
    num_rows,
    num_keys,
    tiles,
    heads,
    q_t,
    q_h,
    q_d,
    weights_t,
    weights_h,
    keys_n,
    keys_d,
    out_t,
    out_n,
    FP8: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Prefill: rows against one run of keys, each row with its own range, which may exceed it."""
    BLOCK_ROWS: tl.constexpr = BLOCK_COLUMNS // BLOCK_HEADS
    # Later rows of a prompt see more keys: they start first, and short rows fill the last wave.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK_ROWS
    q, keys = _typed(q, FP8, HAS_E4M3), _typed(keys, FP8, HAS_E4M3)
    query, weight = _load_queries(
        q, weights, first_row, num_rows, heads, q_t, q_h, q_d, weights_t,
        weights_h, FP8, HAS_E4M3, BLOCK_COLUMNS, BLOCK_HEADS,
    )  # fmt: skip
    row, offset = _outputs(first_row, BLOCK_ROWS, BLOCK_KEYS)
    out_row, is_row = out + row * out_t, row < num_rows
    start = tl.load(row_start + row, mask=is_row, other=0)
    end = tl.load(row_end + row, mask=is_row, other=0)

    low = tl.maximum(tl.min(tl.where(start < end, start, num_keys)), 0).to(tl.int32)
    high = tl.minimum(tl.max(tl.where(start < end, end, 0)), num_keys).to(tl.int32)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(num_keys, BLOCK_KEYS))
    scored_first = tl.minimum(tl.maximum(low // BLOCK_KEYS, first), last)
    scored_last = tl.maximum(tl.minimum(tl.cdiv(high, BLOCK_KEYS), last), scored_first)
    _fill(out_row, is_row, offset, first, scored_first, num_keys, out_n, BLOCK_KEYS)
    for tile in tl.range(scored_first, scored_last):
        token = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        is_key = token < num_keys
        address = keys + token.to(tl.int64)[:, None] * keys_n
        address += tl.arange(0, _HEAD_DIM)[None, :] * keys_d
        key = tl.load(address, mask=is_key[:, None], other=0.0)
        logits = _score(key, query, weight, FP8, HAS_E4M3, BLOCK_ROWS)
        if FP8:
            logits *= tl.load(key_scales + token, mask=is_key, other=0)[:, None]
        token = tile * BLOCK_KEYS + offset
        inside = (token >= start) & (token < end)
        _store(out_row, is_row, token, num_keys, inside, logits, out_n)
    _fill(out_row, is_row, offset, scored_last, last, num_keys, out_n, BLOCK_KEYS)


@triton.jit(
    do_not_specialize=[
        *("block_table", "context_lens", "num_keys", "num_blocks", "tiles", "block_table_r"),
    ]
)
def _score_requests(
    q,
    weights,
    cache,
    block_table,
    context_lens,
    out,
    next_n,
    num_keys,
    num_blocks,
    tiles,
    heads,
    q_t,
    q_h,
    q_d,
    weights_t,
    weights_h,
    cache_b,
    cache_t,
    block_table_r,
    block_table_b,
    out_t,
    out_n,
    FP8: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Decode: rows of one request against the keys in its pages of the cache."""
    BLOCK_ROWS: tl.constexpr = BLOCK_COLUMNS // BLOCK_HEADS
    groups = tl.cdiv(next_n, BLOCK_ROWS)
    request = (tl.program_id(0) // groups).to(tl.int64)
    first_row = request * next_n + tl.program_id(0) % groups * BLOCK_ROWS
    end_row = (request + 1) * next_n
    q = _typed(q, FP8, HAS_E4M3)
    query, weight = _load_queries(
        q, weights, first_row, end_row, heads, q_t, q_h, q_d, weights_t,
        weights_h, FP8, HAS_E4M3, BLOCK_COLUMNS, BLOCK_HEADS,
    )  # fmt: skip
    row, offset = _outputs(first_row, BLOCK_ROWS, BLOCK_KEYS)
    out_row, is_row = out + row * out_t, row < end_row
    end = tl.load(context_lens + row, mask=is_row, other=0)

    high = tl.minimum(tl.max(end), num_keys).to(tl.int32)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(num_keys, BLOCK_KEYS))
    scored_last = tl.maximum(tl.minimum(tl.cdiv(high, BLOCK_KEYS), last), first)
    for tile in tl.range(first, scored_last):
        token = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        is_key = token < high
        entry = block_table + request * block_table_r + token // BLOCK_SIZE * block_table_b
        block = load_block(entry, is_key, num_blocks)
        page, slot = cache + block * cache_b, token % BLOCK_SIZE
        address = _typed(page, FP8, HAS_E4M3)[:, None] + slot[:, None] * cache_t
        address += tl.arange(0, _HEAD_DIM)[None, :]
        key = tl.load(address, mask=is_key[:, None], other=0.0)
        logits = _score(key, query, weight, FP8, HAS_E4M3, BLOCK_ROWS)
        if FP8:
            scales = (page + BLOCK_SIZE * _HEAD_DIM).to(tl.pointer_type(tl.float32))
            logits *= tl.load(scales + slot, mask=is_key, other=0)[:, None]
        token = tile * BLOCK_KEYS + offset
        _store(out_row, is_row, token, num_keys, token < end, logits, out_n)
    _fill(out_row, is_row, offset, scored_last, last, num_keys, out_n, BLOCK_KEYS)


@triton.jit
def _typed(pointer, FP8: tl.constexpr, HAS_E4M3: tl.constexpr):
    """Where bytes are e4m3 and the chip multiplies it, the loaded tile needs no conversion."""
    return pointer.to(tl.pointer_type(tl.float8e4nv)) if FP8 and HAS_E4M3 else pointer


@triton.jit
def _load_queries(
    q,
    weights,
    first_row,
    end_row,
    heads,
    q_t,
    q_h,
    q_d,
    weights_t,
    weights_h,
    FP8: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Queries [128, rows x heads] and their weights [rows x heads]; zeros for padding."""
    column = tl.arange(0, BLOCK_COLUMNS)
    row, head = first_row + column // BLOCK_HEADS, column % BLOCK_HEADS
    is_column = (row < end_row) & (head < heads)
    weight = tl.load(weights + row * weights_t + head * weights_h, mask=is_column, other=0)
    address = q + row * q_t + head * q_h
    address = address[None, :] + tl.arange(0, _HEAD_DIM)[:, None] * q_d
    query = tl.load(address, mask=is_column[None, :], other=0.0)
    weight *= 0.5  # of the relu's 2
    if FP8 and not HAS_E4M3:
        query = e4m3_to_fp16(query)
        weight *= 65536.0  # query and key are 2^-8 of what they mean
    return query, weight


@triton.jit
def _score(key, query, weight, FP8: tl.constexpr, HAS_E4M3: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """key [keys, 128] . query [128, rows x heads] -> [keys, rows] fp32, before the keys' scales."""
    BLOCK_HEADS: tl.constexpr = weight.shape[0] // BLOCK_ROWS
    if FP8 and not HAS_E4M3:
        key = e4m3_to_fp16(key)
    product = dot(key, query)
    # x + |x| is 2 relu(x) in one addition; a maximum takes twice as long on some chips, and would
    # turn NaN into 0.
    product = (product + tl.abs(product)) * weight[None, :]
    return tl.sum(tl.reshape(product, (key.shape[0], BLOCK_ROWS, BLOCK_HEADS)), 2)


@triton.jit
def _outputs(first_row, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Row and key, within its tile, of each logit of a tile, [rows x keys].

    One-dimensional: a two-dimensional tile with few rows would change layouts, through shared
    memory, for each of its row and column vectors.
    """
    index = tl.arange(0, BLOCK_ROWS * BLOCK_KEYS)
    return first_row + index // BLOCK_KEYS, index % BLOCK_KEYS


@triton.jit
def _store(out_row, is_row, token, num_keys, inside, logits, out_n):
    """One tile of logits [keys, rows]; -inf outside a row's range."""
    logits = tl.reshape(tl.trans(logits), token.shape)
    logits = tl.where(inside, logits, float("-inf"))
    address = out_row + token.to(tl.int64) * out_n
    tl.store(address, logits, mask=is_row & (token < num_keys))


@triton.jit
def _fill(out_row, is_row, offset, first, last, num_keys, out_n, BLOCK_KEYS: tl.constexpr):
    """-inf into the tiles that no row of the program sees."""
    for tile in range(first, last):
        token = tile * BLOCK_KEYS + offset
        address = out_row + token.to(tl.int64) * out_n
        tl.store(address, float("-inf"), mask=is_row & (token < num_keys))
