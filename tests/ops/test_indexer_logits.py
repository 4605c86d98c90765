"""indexer_logits against a dense fp64 score, for ragged prefill rows and for paged decode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_kernels.indexer_logits import (
    api,
    cpu,
    gather_index_keys,
    indexer_logits,
    indexer_logits_paged,
    reference,
)
from dsa_kernels.testing import error, make_block_table, make_index_cache, make_slots
from dsa_testbed.index_keys import FP8, assert_within, fill, inputs, mask, truth

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, FP8]
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 200]


@pytest.fixture(params=[cpu, reference], ids=["cpu", "reference"], autouse=True, scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs what a CPU runs, and the specification."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "cpu", request.param)
        yield


def bound(q: Tensor, weights: Tensor, k: Tensor, k_scale: Tensor | None = None) -> Tensor:
    """What rounding may do: fp32 sums, and bf16 dot products where the inputs are bf16 or fp8."""
    size = truth(q.double().abs(), weights.abs(), k.double().abs(), k_scale)
    limit = 2.0**-20 * size
    if q.dtype in (torch.bfloat16, FP8):
        limit += 2.0**-8 * truth(q, weights.abs(), k, k_scale)
    return limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
@pytest.mark.parametrize("keys", LENGTHS)
def test_prefill(dtype: torch.dtype, heads: int, keys: int) -> None:
    q, weights, k = inputs(37, heads, keys, dtype)
    scale = torch.rand(keys) + 0.5 if dtype == FP8 else None
    start = torch.randint(0, keys + 1, (37,), dtype=torch.int32)
    end = torch.randint(0, keys + 1, (37,), dtype=torch.int32)  # many ranges are empty
    start[:5], end[:5] = 0, keys
    result = indexer_logits(q, weights, k, start, end, k_scale=scale)
    expected = mask(truth(q, weights, k, scale), start, end)
    assert_within(result, expected, bound(q, weights, k, scale))
    if dtype == torch.float32:
        assert error(result, expected).rms < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_prefill_long(dtype: torch.dtype) -> None:
    """More keys and more rows than one tile has, causal, from the middle of a context."""
    q, weights, k = inputs(70, 32, 4103, dtype)
    scale = torch.rand(4103) if dtype == FP8 else None
    end = torch.arange(70, dtype=torch.int32) + 4034
    start = torch.zeros_like(end)
    start[50:] = 2000
    result = indexer_logits(q, weights, k, start, end, k_scale=scale)
    expected = mask(truth(q, weights, k, scale), start, end)
    assert_within(result, expected, bound(q, weights, k, scale))


def test_every_row_empty() -> None:
    q, weights, k = inputs(3, 8, 70, torch.float32)
    zero = torch.zeros(3, dtype=torch.int32)
    for start, end in ((zero, zero), (zero + 70, zero + 70), (zero + 9, zero + 5)):
        assert (indexer_logits(q, weights, k, start, end) == -torch.inf).all()
    assert indexer_logits(q[:0], weights[:0], k, zero[:0], zero[:0]).shape == (0, 70)
    assert indexer_logits(q, weights, k[:0], zero, zero).shape == (3, 0)


def test_scores_may_be_negative() -> None:
    q, weights, k = inputs(4, 8, 65, torch.bfloat16)
    end = torch.full((4,), 65, dtype=torch.int32)
    result = indexer_logits(q, -weights.abs(), k, torch.zeros_like(end), end)
    assert (result <= 0).all()
    assert (result < 0).any(1).all()


def test_strided_inputs_and_out() -> None:
    q, weights, k = torch.randn(9, 200, 8), torch.randn(8, 9), torch.randn(70, 300)
    query, weight, key = q[:, 30:158].transpose(1, 2), weights.T, k[:, 5:133]
    end = torch.randint(0, 71, (9,))
    wide = torch.full((9, 90), torch.nan)
    result = indexer_logits(query, weight, key, torch.zeros_like(end), end, out=wide[:, 10:80])
    expected = mask(truth(query, weight, key), torch.zeros_like(end), end)
    assert_within(wide[:, 10:80], expected, bound(query, weight, key))
    assert result.data_ptr() == wide[:, 10:80].data_ptr()
    assert wide[:, :10].isnan().all()
    assert wide[:, 80:].isnan().all()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tiling_changes_nothing(data: st.DataObject) -> None:
    """Whatever the tile, each row gets what it gets alone."""
    rows, keys = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 150))
    q, weights, k = inputs(rows, 8, keys, torch.float32)
    start = torch.tensor([data.draw(st.integers(0, keys)) for _ in range(rows)])
    end = torch.tensor([data.draw(st.integers(0, keys)) for _ in range(rows)])
    with pytest.MonkeyPatch.context() as patch:
        queries = data.draw(st.sampled_from([8, 24, 80]))
        patch.setattr(cpu, "_TILE_QUERIES", queries)
        patch.setattr(cpu, "_TILE_ELEMENTS", queries * data.draw(st.integers(1, 70)))
        result = indexer_logits(q, weights, k, start, end)
    assert_within(result, mask(truth(q, weights, k), start, end), bound(q, weights, k))


@pytest.mark.parametrize("correlated", [False, True])
def test_bf16_dot_products_cost_little_accuracy(correlated: bool) -> None:
    """The rounding that this module documents, measured where it matters: against unrounded inputs.

    Correlated heads have large positive dot products, whose rounding is the coarsest.
    """
    q = torch.randn(16, 64, 128).double() + 0.9 * correlated * torch.randn(16, 1, 128)
    k, weights = torch.randn(4096, 128).double(), torch.randn(16, 64).double()
    if correlated:
        weights.abs_()
    exact = truth(q, weights, k)
    end = torch.full((16,), 4096, dtype=torch.int32)
    start = torch.zeros_like(end)

    half = q.bfloat16(), k.bfloat16()
    ours = indexer_logits(half[0], weights.float(), half[1], start, end)
    unavoidable = error(truth(half[0], weights, half[1]), exact).rms
    assert error(ours, exact).rms < 1.25 * unavoidable

    small = (q.float() / 4).to(FP8), (k.float() / 4).to(FP8)
    fp8 = truth(small[0], weights, small[1]) * 16
    assert error(ours, exact).rms < error(fp8, exact).rms / 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("next_n", [1, 2, 4])
def test_paged(dtype: torch.dtype, block_size: int, next_n: int) -> None:
    """Every length around a page's edge; pages shared by two requests, gaps, poison all around."""
    lengths = [*LENGTHS, 4100]
    heads = 16
    blocks = sum(-(-length // block_size) for length in lengths) + 5
    cache_dtype = torch.uint8 if dtype == FP8 else dtype
    cache = make_index_cache(cache_dtype, blocks, block_size, gap=1152)
    table = make_block_table(lengths, block_size, blocks)
    table[6] = table[8]
    table[5, 0] = table[8, 0]
    keys: list[Tensor] = []
    scales: list[Tensor | None] = []
    for row in (8, 7, 4, 3, 2, 1, 0):
        k = torch.randn(lengths[row], 128).to(dtype)
        scale = torch.rand(lengths[row]) + 0.5 if dtype == FP8 else None
        fill(cache, make_slots(table[row], torch.arange(lengths[row]), block_size), k, scale)
    own = torch.randn(lengths[5], 128).to(dtype)
    own_scale = torch.rand(lengths[5]) + 0.5 if dtype == FP8 else None
    tail = torch.arange(block_size, lengths[5])
    fill(
        cache,
        make_slots(table[5], tail, block_size),
        own[tail] if dtype != FP8 else own.view(torch.uint8)[tail].view(FP8),
        None if own_scale is None else own_scale[tail],
    )
    for row, length in enumerate(lengths):
        k, scale = gather_index_keys(cache, table[row], length)
        assert k.shape == (length, 128)
        assert k.dtype == dtype
        keys.append(k)
        scales.append(scale)
    assert torch.equal(keys[6].view(torch.uint8), keys[8][: lengths[6]].view(torch.uint8))
    assert not torch.equal(keys[5][-1].float(), keys[8][lengths[5] - 1].float())

    q = torch.randn(9, next_n, heads, 128).to(dtype)
    weights = torch.randn(9, next_n, heads)
    # Draft tokens see one more key each; a request's first rows may see nothing.
    context_lens = (torch.tensor(lengths)[:, None] - next_n + 1 + torch.arange(next_n)).clamp(min=0)
    max_context_len = 4100
    result = indexer_logits_paged(
        q, weights, cache, table, context_lens.int(), max_context_len
    ).view(9, next_n, -1)
    for row, (length, k, scale) in enumerate(zip(lengths, keys, scales, strict=True)):
        expected = truth(q[row], weights[row], k, scale)
        expected = mask(expected, torch.zeros(next_n), context_lens[row])
        assert_within(result[row, :, :length], expected, bound(q[row], weights[row], k, scale))
        assert (result[row, :, length:] == -torch.inf).all()


@pytest.mark.parametrize("next_n", [1, 5])
@pytest.mark.parametrize("keys_a_tile", [1, 48, 50])
def test_paged_tiling_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, next_n: int, keys_a_tile: int
) -> None:
    monkeypatch.setattr(cpu, "_TILE_QUERIES", 16)
    monkeypatch.setattr(cpu, "_TILE_ELEMENTS", 16 * keys_a_tile)
    cache, length = make_index_cache(torch.float32, 40, 16), 205
    table = make_block_table([length] * 3, 16, 40, shared=2)
    k = torch.randn(3, length, 128)
    k[:, :32] = k[:1, :32]
    for row in range(3):
        fill(cache, make_slots(table[row], torch.arange(length), 16), k[row], None)
    q, weights = torch.randn(3, next_n, 8, 128), torch.randn(3, next_n, 8)
    end = torch.randint(0, length + 1, (3, next_n))
    result = indexer_logits_paged(q, weights, cache, table, end, length).view(3, next_n, length)
    for row in range(3):
        expected = mask(truth(q[row], weights[row], k[row]), torch.zeros(next_n), end[row])
        assert_within(result[row], expected, bound(q[row], weights[row], k[row]))


def test_gather_reads_the_right_tokens() -> None:
    cache = torch.arange(6 * 4 * 128, dtype=torch.float32).view(6, 4, 128)
    k, scale = gather_index_keys(cache, torch.tensor([5, 0, 3, -7]), 9)
    assert scale is None
    assert torch.equal(k, cache.flatten(0, 1)[[20, 21, 22, 23, 0, 1, 2, 3, 12]])
    assert gather_index_keys(cache, torch.tensor([5]), 0)[0].shape == (0, 128)


def test_paged_out_and_bounds() -> None:
    cache = make_index_cache(torch.float32, 4, 16)
    cache[2] = torch.randn(16, 128)
    q, weights = torch.randn(2, 1, 8, 128), torch.randn(2, 1, 8)
    table = torch.tensor([[2, -5], [2, 2**31 - 1]], dtype=torch.int32)
    wide = torch.full((2, 40), torch.nan)
    lens = torch.tensor([[7], [0]], dtype=torch.int32)
    indexer_logits_paged(q, weights, cache, table, lens, 20, out=wide[:, :20])
    expected = truth(q[0], weights[0], cache[2, :7])
    torch.testing.assert_close(wide[:1, :7].double(), expected, atol=1e-4, rtol=1e-5)
    assert (wide[0, 7:20] == -torch.inf).all()
    assert (wide[1, :20] == -torch.inf).all()
    assert wide[:, 20:].isnan().all()
