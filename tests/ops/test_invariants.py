"""The checks of DSA_CHECK, row by row: each fault is found where it lies, and nothing else is.

What becomes of it in a host's pass: tests/core/test_invariants.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsa_kernels.invariants.findings import Check, Kind
from dsa_testbed.checked_pass import (
    BLOCKS,
    HEADS,
    INDEX_HEADS,
    LAYER,
    LENS,
    NUMBER,
    REAL,
    SIZE,
    CheckedPass,
    bits,
    row_of,
    set_greatest,
    set_nan,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "form", "small_check_blocks")

FP8 = torch.uint8
DTYPES = [torch.float32, torch.bfloat16, torch.float16, FP8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sound_pass(dtype: torch.dtype) -> None:
    one = CheckedPass(dtype)
    one.mark()
    one.write()
    one.check()
    assert not one.found()
    assert not any(one.keep().values())


def test_a_sound_layer_without_indexer() -> None:
    one = CheckedPass(torch.bfloat16, indexer=False)
    one.mark()
    one.write()
    one.topk_indices[2] = -1  # another layer's are not counted
    one.check(page_by_page=True)
    assert not one.found()
    assert not any(one.keep().values())


def memory_of(one: CheckedPass) -> list[Tensor]:
    """All bytes that the caches lie in, gaps too."""
    caches = one.memory.latent_cache, one.memory.key_cache
    storages = [cache.untyped_storage() for cache in caches if cache is not None]
    return [torch.tensor([], dtype=torch.uint8).set_(storage) for storage in storages]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_a_mark_fills_entries_and_nothing_else(dtype: torch.dtype) -> None:
    one, expected = CheckedPass(dtype), CheckedPass(dtype)
    outside = 4
    one.rows.slots[outside] = BLOCKS * SIZE + 1
    for memory, same in zip(memory_of(one), memory_of(expected), strict=True):
        same.copy_(memory.random_(0, 100))
    written = one.memory.written.clone()
    expected.rows = one.rows
    for row in set(range(REAL)) - {outside}:
        for part in expected.spots(row).values():
            bits(part).fill_(-1)
        written[one.place(row)] = one.rows.positions[row].int()
    one.mark()
    assert torch.equal(one.memory.written, written)
    for memory, same in zip(memory_of(one), memory_of(expected), strict=True):
        assert torch.equal(memory, same)


def test_a_place() -> None:
    """Of another slot, length or page, or before the first; or none, with a slot outside too."""
    one = CheckedPass(torch.bfloat16)
    rows = one.rows
    rows.slots[0] += SIZE
    rows.lens[1] += 1
    rows.positions[2], rows.lens[2] = -1, 0
    rows.slots[2] = one.place_of(1, 0)[0] * SIZE + SIZE - 1
    rows.block_table[2, (LENS[2] - 1) // SIZE] = 99
    rows.slots[4:6] = BLOCKS * SIZE + rows.positions[4:6] % SIZE
    for part in one.parts().values():
        bits(part[0]).zero_()
    one.mark()
    slots, lens = rows.slots.tolist(), rows.lens.tolist()
    told = {row: (Check.PLACE, Kind.PLACE, slots[row], lens[row]) for row in range(4)}
    assert one.found() == told
    one.check(slice(4, 6))
    told |= {row: (Check.LATENT, Kind.LATENT_UNWRITTEN, slots[row], slots[row]) for row in (4, 5)}
    assert one.found() == told


def test_a_place_outside_of_the_table() -> None:
    """Though the memory beside the request's row of it has the block of the slot."""
    one = CheckedPass(torch.bfloat16)
    rows, beside = one.rows, one.place_of(1, 0)[0] * SIZE
    beyond = rows.block_table.shape[1] * SIZE
    rows.positions[0], rows.lens[0], rows.slots[0] = beyond, beyond + 1, beside
    rows.positions[2], rows.lens[2], rows.slots[2] = -1, 0, beside - 1
    one.mark()
    told = dict.fromkeys((0, 2), (Check.PLACE, Kind.PLACE))
    assert {row: found[:2] for row, found in one.found().items()} == told


