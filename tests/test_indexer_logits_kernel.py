"""indexer_logits' Triton kernels, interpreted on a CPU, against a dense fp64 score.

They keep fp32 throughout, so the bound has none of the reference's bf16 rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsa_kernels.arch import ARCHS, Arch
from dsa_kernels.indexer_logits import gather_index_keys, indexer_logits, indexer_logits_paged
from dsa_kernels.testing import make_block_table, make_index_cache, make_slots
from dsa_testbed.index_keys import FP8, assert_within, fill, inputs, mask, truth
from dsa_testbed.interpreted import kernels_run, stand_for  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, FP8]


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Callable[[Arch], None]:
    from dsa_kernels.indexer_logits import kernel

    return lambda arch: stand_for(monkeypatch, kernel, arch)


def bound(q: Tensor, weights: Tensor, k: Tensor, k_scale: Tensor | None = None) -> Tensor:
    """fp32 sums of 128 exact products and of the heads, whatever the dtype."""
    return 2.0**-20 * truth(q.double().abs(), weights.abs(), k.double().abs(), k_scale)


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
    chip(replace(ARCHS["sm80"], num_sms=num_sms))
    check_prefill(torch.bfloat16, 9, 16, keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_a_long_chunk(dtype: torch.dtype, chip: Callable[[Arch], None]) -> None:
    """Rows from the middle of a context: tiles before, inside and after what a program sees."""
    chip(replace(ARCHS["sm80"], num_sms=1))
    q, weights, k = inputs(6, 64, 4100, dtype)
    scale = torch.rand(4100) if dtype == FP8 else None
    end = torch.tensor([1000, 1001, 4099, 4100, 70, 71])
    start = torch.tensor([900, 960, 3900, 4000, 0, 5])
    result = indexer_logits(q, weights, k, start, end, k_scale=scale)
    expected = mask(truth(q, weights, k, scale), start, end)
    assert_within(result, expected, bound(q, weights, k, scale))


def test_more_rows_than_a_grid_axis_has() -> None:
    q, weights, k = inputs(66_000, 1, 3, torch.float32)
    end = torch.randint(0, 4, (66_000,))
    result = indexer_logits(q, weights, k, torch.zeros_like(end), end)
    expected = mask(truth(q, weights, k), torch.zeros_like(end), end)
    assert_within(result, expected, bound(q, weights, k))


@pytest.mark.parametrize("name", ARCHS)
def test_grids_fit_every_chip(name: str, kernels_run: list[str]) -> None:  # noqa: F811
    """Only the first axis of a grid may pass 65,535: rows lie there, and a million keys do not."""
    from dsa_kernels.indexer_logits.kernel import plan

    kernels_run.append("none: meta tensors")

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for rows, keys in ((300_000, 64), (1, 1 << 20)):
        ends = meta(rows, dtype=torch.int32)
        out, weights = (meta(rows, n, dtype=torch.float32) for n in (keys, 64))
        (launch,) = plan(
            meta(rows, 64, 128), weights, meta(keys, 128), ends, ends, None, out, ARCHS[name]
        )
        groups, segments = launch.grid
        assert segments < 65_536
        blocks = launch.config.blocks
        assert groups * (blocks["BLOCK_COLUMNS"] // blocks["BLOCK_HEADS"]) >= rows
        tiles = launch.arguments["tiles"]
        assert segments * tiles * blocks["BLOCK_KEYS"] >= keys


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


def test_strided_inputs_and_out() -> None:
    q, weights, k = torch.randn(9, 200, 8), torch.randn(8, 9), torch.randn(70, 300)
    query, weight, key = q[:, 30:158].transpose(1, 2), weights.T, k[:, 5:133]
    end = torch.randint(0, 71, (9, 2))[:, 1]
    wide = torch.full((9, 90), torch.nan)
    result = indexer_logits(query, weight, key, torch.zeros_like(end), end, out=wide[:, 10:80])
    expected = mask(truth(query, weight, key), torch.zeros_like(end), end)
    assert_within(wide[:, 10:80], expected, bound(query, weight, key))
    assert result.data_ptr() == wide[:, 10:80].data_ptr()
    assert wide[:, :10].isnan().all()
    assert wide[:, 80:].isnan().all()


def check_paged(dtype: torch.dtype, block_size: int, next_n: int, heads: int) -> None:
    """Requests that share a first page; gaps, unwritten tokens and the table's tail are garbage."""
    lengths = [1, 64, 65, 150]
    blocks = sum(-(-length // block_size) for length in lengths) + 3
    cache = make_index_cache(torch.uint8 if dtype == FP8 else dtype, blocks, block_size, gap=1152)
    table = make_block_table(lengths, block_size, blocks, shared=1)
    for row, length in enumerate(lengths):
        k = torch.randn(length, 128).to(dtype)
        scale = torch.rand(length) + 0.5 if dtype == FP8 else None
        fill(cache, make_slots(table[row], torch.arange(length), block_size), k, scale)
    q = torch.randn(4, next_n, heads, 128).to(dtype)
    weights = torch.randn(4, next_n, heads)
    # Draft tokens see one more key each; a request's first rows may see nothing.
    context_lens = (torch.tensor(lengths)[:, None] - next_n + 1 + torch.arange(next_n)).clamp(min=0)
    result = indexer_logits_paged(q, weights, cache, table, context_lens.int(), 160)
    result = result.view(4, next_n, 160)
    for row, length in enumerate(lengths):
        k, scale = gather_index_keys(cache, table[row], length)
        expected = truth(q[row], weights[row], k, scale)
        expected = mask(expected, torch.zeros(next_n), context_lens[row])
        assert_within(result[row, :, :length], expected, bound(q[row], weights[row], k, scale))
        assert (result[row, :, length:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("next_n", "heads"), [(1, 64), (2, 20), (3, 8)])
def test_paged(dtype: torch.dtype, next_n: int, heads: int) -> None:
    check_paged(dtype, 64 if heads > 8 else 16, next_n, heads)


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
    lens = torch.tensor([[7], [0], [32]], dtype=torch.int32)
    indexer_logits_paged(q, weights, cache, table, lens, 20, out=wide[:, :20])
    expected = truth(q[0], weights[0], cache[2, :7])
    assert_within(wide[:1, :7], expected, bound(q[0], weights[0], cache[2, :7]))
    assert (wide[0, 7:20] == -torch.inf).all()
    assert (wide[1, :20] == -torch.inf).all()
    assert wide[2, :20].isnan().all()  # clamped to pages 0 and 3, which are unwritten
    assert wide[:, 20:].isnan().all()


def test_torch_compile_sees_one_opaque_op() -> None:
    q, weights, k = inputs(2, 8, 20, torch.float32)
    start, end = torch.zeros(2).int(), torch.full((2,), 20).int()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def doubled(q: Tensor, k: Tensor) -> Tensor:
        return indexer_logits(q, weights, k, start, end) * 2

    assert_within(doubled(q, k) / 2, truth(q, weights, k), bound(q, weights, k))
