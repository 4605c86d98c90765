"""indexer_logits' Triton kernels, interpreted on a CPU, against a dense fp64 score.

They keep fp32 throughout, so the bound has none of the reference's bf16 rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_kernels.arch import ARCHS, Arch, arch_of, is_interpreting
from dsa_kernels.indexer_logits import (
    gather_index_keys,
    indexer_logits,
    indexer_logits_paged,
    reference,
)
from dsa_kernels.testing import make_block_table, make_index_cache, make_slots
from dsa_kernels.tuning import LaunchConfig
from dsa_testbed.far_apart import far_apart
from dsa_testbed.index_keys import FP8, assert_within, fill, inputs, mask, truth
from dsa_testbed.kernel_runs import DEVICE, stand_for

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, FP8]
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
# Lengths beside a multiple of 32, which every tile of keys is, up to 4,100.
EDGES = st.builds(
    lambda tiles, by: max(1, 32 * tiles + by), st.integers(0, 128), st.integers(-1, 4)
)


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Callable[[Arch], None]:
    from dsa_kernels.indexer_logits import kernel

    return lambda arch: stand_for(monkeypatch, kernel, arch)


def bound(q: Tensor, weights: Tensor, k: Tensor, k_scale: Tensor | None = None) -> Tensor:
    """fp32 sums of 128 exact products and of the heads, whatever the dtype.

    But Hopper's tensor cores keep 14 bits of a sum of fp8 products (DeepSeek-V3 report, section
    3.3.2).
    """
    few_bits = q.dtype == FP8 and DEVICE.type == "cuda"
    scores = truth(q.double().abs(), weights.abs(), k.double().abs(), k_scale)
    return (2.0**-13 if few_bits else 2.0**-20) * scores


def check_prefill(dtype: torch.dtype, rows: int, heads: int, keys: int) -> None:
    q, weights, k = inputs(rows, heads, keys, dtype)
    scale = torch.rand(keys) + 0.5 if dtype == FP8 else None
    start = torch.randint(0, keys + 1, (rows,), dtype=torch.int32)
    end = torch.randint(0, keys + 1, (rows,), dtype=torch.int32)  # half of the ranges are empty
    start[0], end[0] = 0, keys
    result = indexer_logits(q, weights, k, start, end, k_scale=scale)
    expected = mask(truth(q, weights, k, scale), start, end)
    assert_within(result, expected, bound(q, weights, k, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [8, 16, 20, 32, 64])
def test_prefill(dtype: torch.dtype, heads: int) -> None:
    check_prefill(dtype, 7, heads, 150)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("num_sms", [1, 108])
def test_edges_of_blocks(keys: int, num_sms: int, chip: Callable[[Arch], None]) -> None:
    """One program walks over all keys, or each has one tile of them."""
    chip(replace(arch_of(DEVICE), num_sms=num_sms))
    check_prefill(torch.bfloat16, 9, 16, keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@settings(max_examples=5, deadline=None, phases=[Phase.generate])  # shrinking takes minutes here
@given(data=st.data())
def test_any_ranges(dtype: torch.dtype, data: st.DataObject) -> None:
    """Ranges that start and end anywhere: around the edges of tiles, and beyond the keys."""
    keys, rows = data.draw(EDGES), data.draw(st.integers(1, 5))
    bound_of_a_row = st.one_of(EDGES, st.sampled_from([INT_MIN, -1, 0, keys, keys + 1, INT_MAX]))
    bounds = st.lists(bound_of_a_row, min_size=rows, max_size=rows)
    start, end = (torch.tensor(data.draw(bounds), dtype=torch.int32) for _ in range(2))
    q, weights, k = inputs(rows, data.draw(st.sampled_from([8, 20])), keys, dtype)
    scale = torch.rand(keys) + 0.5 if dtype == FP8 else None
    result = indexer_logits(q, weights, k, start, end, k_scale=scale)
    expected = mask(truth(q, weights, k, scale), start, end)
    assert_within(result, expected, bound(q, weights, k, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_a_long_chunk(dtype: torch.dtype, chip: Callable[[Arch], None]) -> None:
    """Rows from the middle of a context: tiles before, inside and after what a program sees."""
    chip(replace(arch_of(DEVICE), num_sms=1))
    q, weights, k = inputs(6, 64, 4100, dtype)
    scale = torch.rand(4100) if dtype == FP8 else None
    end = torch.tensor([1000, 1001, 4099, 4100, 70, 71])
    start = torch.tensor([900, 960, 3900, 4000, 0, 5])
    result = indexer_logits(q, weights, k, start, end, k_scale=scale)
    expected = mask(truth(q, weights, k, scale), start, end)
    assert_within(result, expected, bound(q, weights, k, scale))


def test_more_rows_than_a_grid_axis_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows a program, or the interpreter takes a minute; a GPU has no room for so many."""
    from dsa_kernels.indexer_logits import kernel

    if is_interpreting():
        config = LaunchConfig({"BLOCK_KEYS": 16, "BLOCK_COLUMNS": 2048}, 4, 1)
        monkeypatch.setattr(kernel, "launch_config", lambda *_key: config)
    q, weights, k = inputs(66_000, 1, 3, torch.float32)
    end = torch.randint(0, 4, (66_000,))
    result = indexer_logits(q, weights, k, torch.zeros_like(end), end)
    expected = mask(truth(q, weights, k), torch.zeros_like(end), end)
    assert_within(result, expected, bound(q, weights, k))


