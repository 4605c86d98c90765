"""Triton kernels of masked_mha and gather_latents, interpreted on a CPU, against fp64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_kernels.arch import ARCHS
from dsa_kernels.sparse_mla import gather_latents, masked_is_faster, masked_mha, reference
from dsa_kernels.testing import error
from dsa_testbed.far_apart import far_apart
from dsa_testbed.kernel_runs import DEVICE, kernels_run, stand_for  # noqa: F401 (a fixture)
from dsa_testbed.latents import SCALE, filled_cache, filled_fp8_cache

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# fp32 sums of up to 256 products and of the selection, each in another order than the reference's.
FP32_RMS = 1e-6


def chosen(selected: Tensor, columns: int) -> Tensor:
    """[T, keys] bool -> [T, columns] int32 indices in any order, -1 padded."""
    indices = torch.full((len(selected), columns), -1, dtype=torch.int32)
    for row, keys in enumerate(selected):
        where = keys.nonzero()[:, 0].int()
        indices[row, : len(where)] = where[torch.randperm(len(where))]
    return indices


def inputs(
    dtype: torch.dtype, rows: int, keys: int, heads: int, width: int, v_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.randn(heads, keys, width), torch.randn(heads, keys, v_width)
    return torch.randn(rows, heads, width).to(dtype), k.to(dtype), v.to(dtype)


def truth(q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Tensor:
    scores = q.double().transpose(0, 1) @ k.double().transpose(1, 2) * SCALE
    weights = scores.masked_fill(~selected, -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ v.double()).transpose(0, 1)


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> None:
    """At most 0.9 of the error of eager attention in that precision, which rounds scores too."""
    expected = truth(q, k, v, selected)
    limit = FP32_RMS
    if q.dtype != torch.float32:
        scores = (q.transpose(0, 1) @ k.transpose(1, 2) * SCALE).masked_fill(~selected, -torch.inf)
        eager = scores.float().softmax(-1).nan_to_num(0).to(q.dtype) @ v
        limit = 0.9 * error(eager.transpose(0, 1), expected).rms
    assert error(out, expected).rms <= limit
    assert (out[~selected.any(1)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "v_width"), [(192, 128), (256, 256)])
def test_dtypes_and_widths(dtype: torch.dtype, width: int, v_width: int) -> None:
    q, k, v = inputs(dtype, 70, 200, 3, width, v_width)
    selected = torch.rand(70, 200) < 0.3
    selected[33] = False
    out = masked_mha(q, k, v, chosen(selected, 128), SCALE)
    assert out.dtype == dtype
    check(out, q, k, v, selected)


@pytest.mark.parametrize("edge", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_edges_of_blocks(edge: int) -> None:
    """Rows and keys around each block's size, the last key always among the selected."""
    for rows, keys in ((edge, 70), (3, edge)):
        q, k, v = inputs(torch.bfloat16, rows, keys, 1, 192, 128)
        selected = torch.rand(rows, keys) < 0.5
        selected[:, -1] = True
        check(masked_mha(q, k, v, chosen(selected, 130), SCALE), q, k, v, selected)


@pytest.mark.parametrize(("width", "v_width"), [(10, 7), (16, 16), (100, 70), (65, 1), (130, 129)])
def test_widths_that_are_no_powers_of_two(width: int, v_width: int) -> None:
    """What lies beside a head's values is NaN."""
    shapes = ((5, 2, width), (2, 40, width), (2, 40, v_width))
    q, k, v = (torch.full((*shape[:2], 300), torch.nan)[..., : shape[2]] for shape in shapes)
    for tensor in (q, k, v):
        tensor.copy_(torch.randn(tensor.shape))
    selected = torch.rand(5, 40) < 0.5
    check(masked_mha(q, k, v, chosen(selected, 40), SCALE), q, k, v, selected)


@pytest.mark.parametrize("keys", [2047, 2048, 2049, 4100])
def test_contexts_of_several_masks(keys: int) -> None:
    """2048 of them, in a mask whose segments are 2048 keys; one row selects the ends of words."""
    q, k, v = inputs(torch.float32, 3, keys, 1, 192, 128)
    selected = torch.zeros(3, keys, dtype=torch.bool)
    selected[0, torch.randperm(keys)[:2048]] = True
    selected[1, 31::32] = True
    selected[1, ::32] = True
    selected[2, keys - 1] = True
    check(masked_mha(q, k, v, chosen(selected, 2048).long(), SCALE), q, k, v, selected)


