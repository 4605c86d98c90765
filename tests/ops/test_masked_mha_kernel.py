"""What only the kernels of masked_mha and gather_latents have; test_masked_mha.py has the rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dsa_kernels.arch import ARCHS
from dsa_kernels.sparse_mla import gather_latents, masked_mha
from dsa_kernels.testing import error
from dsa_testbed.far_apart import far_apart
from dsa_testbed.kernel_runs import stand_for
from dsa_testbed.latents import SCALE, filled_fp8_cache, fp32_limit
from dsa_testbed.masked import check, chosen, inputs, truth

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]


def test_nothing_reads_what_no_row_selected() -> None:
    """Keys after the last selected are not read, and NaN in them is not seen."""
    q, k, v = inputs(torch.float32, 4, 300, 2, 192, 128)
    selected = torch.rand(4, 300) < 0.5
    selected[:, 60:] = False
    expected, limit = truth(q, k, v, selected), fp32_limit(q, k, 60)
    k[:, 64:], v[:, 64:] = torch.nan, torch.nan
    assert error(masked_mha(q, k, v, chosen(selected, 64), SCALE), expected).rms <= limit


def test_offsets_beyond_int32() -> None:
    """Of rows of queries and outputs, and of heads of keys and values.

    The truth comes from copies that lie together: cuBLAS is no judge of rows 2 GiB apart.
    """
    q, out, k, v = far_apart(torch.float16, (3, 192), (3, 128), (40, 192), (40, 128))
    for tensor in (q, k, v):
        tensor[:] = torch.randn(tensor.shape)
    selected = torch.rand(3, 40) < 0.5
    masked_mha(q, k, v, chosen(selected, 40), SCALE, out=out)
    check(out, q.contiguous(), k.contiguous(), v.contiguous(), selected)


def test_no_grid_is_empty(kernels_run: list[str]) -> None:
    """A GPU refuses one."""
    q, k, v = inputs(torch.bfloat16, 3, 5, 2, 192, 128)
    indices = torch.zeros(3, 4, dtype=torch.int32)
    masked_mha(q, k, v, indices, SCALE)
    launched = len(kernels_run)
    masked_mha(q[:0], k, v, indices[:0], SCALE)
    masked_mha(q[:, :0], k[:0], v[:0], indices, SCALE)
    assert len(kernels_run) == launched


@pytest.mark.parametrize("name", ARCHS)
def test_grids_fit_every_chip(name: str, kernels_run: list[str]) -> None:
    """Only the first axis of a grid may pass 65,535: rows and heads lie there."""
    from dsa_kernels.sparse_mla.masked_kernel import launches

    kernels_run.append("none: meta tensors")
    empty = partial(torch.empty, device="meta")
    q, out = empty(70_000, 128, 192), empty(70_000, 128, 128)
    k, v = empty(128, 16_384, 192), empty(128, 16_384, 128)
    indices = empty(70_000, 2048, dtype=torch.int32)
    mask, attend = launches(q, k, v, indices, SCALE, out, ARCHS[name])
    assert mask.grid == (70_000,)
    assert len(attend.grid) == 1
    assert attend.grid[0] * attend.config.blocks["BLOCK_ROWS"] >= 70_000 * 128


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
