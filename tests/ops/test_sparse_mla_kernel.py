"""sparse_mla's Triton kernels, interpreted on a CPU, against fp64 and against eager attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_kernels.arch import ARCHS, arch_of
from dsa_kernels.launch import launch_config
from dsa_kernels.sparse_mla import sparse_mla
from dsa_kernels.testing import error, make_block_table, make_latent_cache, make_slots
from dsa_testbed.far_apart import far_apart
from dsa_testbed.kernel_runs import DEVICE, kernels_run, stand_for  # noqa: F401 (a fixture)
from dsa_testbed.latents import (
    SCALE,
    eager,
    filled_cache,
    filled_fp8_cache,
    random_slots,
    truth,
)

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HOSTILE = [-(2**63), -(2**31), -1, 2**31 - 1, 2**31, 2**63 - 1]
# fp32 sums of 576 products and of the selection, each in another order than the reference's.
FP32_RMS = 1e-6


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the interpreter stand for another chip."""
    from dsa_kernels.sparse_mla import kernel

    return partial(stand_for, monkeypatch, kernel)


def check(out: Tensor, lse: Tensor, q: Tensor, values: Tensor, slots: Tensor) -> None:
    """At most 0.9 of the error of eager attention in that precision, which rounds scores too."""
    expected, expected_lse = truth(q, values, slots)
    limit = FP32_RMS
    if q.dtype != torch.float32:
        limit = 0.9 * error(eager(q, values.to(q.dtype), slots), expected).rms
    assert error(out, expected).rms <= limit
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [8, 16, 20, 64, 128])
def test_heads(dtype: torch.dtype, heads: int) -> None:
    used = torch.randperm(9 * 64)[:300]
    cache, values = filled_cache(dtype, 9, 64, used, gap=8448)
    rows = 1 if heads >= 64 else 2  # the interpreter takes seconds for two
    q, slots = torch.randn(rows, heads, 576).to(dtype), random_slots(rows, 40, used)
    out, lse = sparse_mla(q, cache, slots, SCALE)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    check(out, lse, q, values, slots)


@pytest.mark.parametrize("k", [1, 15, 16, 31, 32, 33, 63, 64, 65, 127])
@pytest.mark.parametrize("split", [False, True])
def test_edges_of_blocks(
    k: int,
    split: bool,
    chip: Any,
    kernels_run: list[str],  # noqa: F811 (the fixture)
) -> None:
    """Selections around each block size, whole and in as many parts as there are blocks."""
    chip(replace(arch_of(DEVICE), num_sms=64 if split else 1))
    used = torch.randperm(9 * 16)[:130]
    cache, values = filled_cache(torch.bfloat16, 9, 16, used)
    q, slots = torch.randn(2, 8, 576).bfloat16(), random_slots(2, k, used)
    out, lse = sparse_mla(q, cache, slots.int(), SCALE)
    check(out, lse, q, values, slots)
    block = launch_config("sparse_mla", arch_of(DEVICE), ("float", 16)).blocks["BLOCK_K"]
    assert ("_merge" in kernels_run) == (split and k > block)


@pytest.mark.parametrize("filled", [filled_cache, filled_fp8_cache])
def test_a_whole_selection(filled: Any, chip: Any) -> None:
    """2048 of 4100 tokens, in eight parts; the second row's ends early, within a block."""
    chip(replace(arch_of(DEVICE), num_sms=16))
    used = torch.randperm(65 * 64)[:4100]
    cache, values = filled(torch.bfloat16, 65, 64, used)
    q, slots = torch.randn(2, 8, 576).bfloat16(), random_slots(2, 2048, used)
    length = torch.tensor([2048, 2017], dtype=torch.int32)
    out, lse = sparse_mla(q, cache, slots, SCALE, topk_length=length)
    for row in range(2):
        seen = slots[row : row + 1, : int(length[row])]
        check(out[row, None], lse[row, None], q[row, None], values, seen)


