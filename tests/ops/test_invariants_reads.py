"""The checks of DSA_CHECK of what a row reads: a page of its request, and its selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_kernels.invariants.findings import Check, Kind
from dsa_testbed.checked_pass import (
    BLOCKS,
    LENS,
    SIZE,
    TOPK,
    CheckedPass,
    bits,
    row_of,
    set_nan,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "form", "small_check_blocks")

FP8 = torch.uint8


def page_of(one: CheckedPass, row: int) -> tuple[int, int, int]:
    """Request, first position and number of positions seen, of the page that a row looks at."""
    length = int(one.rows.lens[row])
    first = length % -(-length // SIZE) * SIZE
    return int(one.rows.requests[row]), first, min(SIZE, length - first)


def spoil_page(one: CheckedPass, row: int, *, stale: list[int], nan: list[int]) -> None:
    """Of a row's page: what was last written for position 70 + column, and keys that are NaN."""
    request, first, _ = page_of(one, row)
    for column in stale:
        one.memory.written[one.place_of(request, first + column)] = 70 + column
    for column in nan:
        key = one.parts()["key"][one.place_of(request, first + column)]
        set_nan(key, column * 3)


PAGES = {
    "first": ([0], [], 0, Kind.STALE),
    "last": ([-1], [], -1, Kind.STALE),
    "of two the first": ([1, -1], [], 1, Kind.STALE),
    "first key": ([], [0], 0, Kind.READ_KEY_NAN),
    "last key": ([], [-1], -1, Kind.READ_KEY_NAN),
    "of two keys the first, before what is stale": ([0], [2, -1], 2, Kind.READ_KEY_NAN),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(("stale", "nan", "at", "kind"), PAGES.values(), ids=PAGES)
def test_a_page(dtype: torch.dtype, stale: list[int], nan: list[int], at: int, kind: Kind) -> None:
    row = 4
    one = CheckedPass(dtype)
    _, first, seen = page_of(one, row)
    one.mark()
    one.write()
    of_page = [[column % seen for column in columns] for columns in (stale, nan)]
    spoil_page(one, row, stale=of_page[0], nan=of_page[1])
    one.check(row_of(row))
    position = first + at % seen
    held = 70 + at % seen if at % seen in of_page[0] else position
    assert one.found() == {row: (Check.READ, kind, position, held)}


def test_a_page_beyond_the_row_is_not_looked_at() -> None:
    row = 1  # whose page it is the first of
    one = CheckedPass(FP8)
    _, _, seen = page_of(one, row)
    assert seen < SIZE
    one.mark()
    one.write()
    rest = list(range(seen, SIZE))
    spoil_page(one, row, stale=rest, nan=rest)
    one.check(row_of(row))
    assert not one.found()


@pytest.mark.parametrize("ours_alone", [True, False])
@pytest.mark.parametrize("block", [0, BLOCKS, BLOCKS + 9, -3])
def test_a_page_of_nobody(block: int, ours_alone: bool) -> None:
    """Kept free, or outside of the cache; whoever writes."""
    row = 0
    one = CheckedPass(torch.bfloat16, ours_alone=ours_alone)
    request, first, _ = page_of(one, row)
    one.rows.block_table[request, first // SIZE] = block
    for part in one.parts().values():
        bits(part)[0] = bits(part)[-1] = 1
    one.mark()
    one.write()
    one.check(row_of(row))
    assert one.found() == {row: (Check.READ, Kind.STALE, first, -1)}


def test_what_others_write_is_not_compared() -> None:
    one = CheckedPass(torch.bfloat16, ours_alone=False)
    one.mark()
    one.write()
    one.memory.written.fill_(70)
    one.check(slice(0, 3))
    assert not one.found()


Spoil = Callable[[Tensor, int], Any]
"""Changes a row of topk_indices of a length; returns kind, and column or what is at and seen."""


def hole(row: Tensor, _length: int) -> Any:
    row[TOPK // 2] = -1
    return Check.COUNT, Kind.COUNT, TOPK - 1, TOPK


def none_at_the_end(row: Tensor, _length: int) -> Any:
    row[-1] = -1
    return Check.COUNT, Kind.COUNT, TOPK - 1, TOPK


def twice(row: Tensor, _length: int) -> Any:
    row[5] = row[4]
    return Kind.ORDER, 5


def swapped_at_the_start(row: Tensor, _length: int) -> Any:
    row[:2] = row[:2].flip(0)
    return Kind.ORDER, 1


def swapped_at_a_block(row: Tensor, _length: int) -> Any:
    row[3:5] = row[3:5].flip(0)
    return Kind.ORDER, 4


def swapped_at_the_end(row: Tensor, _length: int) -> Any:
    row[-2:] = row[-2:].flip(0)
    return Kind.ORDER, TOPK - 1


def beyond(row: Tensor, length: int) -> Any:
    row[-1] = length
    return Kind.RANGE, TOPK - 1


def below(row: Tensor, _length: int) -> Any:
    row[0] = -2
    return Check.COUNT, Kind.COUNT, TOPK - 1, TOPK


def of_two_the_greater(row: Tensor, length: int) -> Any:
    row[2] = row[1]
    row[7] = length + 3
    return Kind.RANGE, 7


def of_three_the_first(row: Tensor, length: int) -> Any:
    row[6:9] = length + torch.arange(3, dtype=torch.int32)
    return Kind.RANGE, 6


SELECTIONS = [
    hole,
    none_at_the_end,
    twice,
    swapped_at_the_start,
    swapped_at_a_block,
    swapped_at_the_end,
    beyond,
    below,
    of_two_the_greater,
    of_three_the_first,
]


@pytest.mark.parametrize("spoil", SELECTIONS)
def test_a_selection(spoil: Spoil) -> None:
    row = 4
    one = CheckedPass(torch.bfloat16)
    one.mark()
    one.write()
    indices = one.topk_indices[row]
    told = spoil(indices, int(one.rows.lens[row]))
    one.select_slots()
    one.check(row_of(row))
    if len(told) == 2:
        kind, column = told
        at = int(indices[column])
        held = one.memory.written[one.place_of(2, max(at, 0))]
        told = Check.USED, kind, at, int(held)
    assert one.found() == {row: told}


def test_what_another_layer_selected_is_not_counted() -> None:
    """But a hole is none of its end, and an index below -1 none at all."""
    one = CheckedPass(torch.bfloat16, indexer=False)
    one.mark()
    one.write()
    one.topk_indices[0, 4:] = -1
    one.topk_indices[3, 4] = -1
    one.topk_indices[4, -1] = -2
    one.select_slots()
    one.check(slice(0, 5))
    after = int(one.topk_indices[3, 5])
    first = int(one.memory.written[one.place_of(2, 0)])
    assert one.found() == {
        3: (Check.USED, Kind.ORDER, after, after),
        4: (Check.USED, Kind.RANGE, -2, first),
    }


def test_more_than_a_row_sees() -> None:
    """Row 2 sees fewer than index_topk, and selects its last twice."""
    one = CheckedPass(torch.bfloat16)
    one.mark()
    one.write()
    length = LENS[1]
    one.topk_indices[2, length] = length - 1
    one.select_slots()
    one.check(row_of(2))
    assert one.found() == {2: (Check.COUNT, Kind.COUNT, length + 1, length)}


@pytest.mark.parametrize("column", [0, 3, 4, TOPK - 1])
def test_a_token_that_is_stale(column: int) -> None:
    """Or is looked for elsewhere, which is told before."""
    row, other = 5, 3
    one = CheckedPass(torch.bfloat16)
    one.mark()
    one.write()
    _, first, _ = page_of(one, row)
    one.topk_indices[row] = away = torch.tensor(
        [at for at in range(LENS[2]) if not first <= at < first + SIZE][:TOPK], dtype=torch.int32
    )
    one.select_slots()
    at = int(away[column])
    one.memory.written[one.place_of(2, at)] = 70
    one.check(row_of(row))
    assert one.found() == {row: (Check.USED, Kind.STALE, at, 70)}

    one.mark()
    one.write()
    one.slots[row, other] += SIZE
    one.check(row_of(row))
    at, slot = int(away[other]), int(one.slots[row, other])
    assert one.found() == {row: (Check.USED, Kind.PAGES, at, slot)}
    one.mark()
    one.write()
    one.check(row_of(row), page_by_page=True)
    assert one.found()[row][1] == Kind.STALE