def test_causal_prefill_of_a_short_prompt() -> None:
    """Every visible token selected, in order: what most prompts are."""
    q, k, v = inputs(torch.bfloat16, 130, 150, 2, 192, 128)
    selected = torch.ones(130, 150, dtype=torch.bool).tril(20)
    check(masked_mha(q, k, v, chosen(selected, 256), SCALE), q, k, v, selected)


def test_nothing_reads_what_no_row_selected() -> None:
    """Keys after the last selected are not read, and NaN in them is not seen."""
    q, k, v = inputs(torch.float32, 4, 300, 2, 192, 128)
    selected = torch.rand(4, 300) < 0.5
    selected[:, 60:] = False
    expected = truth(q, k, v, selected)
    k[:, 64:], v[:, 64:] = torch.nan, torch.nan
    assert error(masked_mha(q, k, v, chosen(selected, 64), SCALE), expected).rms <= FP32_RMS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=12, deadline=None, phases=[Phase.generate])  # shrinking takes minutes here
@given(data=st.data())
def test_any_indices(dtype: torch.dtype, data: st.DataObject) -> None:
    """Repeated ones count once; negative ones and those past the last key are ignored."""
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    keys = data.draw(st.sampled_from([1, 31, 32, 33, 64]))
    hostile = [-(2**63), -(2**31), -1, keys, 2**31 - 1, 2**31, 2**63 - 1]
    entry = st.one_of(st.integers(0, keys - 1), st.sampled_from(hostile))
    indices = torch.tensor(
        [data.draw(st.lists(entry, min_size=columns, max_size=columns)) for _ in range(rows)]
    )
    q, k, v = inputs(dtype, rows, keys, 2, 192, 128)
    valid = torch.where((indices < 0) | (indices >= keys), -1, indices)
    selected = reference.selection(valid, keys)
    out = masked_mha(q, k, v, indices, SCALE)
    assert not out.isnan().any()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        out.double(), truth(q, k, v, selected), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("factor", [300.0, -300.0])
def test_huge_scores(factor: float) -> None:
    q, k, v = inputs(torch.float32, 3, 70, 2, 192, 128)
    selected = torch.ones(3, 70, dtype=torch.bool)
    out = masked_mha(q * factor, k, v, chosen(selected, 70), SCALE)
    assert error(out, truth(q * factor, k, v, selected)).rms < 1e-4


def test_strided_inputs_and_output() -> None:
    q = torch.randn(2, 5, 600)[..., 30:414:2].transpose(0, 1)
    k = torch.randn(40, 2, 400)[..., 5:389:2].transpose(0, 1)
    v = torch.randn(40, 2, 400)[..., 5:261:2].transpose(0, 1)
    selected = torch.rand(5, 40) < 0.5
    indices = chosen(selected, 40).repeat_interleave(2, 1).T.contiguous().T[:, ::2]
    wide = torch.full((2, 5, 300), torch.nan)
    out = masked_mha(q, k, v, indices, SCALE, out=wide[..., 20:276:2].transpose(0, 1))
    check(out, q, k, v, selected)
    assert out.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
    assert int(wide.isnan().sum()) == 2 * 5 * (300 - 128)


def test_offsets_beyond_int32() -> None:
    """Of rows of queries and outputs, and of heads of keys and values."""
    q, out, k, v = far_apart(torch.float16, (3, 192), (3, 128), (40, 192), (40, 128))
    for tensor in (q, k, v):
        tensor[:] = torch.randn(tensor.shape)
    selected = torch.rand(3, 40) < 0.5
    check(masked_mha(q, k, v, chosen(selected, 40), SCALE, out=out), q, k, v, selected)


def test_nothing_to_do(kernels_run: list[str]) -> None:  # noqa: F811
    q, k, v = inputs(torch.bfloat16, 3, 5, 2, 192, 128)
    none = torch.zeros(3, 0, dtype=torch.int32)
    assert (masked_mha(q, k, v, none, SCALE) == 0).all()
    indices = torch.zeros(3, 4, dtype=torch.int32)
    assert (masked_mha(q, k[:, :0], v[:, :0], indices, SCALE) == 0).all()
    launched = len(kernels_run)
    assert masked_mha(q[:0], k, v, indices[:0], SCALE).shape == (0, 2, 128)
    assert masked_mha(q[:, :0], k[:0], v[:0], indices, SCALE).shape == (3, 0, 128)
    assert len(kernels_run) == launched, "a GPU refuses an empty grid"


