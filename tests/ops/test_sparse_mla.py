"""sparse_mla in every form, against fp64 over each row's own selection and against eager."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_kernels.sparse_mla import sparse_mla
from dsa_kernels.testing import error, make_block_table, make_latent_cache, make_slots
from dsa_testbed.kernel_runs import drawn, unless_interpreted
from dsa_testbed.latents import (
    SCALE,
    check,
    eager,
    filled_cache,
    filled_fp8_cache,
    lse_atol,
    random_slots,
    truth,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "form")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HOSTILE = [-(2**63), -(2**31), -1, -2, 2**31 - 1, 2**31, 2**63 - 1]


@pytest.mark.parametrize(
    ("dtype", "heads"),
    [
        *product(DTYPES, [8, 16, 20, 64]),
        *((dtype, 128) for dtype in unless_interpreted(DTYPES, [torch.bfloat16])),
    ],
)
@pytest.mark.parametrize("k", unless_interpreted([1, 63, 64, 65, 127], [40]))
def test_against_fp64(dtype: torch.dtype, heads: int, k: int, form: str) -> None:
    used = torch.randperm(9 * 64)[:300]
    cache, values = filled_cache(dtype, 9, 64, used, gap=8448)
    rows = unless_interpreted(5, 1 if heads >= 64 else 2)
    q, slots = torch.randn(rows, heads, 576).to(dtype), random_slots(rows, k, used)
    check(*sparse_mla(q, cache, slots, SCALE), q, values, slots, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "k"), unless_interpreted([(1, 2048), (3, 2048), (2, 4100), (70, 300)], [(1, 300)])
)
def test_larger_than_a_tile(dtype: torch.dtype, rows: int, k: int, form: str) -> None:
    used = torch.arange(5000) + 64
    cache, values = filled_cache(dtype, 80, 64, used)
    q, slots = torch.randn(rows, 16, 576).to(dtype), random_slots(rows, k, used)
    check(*sparse_mla(q, cache, slots.int(), SCALE), q, values, slots, form)


def test_bf16_is_better_than_eager() -> None:
    """Eager bf16 attention, as transformers runs it, is what a user has otherwise."""
    used = torch.arange(64 * 32)
    cache, values = filled_cache(torch.bfloat16, 32, 64, used)
    rows, k = unless_interpreted((8, 1024), (2, 128))
    q, slots = (torch.randn(rows, 16, 576) * 3).bfloat16(), random_slots(rows, k, used)
    out, _ = sparse_mla(q, cache, slots, SCALE)
    expected, _ = truth(q, values, slots)
    assert error(out, expected).rms < 0.75 * error(eager(q, values, slots), expected).rms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@drawn(40, interpreted=12)
@given(data=st.data())
def test_hostile_slots(dtype: torch.dtype, form: str, data: st.DataObject) -> None:
    """Ignored entries anywhere, whole rows of them; unwritten slots (slot 0 too) are NaN."""
    rows, k = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 40))
    used = torch.tensor([5, 17, 18, 30, 41])
    cache, values = filled_cache(dtype, 3, 16, used, gap=64)
    entry = st.sampled_from([*HOSTILE, 48, *used.tolist()])
    dull = st.sampled_from(HOSTILE)
    slots = torch.tensor(
        [
            data.draw(st.lists(dull if data.draw(st.booleans()) else entry, min_size=k, max_size=k))
            for _ in range(rows)
        ],
        dtype=torch.int64,
    ).view(rows, k)
    end = st.one_of(st.integers(-1, 50), st.sampled_from([-(2**63), 2**31, 2**63 - 1]))
    length = torch.tensor(data.draw(st.lists(end, min_size=rows, max_size=rows))).long()
    q = torch.randn(rows, 3, 576).to(dtype)
    out, lse = sparse_mla(q, cache, slots, SCALE, topk_length=length)
    seen = torch.where(torch.arange(k) < length[:, None], slots, -1)
    expected, expected_lse = truth(q, values, seen)
    empty = expected_lse == -torch.inf
    assert (out[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()
    assert not out.isnan().any()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    atol = lse_atol(form, dtype)
    torch.testing.assert_close(lse.double(), expected_lse, atol=atol, rtol=1e-5)


@pytest.mark.parametrize(
    ("slot", "dtype"),
    [
        *((slot, torch.int64) for slot in [*HOSTILE, 48]),
        *((slot, torch.int32) for slot in (-(2**31), -1, 2**31 - 1, 48)),
    ],
)
@pytest.mark.parametrize("filled", [filled_cache, filled_fp8_cache])
def test_hostile_slot(slot: int, dtype: torch.dtype, filled: Any, form: str) -> None:
    """One at a time; the entry beside it is valid, every unwritten slot (0 too) is NaN."""
    cache, values = filled(torch.float32, 3, 16, torch.tensor([5]), gap=64)
    q, slots = torch.randn(1, 3, 576), torch.tensor([[slot, 5, slot]], dtype=dtype)
    check(*sparse_mla(q, cache, slots, SCALE), q, values, slots, form)


def test_every_row_empty() -> None:
    rows = unless_interpreted(4, 2)
    cache = make_latent_cache(torch.bfloat16, 2, 64)
    q = torch.randn(rows, 16, 576).bfloat16()
    for k in (0, 7, 65):
        out, lse = sparse_mla(q, cache, torch.full((rows, k), -1), SCALE)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
    assert sparse_mla(q[:0], cache, torch.zeros(0, 7).long(), SCALE)[0].shape == (0, 16, 512)


def test_padding_changes_nothing() -> None:
    """Rows of different lengths in one tile, as topk_select pads them."""
    used = torch.arange(200)
    cache, _ = filled_cache(torch.float32, 4, 64, used)
    lengths = unless_interpreted([0, 1, 64, 65, 149, 150], [0, 1, 16, 33])
    rows, k = len(lengths), lengths[-1]
    q, slots = torch.randn(rows, 8, 576), random_slots(rows, k, used)
    padded = torch.full((rows, unless_interpreted(400, 50)), -1)
    for row, length in enumerate(lengths):
        padded[row, :length] = slots[row, :length]
    out, lse = sparse_mla(q, cache, padded, SCALE)
    for row, length in enumerate(lengths):
        alone, alone_lse = sparse_mla(q[row : row + 1], cache, slots[row, None, :length], SCALE)
        torch.testing.assert_close(out[row], alone[0], atol=1e-6, rtol=1e-5)
        # Tiles of other shapes sum their products in another order: 1.6e-6 seen.
        torch.testing.assert_close(lse[row], alone_lse[0], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", unless_interpreted([torch.int32, torch.int64], [torch.int32]))
def test_topk_length_ends_a_row(dtype: torch.dtype) -> None:
    """What lies beyond is ignored, valid or not; a length may be 0, negative or exceed k."""
    used = torch.arange(200)
    cache, _ = filled_cache(torch.float32, 4, 64, used)
    k, edge = unless_interpreted((150, 64), (33, 16))
    q, slots = torch.randn(6, 8, 576), random_slots(6, k, used)
    lengths = torch.tensor([0, 1, edge, k - 1, 1000, -3], dtype=dtype)
    out, lse = sparse_mla(q, cache, slots, SCALE, topk_length=lengths)
    padded = torch.where(torch.arange(k) < lengths[:, None], slots, -1)
    expected, expected_lse = sparse_mla(q, cache, padded, SCALE)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=1e-6)


def test_rows_of_many_requests(form: str) -> None:
    """Decode of three requests that share their first pages, and rows of a prefill."""
    lengths, block_size = [40, 64, 50], 16
    table = make_block_table(lengths, block_size, 40, shared=2)
    used = torch.unique(
        torch.cat(
            [
                make_slots(row, torch.arange(length), block_size)
                for row, length in zip(table, lengths, strict=True)
            ]
        )
    )
    cache, values = filled_cache(torch.float32, 40, block_size, used)
    request = [0, 1, 2, 1, 1]
    context = [40, 64, 50, 20, 21]
    slots = torch.full((5, 48), -1)
    for row, (which, length) in enumerate(zip(request, context, strict=True)):
        chosen = torch.randperm(length)[:48].sort().values
        slots[row, : len(chosen)] = make_slots(table[which], chosen, block_size)
    q = torch.randn(5, 16, 576)
    ends = torch.tensor(context)
    check(*sparse_mla(q, cache, slots, SCALE, topk_length=ends), q, values, slots, form)


@pytest.mark.parametrize("factor", [300.0, -300.0])
def test_huge_scores(factor: float) -> None:
    """Scores in the thousands, of either sign: no overflow, and lse keeps its precision."""
    used = torch.arange(64)
    cache, values = filled_cache(torch.float32, 1, 64, used)
    q, slots = torch.randn(2, 4, 576) * factor, used.repeat(2, 1)
    out, lse = sparse_mla(q, cache, slots, 1.0)
    expected, expected_lse = truth(q, values, slots, 1.0)
    assert expected_lse.abs().max() > 5e3
    assert error(out, expected).rms < 1e-3
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.05, rtol=1e-6)


def test_lse_merges_two_halves() -> None:
    """Natural logarithms: the halves of a selection, weighted by exp(lse), make the whole."""
    used = torch.arange(128)
    cache, _ = filled_cache(torch.float32, 2, 64, used)
    rows, k = unless_interpreted((3, 100), (1, 50))
    q, slots = torch.randn(rows, 8, 576), random_slots(rows, k, used)
    whole, lse = sparse_mla(q, cache, slots, SCALE)
    halves = [sparse_mla(q, cache, part, SCALE) for part in (slots[:, :30], slots[:, 30:])]
    merged = sum(out * (part_lse - lse).exp()[..., None] for out, part_lse in halves)
    torch.testing.assert_close(merged, whole, atol=1e-6, rtol=1e-5)


def test_an_entry_that_occurs_twice_counts_twice(form: str) -> None:
    used = torch.arange(16)
    cache, values = filled_cache(torch.float32, 1, 16, used)
    q, slots = torch.randn(1, 2, 576), torch.tensor([[3, 3, 9]])
    check(*sparse_mla(q, cache, slots, SCALE), q, values, slots, form)


@pytest.mark.parametrize("k", [14, 40])
def test_strided_inputs_and_outputs(k: int, form: str) -> None:
    """A kernel writes the outputs of 14 at once, and merges those of 40 from their parts."""
    used = torch.arange(300)
    cache, values = filled_cache(torch.float32, 5, 64, used, gap=36)
    q = torch.randn(8, 2, 1400)[..., 60:1212:2].transpose(0, 1)
    slots = random_slots(2, k, used).T.contiguous().T
    wide, wide_lse = torch.full((2, 8, 1100), torch.nan), torch.full((8, 2), torch.nan)
    wide_out = wide[..., 20:1044:2]
    length = torch.tensor([[k - 7, 0], [k, 0]])[:, 0]
    out, lse = sparse_mla(q, cache, slots, SCALE, topk_length=length, out=wide_out, lse=wide_lse.T)
    check(out, lse, q, values, torch.where(torch.arange(k) < length[:, None], slots, -1), form)
    assert out.data_ptr() == wide_out.data_ptr()
    assert lse.data_ptr() == wide_lse.data_ptr()
    assert int(wide.isnan().sum()) == 2 * 8 * (1100 - 512)


def test_token_stride_wider_than_a_token(form: str) -> None:
    storage = torch.full((3, 64, 640), torch.nan)
    cache = storage[..., 30:606]
    values = torch.randn(192, 576)
    cache.copy_(values.view(3, 64, 576))
    q, slots = torch.randn(2, 4, 576), random_slots(2, 60, torch.arange(192))
    check(*sparse_mla(q, cache, slots, SCALE), q, values, slots, form)


@pytest.mark.parametrize(
    ("dtype", "heads", "block_size"),
    unless_interpreted(
        [(dtype, *sizes) for dtype in DTYPES for sizes in ((16, 64), (16, 16), (16, 1), (40, 64))],
        [*((dtype, 16, 16) for dtype in DTYPES), (torch.bfloat16, 40, 64), (torch.bfloat16, 16, 1)],
    ),
)
def test_fp8_cache(dtype: torch.dtype, heads: int, block_size: int, form: str) -> None:
    """Bytes written by the layout's definition; scales need not be powers of two."""
    used = torch.randperm(256)[:100]
    cache, values = filled_fp8_cache(
        dtype, 256 // block_size, block_size, used, gap=132 * block_size
    )
    rows = unless_interpreted(6, 1)
    q, slots = torch.randn(rows, heads, 576).to(dtype), random_slots(rows, 70, used)
    slots[:, ::9] = -1
    check(*sparse_mla(q, cache, slots, SCALE), q, values, slots, form)