@pytest.mark.parametrize("name", ARCHS)
def test_grids_fit_every_chip(name: str, kernels_run: list[str]) -> None:
    """Only the first axis of a grid may pass 65,535: rows lie there, and a million keys do not."""
    from dsa_kernels.indexer_logits.kernel import launches, paged_launches

    kernels_run.append("none: meta tensors")

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for rows, keys in ((300_000, 64), (1, 1 << 20)):
        ends = meta(rows, dtype=torch.int32)
        out, weights = (meta(rows, n, dtype=torch.float32) for n in (keys, 64))
        (launch,) = launches(
            meta(rows, 64, 128), weights, meta(keys, 128), ends, ends, None, out, ARCHS[name]
        )
        groups, segments = launch.grid
        assert segments < 65_536
        blocks = launch.config.blocks
        assert groups * (blocks["BLOCK_COLUMNS"] // blocks["BLOCK_HEADS"]) >= rows
        tiles = launch.arguments["tiles"]
        assert segments * tiles * blocks["BLOCK_KEYS"] >= keys

    requests = 70_000
    lens = meta(requests, 1, dtype=torch.int32)
    table = meta(requests, 1 << 14, dtype=torch.int32)
    weights, out = (meta(requests, *rest, dtype=torch.float32) for rest in ((1, 64), (1 << 20,)))
    q, cache = meta(requests, 1, 64, 128), meta(9, 64, 128)
    (launch,) = paged_launches(q, weights, cache, table, lens, out, ARCHS[name])
    assert launch.grid[0] == requests
    assert launch.grid[1] < 65_536


def test_every_row_empty_and_no_keys() -> None:
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
def test_strided_inputs_and_out(dtype: torch.dtype) -> None:
    q, weights, k = torch.randn(9, 200, 8).to(dtype), torch.randn(8, 9), torch.randn(70, 300)
    query, weight, key = q[:, 30:158].transpose(1, 2), weights.T, k.to(dtype)[:, 5:261:2]
    scale = torch.rand(140)[::2] if dtype == FP8 else None
    start, end = torch.randint(0, 71, (9, 2)).sort().values.unbind(1)
    wide = torch.full((9, 160), torch.nan)
    out = wide[:, 10:150:2]
    result = indexer_logits(query, weight, key, start, end, k_scale=scale, out=out)
    expected = mask(truth(query, weight, key, scale), start, end)
    assert_within(out, expected, bound(query, weight, key, scale))
    assert result.data_ptr() == out.data_ptr()
    assert int(wide.isnan().sum()) == 9 * (160 - 70)


def check_paged(
    dtype: torch.dtype,
    block_size: int,
    next_n: int,
    heads: int,
    lengths: tuple[int, ...] = (1, 64, 65, 150),
) -> None:
    """Requests that share a first page; gaps, unwritten tokens and the table's tail are garbage.

    No input is contiguous.
    """
    batch = len(lengths)
    blocks = sum(-(-length // block_size) for length in lengths) + 3
    cache = make_index_cache(torch.uint8 if dtype == FP8 else dtype, blocks, block_size, gap=1152)
    table = make_block_table([*lengths], block_size, blocks, shared=1).T.contiguous().T
    width = table.shape[1] * block_size
    for row, length in enumerate(lengths):
        k = torch.randn(length, 128).to(dtype)
        scale = torch.rand(length) + 0.5 if dtype == FP8 else None
        fill(cache, make_slots(table[row], torch.arange(length), block_size), k, scale)
    q = torch.randn(batch, heads, next_n, 200).to(dtype)[..., 40:168].transpose(1, 2)
    weights = torch.randn(heads, batch, next_n).permute(1, 2, 0)
    # Draft tokens see one more key each; a request's first rows may see nothing.
    context_lens = (torch.tensor(lengths)[:, None] - next_n + 1 + torch.arange(next_n)).clamp(min=0)
    lens = context_lens.int().repeat(1, 2)[:, :next_n]
    result = indexer_logits_paged(q, weights, cache, table, lens, width)
    result = result.view(batch, next_n, width)
    for row, length in enumerate(lengths):
        k, scale = reference.gather_index_keys(cache, table[row], length)
        expected = truth(q[row], weights[row], k, scale)
        expected = mask(expected, torch.zeros(next_n), context_lens[row])
        assert_within(result[row, :, :length], expected, bound(q[row], weights[row], k, scale))
        assert (result[row, :, length:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("next_n", "heads"), [(1, 64), (2, 20), (3, 8)])
def test_paged(dtype: torch.dtype, next_n: int, heads: int) -> None:
    check_paged(dtype, 64 if heads > 8 else 16, next_n, heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@settings(max_examples=15, deadline=None)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@settings(max_examples=5, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_paged_lengths(dtype: torch.dtype, data: st.DataObject) -> None:
    lengths = tuple(data.draw(st.lists(EDGES, min_size=1, max_size=3)))
    block_size = data.draw(st.sampled_from([16, 48, 64]))
    check_paged(dtype, block_size, data.draw(st.integers(1, 3)), 8, lengths)


def test_offsets_beyond_int32() -> None:
    """Of rows, of columns, and of pages, whose tokens lie apart, too."""
    pages, q, k, out, paged = far_apart(torch.float32, (16, 192), (8, 128), (128,), (3,), (16,))
    cache = pages[..., :128]
    cache[2], q[:], k[:] = torch.randn(16, 128), torch.randn(3, 8, 128), torch.randn(3, 128)
    weights, end = torch.randn(3, 8), torch.tensor([1, 2, 3])
    indexer_logits(q, weights, k, torch.zeros_like(end), end, out=out.T)
    assert_within(out.T, mask(truth(q, weights, k), torch.zeros(3), end), bound(q, weights, k))

    (table,) = far_apart(torch.int32, (1,))
    table[:] = 2
    lens = torch.full((3, 1), 16)
    indexer_logits_paged(q[:, None], weights[:, None], cache, table, lens, 16, out=paged)
    assert_within(paged, truth(q, weights, cache[2]), bound(q, weights, cache[2]))
    assert torch.equal(gather_index_keys(cache, table[2], 16)[0], cache[2])


def test_paged_with_more_draft_tokens_than_a_program_holds() -> None:
    check_paged(torch.bfloat16, 48, 5, 64)


def test_e4m3_where_the_chip_has_it(chip: Callable[[Arch], None]) -> None:
    chip(ARCHS["sm90"])
    check_prefill(FP8, 5, 16, 130)
    check_paged(FP8, 64, 2, 16)


def test_paged_tables_may_hold_anything() -> None:
    cache = make_index_cache(torch.float32, 4, 16)
    cache[2] = torch.randn(16, 128)
    q, weights = torch.randn(3, 1, 8, 128), torch.randn(3, 1, 8)
    table = torch.tensor([[2, -5], [2, 2**31 - 1], [-(2**31), 2**31 - 1]], dtype=torch.int32)
    wide = torch.full((3, 40), torch.nan)
    out = wide[:, ::2]
    lens = torch.tensor([[7], [INT_MIN], [INT_MAX]], dtype=torch.int32)
    indexer_logits_paged(q, weights, cache, table, lens, 20, out=out)
    expected = truth(q[0], weights[0], cache[2, :7])
    assert_within(out[:1, :7], expected, bound(q[0], weights[0], cache[2, :7]))
    assert (out[0, 7:] == -torch.inf).all()
    assert (out[1] == -torch.inf).all()
    assert out[2].isnan().all()  # clamped to pages 0 and 3, which are unwritten
    assert wide[:, 1::2].isnan().all()