def spoilt_entries(dtype: torch.dtype) -> list[tuple[str, int, bool]]:
    """Part of an entry, value of the part, and whether the NaN is negative."""
    if dtype == FP8:
        spots = [
            ("nope", 0),
            ("nope", 511),
            ("scales", 0),
            ("scales", 3),
            ("rope", 0),
            ("rope", 63),
        ]
        return [(*spot, negative) for negative in (False, True) for spot in spots]
    return [("latent", at, at % 2 == 0) for at in (0, 511, 512, 575)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_latent(dtype: torch.dtype) -> None:
    """Not written, or any part of it NaN, at either end."""
    faults = spoilt_entries(dtype)
    for first in range(0, len(faults), REAL):
        one = CheckedPass(dtype)
        one.mark()
        one.write()
        slots, expected = one.rows.slots.tolist(), {}
        some = faults[first : first + REAL]
        for row, (part, at, negative) in enumerate(some):
            set_nan(one.spots(row)[part], at, negative=negative)
            expected[row] = Check.LATENT, Kind.LATENT_NAN, slots[row], slots[row]
        one.check(slice(0, len(some)))
        assert one.found() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_key(dtype: torch.dtype) -> None:
    one = CheckedPass(dtype)
    one.mark()
    one.write()
    spots = [("key", 0), ("key", 127), *[("scale", 0)] * (dtype == FP8)]
    slots, expected = one.rows.slots.tolist(), {}
    for row, (part, at) in enumerate(spots):
        set_nan(one.spots(row)[part], at, negative=row % 2 == 0)
        expected[row] = Check.KEY, Kind.KEY_NAN, slots[row], slots[row]
    one.check(slice(0, len(spots)))
    assert one.found() == expected


LATENT_PARTS, KEY_PARTS = ("latent", "nope", "scales", "rope"), ("key", "scale")


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_entries_that_nobody_wrote(dtype: torch.dtype) -> None:
    """Nor in part: then what is left is NaN. A latent is told before its key."""
    one = CheckedPass(dtype)
    one.mark()
    filled = {name: bits(part).clone() for name, part in one.parts().items()}
    one.write()
    parts = [
        LATENT_PARTS,
        KEY_PARTS,
        LATENT_PARTS + KEY_PARTS,
        ("nope", "rope"),
        ("nope", "scales"),
        ("key",),
    ]
    if dtype != FP8:
        parts[3:5] = [("latent",), ("latent",)]
    for row, names in enumerate(parts):
        for name, part in one.spots(row).items():
            if name in names:
                bits(part).copy_(filled[name][one.place(row)])
    if dtype != FP8:
        for row, name, at in ((3, "latent", 0), (4, "latent", 575), (5, "key", 127)):
            one.spots(row)[name][at] = 1
    one.check()
    latent, key = (Check.LATENT, Kind.LATENT_UNWRITTEN), (Check.KEY, Kind.KEY_UNWRITTEN)
    nan = (Check.LATENT, Kind.LATENT_NAN), (Check.KEY, Kind.KEY_NAN)
    slots = one.rows.slots.tolist()
    told = enumerate((latent, key, latent, nan[0], nan[0], nan[1]))
    assert one.found() == {row: (*of, slots[row], slots[row]) for row, of in told}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_greatest_numbers_are_no_nan(dtype: torch.dtype) -> None:
    one = CheckedPass(dtype)
    one.mark()
    one.write()
    for part in one.spots(0).values():
        set_greatest(part, slice(None))
    for tensor in (*one.query, one.out):
        set_greatest(tensor, 0)
    one.check(row_of(0))
    assert not one.found()
    assert not any(one.keep().values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_query(dtype: torch.dtype) -> None:
    """Of the first head and the last, at both ends; and a head's weight."""
    one = CheckedPass(dtype)
    one.mark()
    one.write()
    query, weights = one.query
    last = INDEX_HEADS - 1
    for row, at in enumerate([(0, 0), (last, 127), (2, 64)]):
        set_nan(query, (row, *at), negative=row == 1)
    set_nan(weights, (3, 0))
    set_nan(weights, (4, last), negative=True)
    one.check()
    slots = one.rows.slots.tolist()
    told = Check.QUERY, Kind.QUERY_NAN
    assert one.found() == {row: (*told, slots[row], slots[row]) for row in range(5)}


def test_parts_of_a_pass() -> None:
    """Each looks at its own rows' slots and indices, and none twice."""
    one = CheckedPass(torch.bfloat16)
    one.mark()
    one.write([0, 1, 2, 4, 5])
    one.slots[1, 0] += SIZE
    set_nan(one.query[0], (4, 0, 0))
    one.check(slice(3, 6), slice(0, 2))
    one.check(slice(2, 3), page_by_page=True)
    slots = one.rows.slots.tolist()
    assert one.found() == {
        1: (Check.USED, Kind.PAGES, int(one.topk_indices[1, 0]), int(one.slots[1, 0])),
        3: (Check.LATENT, Kind.LATENT_UNWRITTEN, slots[3], slots[3]),
        4: (Check.QUERY, Kind.QUERY_NAN, slots[4], slots[4]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at", [(0, 0), (HEADS - 1, 47), (1, 20)])
def test_what_attention_gives(dtype: torch.dtype, at: tuple[int, int]) -> None:
    one = CheckedPass(dtype)
    one.mark()
    set_nan(one.out, (5, *at), negative=at == (1, 20))
    set_nan(one.out, (1, *at))
    set_nan(one.out, (REAL, *at))  # padding
    slot = int(one.rows.slots[1])
    assert one.keep() == {
        "kind": Kind.OUT_NAN, "layer": LAYER, "pass": NUMBER, "row": 1, "request": 0,
        "position": LENS[0] - 1, "at": slot, "seen": slot,
    }  # fmt: skip


def test_what_attention_gives_the_last_row() -> None:
    one = CheckedPass(torch.bfloat16)
    names = "requests", "positions", "lens", "slots"
    one.change(**{name: getattr(one.rows, name)[:REAL] for name in names})
    one.out = one.out[:REAL]
    one.mark()
    set_nan(one.out, (REAL - 1, 0, 0))
    kept = one.keep()
    assert (kept["kind"], kept["row"]) == (Kind.OUT_NAN, REAL - 1)


def test_the_first_is_kept() -> None:
    """Of the least check, then of the least row; and never another's after it."""
    one = CheckedPass(torch.bfloat16)
    one.mark()
    set_nan(one.out, (0, 0, 0))
    one.findings[1] = torch.tensor([Check.USED, Kind.RANGE, 5, 6])
    one.findings[5] = torch.tensor([Check.READ, Kind.STALE, 7, 8])
    one.findings[4] = torch.tensor([Check.READ, Kind.READ_KEY_NAN, 9, 10])
    kept = one.keep()
    assert kept == {
        "kind": Kind.READ_KEY_NAN, "layer": LAYER, "pass": NUMBER, "row": 4, "request": 2,
        "position": LENS[2] - 2, "at": 9, "seen": 10,
    }  # fmt: skip
    one.mark()
    one.findings[0] = torch.tensor([Check.PLACE, Kind.PLACE, 1, 1])
    assert one.keep() == kept


def test_padding_is_not_looked_at() -> None:
    one = CheckedPass(FP8)
    one.rows.positions[REAL:] = 70
    one.rows.lens[REAL:] = 900
    one.mark()
    one.write()
    before = one.memory.written.clone()
    for tensor in one.query:
        set_nan(tensor, slice(REAL, None))
    set_nan(one.out, slice(REAL, None))
    one.slots[REAL:] = 5
    one.check(slice(REAL, len(one.rows.slots)))
    assert not one.found()
    assert not any(one.keep().values())
    assert torch.equal(one.memory.written, before)
    assert (before[0] == -1).all()