@pytest.mark.parametrize("name", ARCHS)
def test_grids_fit_every_chip(name: str, kernels_run: list[str]) -> None:  # noqa: F811
    """Only the first axis of a grid may pass 65,535: rows lie there."""
    from dsa_kernels.sparse_mla.kernel import launches

    kernels_run.append("none: meta tensors")
    for rows in (1, 70_000):
        cache = torch.empty(9, 64, 576, dtype=torch.bfloat16, device="meta")
        q = torch.empty(rows, 128, 576, dtype=cache.dtype, device="meta")
        slots = torch.empty(rows, 2048, dtype=torch.int32, device="meta")
        out = torch.empty(rows, 128, 512, dtype=cache.dtype, device="meta")
        lse = torch.empty(rows, 128, device="meta")
        found = launches(q, cache, slots, None, SCALE, out, lse, ARCHS[name])
        assert len(found) == 1 + (rows == 1)
        for launch in found:
            assert launch.grid[0] >= rows
            assert launch.grid[1] < 65_536


@pytest.mark.parametrize(
    ("dtype", "heads", "block_size"),
    [*((dtype, 16, 16) for dtype in DTYPES), (torch.bfloat16, 40, 64), (torch.bfloat16, 16, 1)],
)
def test_fp8_cache(dtype: torch.dtype, heads: int, block_size: int) -> None:
    used = torch.randperm(128)[:100]
    cache, values = filled_fp8_cache(
        dtype, 128 // block_size, block_size, used, gap=132 * block_size
    )
    q, slots = torch.randn(3, heads, 576).to(dtype), random_slots(3, 70, used)
    out, lse = sparse_mla(q, cache, slots, SCALE)
    check(out, lse, q, values, slots)


def test_fp8_cache_on_a_chip_that_has_e4m3(chip: Any) -> None:
    chip(ARCHS["sm90"])
    used = torch.randperm(128)[:100]
    cache, values = filled_fp8_cache(torch.bfloat16, 2, 64, used)
    q, slots = torch.randn(2, 16, 576).bfloat16(), random_slots(2, 70, used)
    out, lse = sparse_mla(q, cache, slots, SCALE)
    check(out, lse, q, values, slots)


def test_rows_of_many_requests() -> None:
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
    out, lse = sparse_mla(q, cache, slots, SCALE, topk_length=torch.tensor(context))
    expected, expected_lse = truth(q, values, slots)
    assert error(out, expected).rms < FP32_RMS
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("num_sms", [1, 64])
def test_offsets_beyond_int32(num_sms: int, chip: Any) -> None:
    """Of pages, whose tokens lie apart, too, of queries and outputs; in one part and in two."""
    chip(replace(arch_of(DEVICE), num_sms=num_sms))
    pages, q, out = far_apart(torch.float16, (16, 600), (2, 576), (2, 512))
    cache = pages[..., :576]
    cache[2] = torch.randn(16, 576)
    q[:] = torch.randn(3, 2, 576)
    slots = random_slots(3, 40, torch.arange(32, 48).repeat(3))
    check(*sparse_mla(q, cache, slots.int(), SCALE, out=out), q, cache.flatten(0, 1), slots)


