"""Device functions of the checks: where a page lies, what is wrong there, and how it is noted.

Of a row's columns the greatest kind is told, of those the first: one maximum has both, of
`kind << 26 | last - column`.
"""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from dsa_kernels.invariants.bits import look_at_keys
from dsa_kernels.invariants.findings import Check, Kind

_SHIFT = tl.constexpr(26)
_LAST = tl.constexpr((1 << 26) - 1)
CHECK_PLACE = tl.constexpr(int(Check.PLACE))
CHECK_LATENT = tl.constexpr(int(Check.LATENT))
CHECK_KEY = tl.constexpr(int(Check.KEY))
CHECK_QUERY = tl.constexpr(int(Check.QUERY))
CHECK_READ = tl.constexpr(int(Check.READ))
CHECK_COUNT = tl.constexpr(int(Check.COUNT))
CHECK_USED = tl.constexpr(int(Check.USED))
CHECK_OUT = tl.constexpr(int(Check.OUT))
PLACE = tl.constexpr(int(Kind.PLACE))
LATENT_UNWRITTEN = tl.constexpr(int(Kind.LATENT_UNWRITTEN))
LATENT_NAN = tl.constexpr(int(Kind.LATENT_NAN))
KEY_UNWRITTEN = tl.constexpr(int(Kind.KEY_UNWRITTEN))
KEY_NAN = tl.constexpr(int(Kind.KEY_NAN))
QUERY_NAN = tl.constexpr(int(Kind.QUERY_NAN))
STALE = tl.constexpr(int(Kind.STALE))
READ_KEY_NAN = tl.constexpr(int(Kind.READ_KEY_NAN))
PAGES = tl.constexpr(int(Kind.PAGES))
ORDER = tl.constexpr(int(Kind.ORDER))
RANGE = tl.constexpr(int(Kind.RANGE))
COUNT = tl.constexpr(int(Kind.COUNT))
OUT_NAN = tl.constexpr(int(Kind.OUT_NAN))


@triton.jit
def find_block(table, page, block_table_b, max_blocks, num_blocks):
    """Block, int64, of a page by its request's row of the table; `num_blocks` or 0 for none."""
    page = tl.minimum(tl.maximum(page, 0), max_blocks - 1)
    block = tl.load(table + page.to(tl.int64) * block_table_b)
    return tl.minimum(tl.maximum(block, 0), num_blocks).to(tl.int64)


@triton.jit
def slot_of(table, index, block_table_b, max_blocks, num_blocks, BLOCK_SIZE: tl.constexpr):
    """Slots, int64, of a request's positions; of negative ones that of the first."""
    index = tl.maximum(index, 0)
    block = find_block(table, index // BLOCK_SIZE, block_table_b, max_blocks, num_blocks)
    return block * BLOCK_SIZE + index % BLOCK_SIZE


@triton.jit
def look_at_page(
    written,
    key_cache,
    block,
    page,
    length,
    num_blocks,
    key_cache_b,
    key_cache_t,
    BLOCK_SIZE: tl.constexpr,
    KEY_GREATEST: tl.constexpr,
    KEY_FP8: tl.constexpr,
    OURS_ALONE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """The greatest kind in what a row sees of a page, with its column."""
    greatest = tl.full((), 0, tl.int32)
    for first in range(0, BLOCK_SIZE, BLOCK_TOKENS):
        column = first + tl.arange(0, BLOCK_TOKENS)
        position = page * BLOCK_SIZE + column
        seen = (column < BLOCK_SIZE) & (position < length)
        held = tl.load(written + block * BLOCK_SIZE + column, mask=seen, other=0)
        kind = tl.where(seen & _is_stale(held, position, block, num_blocks, OURS_ALONE), STALE, 0)
        if key_cache is not None:
            there = tl.minimum(block, num_blocks - 1)
            _, nan = look_at_keys(
                key_cache, there, column.to(tl.int64), seen, key_cache_b, key_cache_t, BLOCK_SIZE,
                KEY_GREATEST, KEY_FP8,
            )  # fmt: skip
            kind = tl.where(nan != 0, READ_KEY_NAN, kind)
        greatest = tl.maximum(greatest, _greatest(kind, column))
    return greatest


@triton.jit
def look_at_selection(
    topk_indices,
    topk_slots,
    written,
    table,
    length,
    k,
    num_blocks,
    max_blocks,
    block_table_b,
    topk_indices_k,
    topk_slots_k,
    BLOCK_SIZE: tl.constexpr,
    OURS_ALONE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """How many indices a row has, and the greatest kind in them, with its column."""
    count, greatest = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for first in range(0, k, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        inside, follows = column < k, (column > 0) & (column < k)
        index = tl.load(topk_indices + column * topk_indices_k, mask=inside, other=-1)
        before = tl.load(topk_indices + (column - 1) * topk_indices_k, mask=follows, other=-1)
        chosen = index >= 0
        count += tl.sum(chosen.to(tl.int32), 0)
        at = slot_of(table, index, block_table_b, max_blocks, num_blocks, BLOCK_SIZE)
        held = tl.load(written + at, mask=chosen, other=0)
        stale = _is_stale(held, index, at // BLOCK_SIZE, num_blocks, OURS_ALONE)
        kind = tl.where(chosen & stale, STALE, 0)
        if topk_slots is not None:
            looked_for = tl.load(topk_slots + column * topk_slots_k, mask=chosen, other=0)
            kind = tl.where(chosen & (looked_for != at), PAGES, kind)
        # What is padding comes last, so an index after it does not follow it either.
        kind = tl.where(chosen & follows & ((before < 0) | (index <= before)), ORDER, kind)
        kind = tl.where(inside & ((index >= length) | (index < -1)), RANGE, kind)
        greatest = tl.maximum(greatest, _greatest(kind, column))
    return count, greatest


@triton.jit
def _is_stale(held, position, block, num_blocks, OURS_ALONE: tl.constexpr):
    """Whether slots of a block were last written for another position."""
    return held != position if OURS_ALONE else (block == 0) | (block == num_blocks)


@triton.jit
def _greatest(kind, column):
    return tl.max((kind << _SHIFT) | (_LAST - column), 0)


@triton.jit
def kind_and_column(greatest):
    """Of `look_at_page`'s result or `look_at_selection`'s."""
    return greatest >> _SHIFT, _LAST - (greatest & _LAST)


@triton.jit
def note(finding, found, CHECK: tl.constexpr, kind, at, seen):
    """Note what a check found of a row, if that is anything and no check before it found any.

    Returns the check that has, or 0.
    """
    new = (kind != 0) & (found == 0)
    tl.store(finding, CHECK, mask=new)
    tl.store(finding + 1, kind, mask=new)
    tl.store(finding + 2, at, mask=new)
    tl.store(finding + 3, seen, mask=new)
    return tl.where(new, CHECK, found)
