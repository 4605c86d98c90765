"""Device functions of topk_select's kernels."""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

_RUN = tl.constexpr(16)  # neighbours of a tile that lie below each other


@triton.jit
def row_range(row_start, row_end, row, is_row, num_columns):
    """What a row's indices count from, and its range within the columns there are: [first, end)."""
    end = tl.minimum(tl.load(row_end + row, mask=is_row, other=0), num_columns)
    if row_start is None:
        start = tl.zeros_like(end)
    else:
        start = tl.load(row_start + row, mask=is_row, other=0).to(end.dtype)
    first = tl.minimum(tl.maximum(start, 0), num_columns).to(tl.int32)
    return start, first, tl.maximum(end, first).to(tl.int32)


@triton.jit
def as_row(value):
    """A scalar as a block of one row."""
    return value + tl.arange(0, 1)


@triton.jit
def ordered(value):
    """fp32 -> uint32 >= 1 in the same order, -0.0 equal to 0.0, NaN beyond infinity by its sign."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    bits ^= tl.where(bits < 0x80000000, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return tl.maximum(bits, 1)  # of two NaNs, which tie


@triton.jit
def _score(key):
    """The fp32 value that `ordered` makes a key of; a NaN where it stands for one."""
    bits = key ^ tl.where(key < 0x80000000, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pivot(score, least, most, otherwise):
    """A score's key, if it lies beyond `least` and not beyond `most`."""
    pivot = ordered(score)
    return tl.where((pivot > least) & (pivot <= most), pivot, otherwise)


@triton.jit
def kth_largest(key, least, num_valid, k):
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
    step = 0
    while tl.max(active.to(tl.int32), 0) > 0:
        span = most - least
        low_score, high_score = _score(least), _score(most)
        # The middle of the keys, so that steps are few whatever the scores, and of scores by turns.
        middle = least + (span >> 1) + (span & 1)
        if step % 2 == 0:
            middle = _pivot(low_score * 0.5 + high_score * 0.5, least, most, middle)
        step += 1
        # As if the scores between the bounds were spread evenly; where one is infinite, the keys.
        share = (wanted - above) / tl.maximum(at_least - above, 1)
        share = tl.minimum(tl.maximum(share, 0.0), 0.99)
        down = (share * span.to(tl.float32)).to(tl.uint32)
        guess = most - tl.minimum(down, tl.maximum(span, 1) - 1)
        guess = _pivot(high_score - share * (high_score - low_score), least, most, guess)
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
def guess_pivot(
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
        key = ordered(tl.load(logits + column.to(tl.int64) * logits_n))
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
            as_row(lowest),
            as_row(highest),
            as_row(counts & 0xFFFF),
            as_row(sample_above),
            as_row(fewest),
            as_row(enough),
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
    """What makes of `ordered(score) >= pivot` one comparison: (bits ^ flip) >= bound, in int32.

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
def note_candidates(
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
def write_best(key, column, start, threshold, allowed, winners, winners_k):
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
def write_equals(
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
        key = tl.where((column >= first) & (column < end), ordered(score), 0)
        key, column = tl.ravel(tl.trans(key)), tl.ravel(tl.trans(column))
        row = winners + written * winners_k
        write_best(
            key[None, :],
            column[None, :],
            as_row(start),
            as_row(threshold),
            as_row(allowed),
            as_row(row),
            winners_k,
        )
        num_equal = tl.minimum(tl.sum((key == threshold).to(tl.int32), 0), allowed)
        allowed -= num_equal
        written += num_equal + tl.sum((key > threshold).to(tl.int32), 0)


@triton.jit
def complete(
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
            slot = find_slot(
                index, inside & used, table[:, None], max_blocks, block_table_b, BLOCK_SIZE
            )
            tl.store(slots[:, None] + place * slots_k, slot, mask=inside)


@triton.jit
def find_slot(index, wanted, table, max_blocks, block_table_b, BLOCK_SIZE: tl.constexpr):
    """Where a request's index lies, by its row of the block table; -1 if that does not say."""
    selected = wanted & (index >= 0) & (index // BLOCK_SIZE < max_blocks)
    entry = table + (index // BLOCK_SIZE).to(tl.int64) * block_table_b
    block = tl.load(entry, mask=selected, other=-1).to(tl.int64)
    return tl.where(block >= 0, block * BLOCK_SIZE + index % BLOCK_SIZE, -1)