@pytest.mark.parametrize(
    ("slot", "dtype"),
    [
        *((slot, torch.int64) for slot in [*HOSTILE, 48]),
        *((slot, torch.int32) for slot in (-(2**31), -1, 2**31 - 1, 48)),
    ],
)
@pytest.mark.parametrize("filled", [filled_cache, filled_fp8_cache])
def test_hostile_slot(slot: int, dtype: torch.dtype, filled: Any) -> None:
    """One at a time; the entry beside it is valid, every unwritten slot (0 too) is NaN."""
    cache, values = filled(torch.float32, 3, 16, torch.tensor([5]), gap=64)
    q, slots = torch.randn(1, 3, 576), torch.tensor([[slot, 5, slot]], dtype=dtype)
    out, lse = sparse_mla(q, cache, slots, SCALE)
    expected, expected_lse = truth(q, values, slots)
    assert error(out, expected).rms < FP32_RMS
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=12, deadline=None, phases=[Phase.generate])  # shrinking takes minutes here
@given(data=st.data())
def test_hostile_slots(dtype: torch.dtype, data: st.DataObject) -> None:
    """Ignored entries anywhere, whole rows of them; unwritten slots (slot 0 too) are NaN."""
    rows, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    used = torch.tensor([5, 17, 18, 30, 41])
    cache, values = filled_cache(dtype, 3, 16, used, gap=64)
    entry = st.sampled_from([*HOSTILE, 48, *used.tolist()])
    dull = st.sampled_from(HOSTILE)
    slots = torch.tensor(
        [
            data.draw(st.lists(dull if data.draw(st.booleans()) else entry, min_size=k, max_size=k))
            for _ in range(rows)
        ]
    )
    end = st.one_of(st.integers(-1, 50), st.sampled_from([-(2**63), 2**31, 2**63 - 1]))
    length = torch.tensor(data.draw(st.lists(end, min_size=rows, max_size=rows)))
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
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_every_row_empty(rows: int, chip: Any) -> None:
    """Split over the selection where there is one row, whole where there are five."""
    chip(replace(arch_of(DEVICE), num_sms=4))
    cache = make_latent_cache(torch.bfloat16, 2, 64)
    q = torch.randn(rows, 16, 576).bfloat16()
    for slots in (torch.full((rows, 65), -1), torch.zeros(rows, 0, dtype=torch.int64)):
        out, lse = sparse_mla(q, cache, slots, SCALE)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
    assert sparse_mla(q[:0], cache, slots[:0], SCALE)[0].shape == (0, 16, 512)


@pytest.mark.parametrize("factor", [300.0, -300.0])
def test_huge_scores(factor: float) -> None:
    used = torch.arange(64)
    cache, values = filled_cache(torch.float32, 1, 64, used)
    q, slots = torch.randn(2, 4, 576) * factor, used.repeat(2, 1)
    out, lse = sparse_mla(q, cache, slots, 1.0)
    expected, expected_lse = truth(q, values, slots, 1.0)
    assert expected_lse.abs().max() > 5e3
    assert error(out, expected).rms < 1e-3
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.05, rtol=1e-6)


@pytest.mark.parametrize("num_sms", [1, 64])
def test_strided_inputs_and_outputs(num_sms: int, chip: Any) -> None:
    chip(replace(arch_of(DEVICE), num_sms=num_sms))
    used = torch.arange(300)
    cache, values = filled_cache(torch.float32, 5, 64, used, gap=36)
    q = torch.randn(8, 2, 1400)[..., 60:1212:2].transpose(0, 1)
    slots = random_slots(2, 40, used).T.contiguous().T
    wide, wide_lse = torch.full((2, 8, 1100), torch.nan), torch.full((8, 2), torch.nan)
    wide_out = wide[..., 20:1044:2]
    length = torch.tensor([[33, 0], [40, 0]])[:, 0]
    out, lse = sparse_mla(q, cache, slots, SCALE, topk_length=length, out=wide_out, lse=wide_lse.T)
    check(out, lse, q, values, torch.where(torch.arange(40) < length[:, None], slots, -1))
    assert out.data_ptr() == wide_out.data_ptr()
    assert lse.data_ptr() == wide_lse.data_ptr()
    assert int(wide.isnan().sum()) == 2 * 8 * (1100 - 512)


def test_an_entry_that_occurs_twice_counts_twice() -> None:
    used = torch.arange(16)
    cache, values = filled_cache(torch.float32, 1, 16, used)
    q, slots = torch.randn(1, 2, 576), torch.tensor([[3, 3, 9]])
    check(*sparse_mla(q, cache, slots, SCALE), q, values, slots)
