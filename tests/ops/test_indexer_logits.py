"""indexer_logits in every form against a dense fp64 score: ragged prefill rows, paged decode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_kernels.indexer_logits import (
    gather_index_keys,
    indexer_logits,
    indexer_logits_paged,
    reference,
)
from dsa_kernels.testing import error, make_index_cache
from dsa_testbed.index_keys import (
    FP8,
    assert_within,
    bound,
    check_paged,
    check_prefill,
    inputs,
    mask,
    truth,
)
from dsa_testbed.kernel_runs import drawn, unless_interpreted

pytestmark = pytest.mark.usefixtures("poisoned_empty", "form")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, FP8]
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 200]
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
# Lengths beside a multiple of 32, which every tile of keys is, up to 4,100.
EDGES = st.builds(
    lambda tiles, by: max(1, 32 * tiles + by), st.integers(0, 128), st.integers(-1, 4)
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [8, 16, 20, 32, 64])
@pytest.mark.parametrize("keys", unless_interpreted(LENGTHS, [150]))
def test_prefill(dtype: torch.dtype, heads: int, keys: int, form: str) -> None:
    check_prefill(dtype, unless_interpreted(37, 7), heads, keys, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_prefill_long(dtype: torch.dtype, form: str) -> None:
    """More keys and more rows than one tile has, causal, from the middle of a context."""
    rows, keys = unless_interpreted((70, 4103), (3, 300))
    q, weights, k = inputs(rows, 32, keys, dtype)
    scale = torch.rand(keys) if dtype == FP8 else None
    end = torch.arange(keys + 1 - rows, keys + 1, dtype=torch.int32)
    start = torch.zeros_like(end)
    start[rows // 2 :] = keys // 2
    result = indexer_logits(q, weights, k, start, end, k_scale=scale)
    expected = mask(truth(q, weights, k, scale), start, end)
    assert_within(result, expected, bound(q, weights, k, scale, form))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@drawn(25, interpreted=5)
@given(data=st.data())
def test_any_ranges(dtype: torch.dtype, form: str, data: st.DataObject) -> None:
    """Ranges that start and end anywhere: around the edges of tiles, and beyond the keys."""
    keys, rows = data.draw(EDGES), data.draw(st.integers(1, 5))
    bound_of_a_row = st.one_of(EDGES, st.sampled_from([INT_MIN, -1, 0, keys, keys + 1, INT_MAX]))
    bounds = st.lists(bound_of_a_row, min_size=rows, max_size=rows)
    start, end = (torch.tensor(data.draw(bounds), dtype=torch.int32) for _ in range(2))
    q, weights, k = inputs(rows, data.draw(st.sampled_from([8, 20])), keys, dtype)
    scale = torch.rand(keys) + 0.5 if dtype == FP8 else None
    result = indexer_logits(q, weights, k, start, end, k_scale=scale)
    expected = mask(truth(q, weights, k, scale), start, end)
    assert_within(result, expected, bound(q, weights, k, scale, form))


def test_every_row_empty_and_no_keys() -> None:
    q, weights, k = inputs(3, 8, 70, torch.float32)
    zero = torch.zeros(3, dtype=torch.int32)
    for start, end in ((zero, zero), (zero + 70, zero + 70), (zero + 9, zero + 5)):
        assert (indexer_logits(q, weights, k, start, end) == -torch.inf).all()
    assert indexer_logits(q[:0], weights[:0], k, zero[:0], zero[:0]).shape == (0, 70)
    assert indexer_logits(q, weights, k[:0], zero, zero).shape == (3, 0)


def test_fp8_at_odd_addresses() -> None:
    q, weights, k = inputs(3, 8, 70, FP8)
    odd_q, odd_k = (torch.empty(1 + x.numel(), dtype=FP8)[1:].view_as(x).copy_(x) for x in (q, k))
    start, end, scale = torch.zeros(3).int(), torch.full((3,), 70), torch.rand(70)
    expected = indexer_logits(q, weights, k, start, end, k_scale=scale)
    assert torch.equal(indexer_logits(odd_q, weights, odd_k, start, end, k_scale=scale), expected)


def test_scores_may_be_negative() -> None:
    q, weights, k = inputs(4, 8, 65, torch.bfloat16)
    end = torch.full((4,), 65, dtype=torch.int32)
    result = indexer_logits(q, -weights.abs(), k, torch.zeros_like(end), end)
    assert (result <= 0).all()
    assert (result < 0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_a_key_that_is_nan_spoils_its_own_score_only(dtype: torch.dtype) -> None:
    q, weights, k = inputs(3, 8, 70, torch.float32)
    k[33] = torch.nan
    end = torch.full((3,), 70)
    scale = torch.ones(70) if dtype == FP8 else None
    result = indexer_logits(
        q.to(dtype), weights, k.to(dtype), torch.zeros_like(end), end, k_scale=scale
    )
    assert torch.equal(result.isnan(), (torch.arange(70) == 33).expand(3, 70))


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_strided_inputs_and_out(dtype: torch.dtype, form: str) -> None:
    q, weights, k = torch.randn(9, 200, 8).to(dtype), torch.randn(8, 9), torch.randn(70, 300)
    query, weight, key = q[:, 30:158].transpose(1, 2), weights.T, k.to(dtype)[:, 5:261:2]
    scale = torch.rand(140)[::2] if dtype == FP8 else None
    start, end = torch.randint(0, 71, (9, 2)).sort().values.unbind(1)
    wide = torch.full((9, 160), torch.nan)
    out = wide[:, 10:150:2]
    result = indexer_logits(query, weight, key, start, end, k_scale=scale, out=out)
    expected = mask(truth(query, weight, key, scale), start, end)
    assert_within(out, expected, bound(query, weight, key, scale, form))
    assert result.data_ptr() == out.data_ptr()
    assert int(wide.isnan().sum()) == 9 * (160 - 70)


@pytest.mark.parametrize("correlated", [False, True])
def test_bf16_dot_products_cost_little_accuracy(correlated: bool) -> None:
    """The rounding that this module documents, measured where it matters: against unrounded inputs.

    Correlated heads have large positive dot products, whose rounding is the coarsest.
    """
    rows, keys = unless_interpreted((16, 4096), (4, 512))
    q = torch.randn(rows, 64, 128).double() + 0.9 * correlated * torch.randn(rows, 1, 128)
    k, weights = torch.randn(keys, 128).double(), torch.randn(rows, 64).double()
    if correlated:
        weights.abs_()
    exact = truth(q, weights, k)
    end = torch.full((rows,), keys, dtype=torch.int32)
    start = torch.zeros_like(end)

    half = q.bfloat16(), k.bfloat16()
    ours = indexer_logits(half[0], weights.float(), half[1], start, end)
    unavoidable = error(truth(half[0], weights, half[1]), exact).rms
    assert error(ours, exact).rms < 1.25 * unavoidable

    small = (q.float() / 4).to(FP8), (k.float() / 4).to(FP8)
    fp8 = truth(small[0], weights, small[1]) * 16
    assert error(ours, exact).rms < error(fp8, exact).rms / 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block_size", "next_n", "heads"),
    [
        *((64, 1, 64), (64, 2, 20), (16, 3, 8)),
        *unless_interpreted([(16, 1, 16), (16, 2, 16), (16, 4, 16), (64, 4, 16)], []),
    ],
)
def test_paged(dtype: torch.dtype, block_size: int, next_n: int, heads: int, form: str) -> None:
    lengths = unless_interpreted([*LENGTHS, 4100], [1, 64, 65, 150])
    check_paged(dtype, block_size, next_n, heads, lengths, form)


def test_paged_with_more_draft_tokens_than_a_program_holds(form: str) -> None:
    check_paged(torch.bfloat16, 48, 5, 64, form=form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@drawn(25, interpreted=5)
@given(data=st.data())
def test_paged_lengths(dtype: torch.dtype, form: str, data: st.DataObject) -> None:
    lengths = tuple(data.draw(st.lists(EDGES, min_size=1, max_size=3)))
    block_size = data.draw(st.sampled_from([16, 48, 64]))
    check_paged(dtype, block_size, data.draw(st.integers(1, 3)), 8, lengths, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@drawn(30, interpreted=15)
@given(data=st.data())
def test_gather(dtype: torch.dtype, data: st.DataObject) -> None:
    """Bytes equal, whatever they are; tables may hold anything, where they are clamped."""
    block_size = data.draw(st.sampled_from([1, 16, 48, 64]))
    keys = data.draw(st.integers(0, 200))
    cache = make_index_cache(dtype, 5, block_size, gap=512)
    cache.copy_(torch.randint(0, 256, cache.view(torch.uint8).shape).byte().view(dtype))
    entry = st.one_of(st.integers(0, 4), st.sampled_from([INT_MIN, -1, 5, INT_MAX]))
    pages = -(-keys // block_size)
    table = torch.tensor(data.draw(st.lists(entry, min_size=pages, max_size=pages + 2))).int()
    row = table.repeat_interleave(2)[::2]
    k, scale = gather_index_keys(cache, row, keys)
    expected, expected_scale = reference.gather_index_keys(cache, row, keys)
    assert k.dtype == expected.dtype
    assert torch.equal(k.view(torch.uint8), expected.view(torch.uint8))
    assert (scale is None) == (expected_scale is None) == (dtype != torch.uint8)
    if scale is not None and expected_scale is not None:
        assert torch.equal(scale.view(torch.int32), expected_scale.view(torch.int32))


def test_gather_reads_the_right_tokens() -> None:
    cache = torch.arange(6 * 4 * 128, dtype=torch.float32).view(6, 4, 128)
    k, scale = gather_index_keys(cache, torch.tensor([5, 0, 3, -7]), 9)
    assert scale is None
    assert torch.equal(k, cache.flatten(0, 1)[[20, 21, 22, 23, 0, 1, 2, 3, 12]])
    assert gather_index_keys(cache, torch.tensor([5]), 0)[0].shape == (0, 128)


def test_paged_tables_may_hold_anything(form: str) -> None:
    cache = make_index_cache(torch.float32, 4, 16)
    cache[2] = torch.randn(16, 128)
    q, weights = torch.randn(3, 1, 8, 128), torch.randn(3, 1, 8)
    table = torch.tensor([[2, -5], [2, 2**31 - 1], [-(2**31), 2**31 - 1]], dtype=torch.int32)
    wide = torch.full((3, 40), torch.nan)
    out = wide[:, ::2]
    lens = torch.tensor([[7], [INT_MIN], [INT_MAX]], dtype=torch.int32)
    indexer_logits_paged(q, weights, cache, table, lens, 20, out=out)
    expected = truth(q[0], weights[0], cache[2, :7])
    assert_within(out[:1, :7], expected, bound(q[0], weights[0], cache[2, :7], form=form))
    assert (out[0, 7:] == -torch.inf).all()
    assert (out[1] == -torch.inf).all()
    assert out[2].isnan().all()  # clamped to pages 0 and 3, which are unwritten
    assert wide[:, 1::2].isnan().all()