@pytest.mark.parametrize("name", ARCHS)
def test_grids_fit_every_chip(name: str, kernels_run: list[str]) -> None:  # noqa: F811
    """Only the first axis of a grid may pass 65,535: rows and heads lie there."""
    from dsa_kernels.sparse_mla.masked_kernel import launches

    kernels_run.append("none: meta tensors")
    empty = partial(torch.empty, device="meta")
    q, out = empty(70_000, 128, 192), empty(70_000, 128, 128)
    k, v = empty(128, 16_384, 192), empty(128, 16_384, 128)
    indices = empty(70_000, 2048, dtype=torch.int32)
    mask, attend = launches(q, k, v, indices, SCALE, out, ARCHS[name])
    assert mask.grid == (70_000, 8)
    assert len(attend.grid) == 1
    assert attend.grid[0] * attend.config.blocks["BLOCK_ROWS"] >= 70_000 * 128


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filled", [filled_cache, filled_fp8_cache])
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_gather_latents(dtype: torch.dtype, filled: Any, block_size: int) -> None:
    """Every count of keys around a block's end; garbage beyond them in the table is not read."""
    blocks = 192 // block_size
    used = torch.randperm(192)[:130]
    for keys in (1, 15, 16, 17, 64, 65, 129):
        pages = torch.randperm(blocks)[: -(-keys // block_size)].int()
        used = (pages[:, None] * block_size + torch.arange(block_size)).flatten()
        cache, values = filled(dtype, blocks, block_size, used, gap=132 * block_size)
        table = torch.cat((pages, torch.tensor([2**31 - 1], dtype=torch.int32)))
        latents = gather_latents(cache, table, keys, dtype)
        assert latents.dtype == dtype
        assert torch.equal(latents.double(), values[used[:keys].long()].double())


def test_gather_latents_on_a_chip_that_has_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa_kernels.sparse_mla import gather_kernel

    stand_for(monkeypatch, gather_kernel, ARCHS["sm90"])
    cache, values = filled_fp8_cache(torch.bfloat16, 2, 64, torch.arange(128))
    table = torch.tensor([1, 0])
    latents = gather_latents(cache, table, 100, torch.bfloat16)
    assert torch.equal(latents.double(), torch.cat((values[64:], values[:36])))


def test_gather_latents_beyond_int32_and_from_hostile_pages() -> None:
    (pages,) = far_apart(torch.float16, (16, 600))
    cache = pages[..., :576]
    cache[:] = torch.randn(3, 16, 576)
    table = torch.tensor([2, -(2**31), 2**31 - 1], dtype=torch.int32)
    latents = gather_latents(cache, table.repeat_interleave(2)[::2], 48, torch.float16)
    assert torch.equal(latents, cache[[2, 0, 2]].flatten(0, 1))
    assert gather_latents(cache, table, 0, torch.float16).shape == (0, 576)


def test_masked_where_it_is_faster(kernels_run: list[str]) -> None:  # noqa: F811
    """By what both forms cost, once it outweighs the launches."""
    kernels_run.append("none: arithmetic")
    v32 = partial(masked_is_faster, DEVICE, topk=2048, width=192, v_width=128, latent_bytes=1152)
    assert v32(rows=4096, keys=4096, heads=128)
    assert v32(rows=4096, keys=6000, heads=128)
    assert not v32(rows=4096, keys=7000, heads=128), "6963 keys cost what 2048 latents do"
    assert v32(rows=4096, keys=13_000, heads=16), "gathering takes longer than its products"
    assert not v32(rows=4096, keys=15_000, heads=16)
    assert v32(rows=4096, keys=7500, heads=16, latent_bytes=656)
    assert not v32(rows=4096, keys=9000, heads=16, latent_bytes=656), "fewer bytes are gathered"
    assert not v32(rows=100, keys=2048, heads=128), "expanding costs too much"
    assert not v32(rows=300, keys=300, heads=16), "launching costs too much"
    glm = partial(masked_is_faster, DEVICE, topk=2048, width=256, v_width=256, latent_bytes=1152)
    assert glm(rows=4096, keys=4096, heads=64)
    assert not glm(rows=4096, keys=4500, heads=64), "its heads are wider: 4352 keys"
