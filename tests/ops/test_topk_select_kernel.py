"""What only topk_select's kernels have: rounds, grids, offsets; test_topk_select.py the rest."""

from __future__ import annotations

import pytest
import torch

from dsa_kernels.arch import ARCHS, arch_of
from dsa_kernels.launch import launch_config
from dsa_kernels.topk_select import topk_select, topk_select_slots, topk_slots
from dsa_testbed.far_apart import far_apart
from dsa_testbed.kernel_runs import DEVICE
from dsa_testbed.topk import INT_MAX, expected_rows, int32

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]


def test_a_million_columns(kernels_run: list[str]) -> None:
    logits = torch.randint(-9000, 9000, (1, 1 << 20)).float()
    best = logits[0].sort(descending=True, stable=True).indices[:2048]
    result = topk_select(logits, 2048, None, int32([1 << 20]))
    assert torch.equal(result[0].long(), best.sort().values)
    assert kernels_run == ["_select"] * 3


def test_offsets_beyond_int32() -> None:
    """Of rows, of columns, of rows of the result; of a block table's rows and of its blocks."""
    logits, best, column = far_apart(torch.float32, (40,), (8,), (4,))
    logits[:], column[:] = torch.randn(3, 40), torch.randn(3, 4)
    end = int32([40, 39, 38])
    result = topk_select(logits, 8, None, end, out=best.view(torch.int32))
    assert torch.equal(result, expected_rows(logits, 8, None, end))
    end = int32([3, 3, 2, 3])
    assert torch.equal(topk_select(column.T, 2, None, end), expected_rows(column.T, 2, None, end))

    indices, table = far_apart(torch.int32, (5,), (2,))
    indices[:], table[2] = int32([0, 63, 64, 127, -1]), int32([2**26, INT_MAX])
    slots = topk_slots(indices, table, int32([0, 1, 2]), 64)
    assert slots[2].tolist() == [2**32, 2**32 + 63, INT_MAX * 64, INT_MAX * 64 + 63, -1]


def test_a_k_without_room(kernels_run: list[str]) -> None:
    kernels_run.append("none: refused")
    arch = arch_of(DEVICE)
    block = launch_config("topk_select", arch, "select").blocks["BLOCK"]
    refusal = rf"k: {block}; of rows longer than {block}.*{arch.name}.*at most {block // 2}"
    with pytest.raises(ValueError, match=refusal):
        topk_select(torch.randn(1, block + 1), block, None, int32([9]))


@pytest.mark.parametrize("name", ARCHS)
def test_counts_fit_their_half_of_an_int32(name: str, kernels_run: list[str]) -> None:
    kernels_run.append("none: a table")
    assert launch_config("topk_select", ARCHS[name], "select").blocks["BLOCK"] <= 1 << 14


def test_slots_take_no_launch_of_their_own(kernels_run: list[str]) -> None:
    table, end = torch.randperm(21).view(3, 7).int(), int32([100, 40, 0])
    topk_select_slots(torch.randn(3, 100), 50, end, table, int32([2, 0, 1]), 16)
    assert kernels_run == ["_select"]
