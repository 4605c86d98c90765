"""topk_select against a sort of (score, index) written in Python: equal, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_kernels.testing import make_block_table
from dsa_kernels.topk_select import (
    api,
    cpu,
    reference,
    topk_select,
    topk_select_slots,
    topk_slots,
)
from dsa_testbed.topk import expected_rows

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(params=[cpu, reference], ids=["cpu", "reference"], autouse=True, scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs what a CPU runs, and the specification."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "cpu", request.param)
        yield


def int32(values: list[int] | list[list[int]] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_ties_and_ranges(data: st.DataObject) -> None:
    """Few distinct scores, so that nearly every choice is a tie; infinities and both zeros too."""
    rows, columns = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, 50))
    score = st.sampled_from([-3.0, -1.0, -0.0, 0.0, 1.0, 1e-45, -1e-45, -torch.inf, torch.inf])
    cells = st.lists(score, min_size=rows * columns, max_size=rows * columns)
    logits = torch.tensor(data.draw(cells), dtype=torch.float32).view(rows, columns)
    bounds = st.lists(st.integers(0, columns), min_size=rows, max_size=rows)
    start = int32(data.draw(bounds)) if data.draw(st.booleans()) else None
    end = int32(data.draw(bounds))
    result = topk_select(logits, k, start, end)
    assert result.dtype == torch.int32
    assert torch.equal(result, expected_rows(logits, k, start, end))


@pytest.mark.parametrize("kind", ["random", "integers", "equal", "negative", "steps"])
@pytest.mark.parametrize(("columns", "k"), [(2048, 2048), (2049, 2048), (4103, 2048), (32768, 64)])
def test_real_sizes(kind: str, columns: int, k: int) -> None:
    logits = {
        "random": torch.randn(6, columns),
        "integers": torch.randint(-5, 6, (6, columns)).float(),
        "equal": torch.full((6, columns), -7.5),
        "negative": -torch.rand(6, columns) - 1e3,
        "steps": (torch.arange(columns).flip(0) // 100).float().repeat(6, 1),
    }[kind]
    start = int32([0, 0, 1, 0, columns // 2, 5])
    end = int32([columns, columns - 1, columns, 1, columns, 5])
    result = topk_select(logits, k, start, end)
    assert torch.equal(result, expected_rows(logits, k, start, end))


@pytest.mark.parametrize("k", [1, 64, 2048])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129])
def test_short_contexts(length: int, k: int) -> None:
    logits = torch.randn(3, length)
    end = int32([length, length - 1, 0])
    result = topk_select(logits, k, None, end)
    assert torch.equal(result, expected_rows(logits, k, None, end))


def test_many_rows() -> None:
    """More rows than a 16-bit grid dimension holds."""
    logits = torch.randint(0, 3, (70_001, 9)).float()
    end = torch.randint(0, 10, (70_001,))
    result = topk_select(logits, 4, None, end)
    assert torch.equal(result, expected_rows(logits, 4, None, end))


def test_outside_the_range_is_not_looked_at() -> None:
    logits = torch.full((3, 100), torch.nan)
    logits[:, 60:] = torch.inf
    logits[:, 10:50] = torch.randn(3, 40)
    start, end = int32([10] * 3), int32([50] * 3)
    for k in (5, 40, 60):
        result = topk_select(logits, k, start, end)
        assert torch.equal(result, expected_rows(logits, k, start, end))


def test_nan_scores_stay_in_range_and_unique() -> None:
    logits = torch.randn(4, 50)
    logits[1, 7:30], logits[2], logits[3, ::2] = torch.nan, torch.nan, -torch.nan
    result = topk_select(logits, 10, None, int32([20] * 4))
    assert ((result >= 0) & (result < 20)).all()
    assert (result.diff(dim=1) > 0).all()


def test_the_least_nan_is_the_last_choice() -> None:
    logits = torch.tensor([[-1, -1, 0, -1]], dtype=torch.int32).view(torch.float32)
    for k, expected in ((1, [2]), (2, [0, 2]), (4, [0, 1, 2, 3])):
        assert topk_select(logits, k, None, int32([4])).tolist() == [expected]


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randint(0, 50, (40, 700)).float()
    end = int32(torch.randint(0, 701, (40,)))
    result = topk_select(logits, 64, None, end)
    alone = [topk_select(logits[row : row + 1], 64, None, end[row : row + 1]) for row in range(40)]
    assert torch.equal(result, torch.cat(alone))


def test_strided_inputs_and_out() -> None:
    logits, end = torch.randn(300, 12).T[:, 50:250], int32(torch.randint(0, 201, (12,)))
    wide = torch.full((12, 60), 99, dtype=torch.int32)
    result = topk_select(logits, 40, None, end, out=wide[:, 10:50])
    assert torch.equal(wide[:, 10:50], expected_rows(logits, 40, None, end))
    assert result.data_ptr() == wide[:, 10:50].data_ptr()
    assert wide[:, :10].eq(99).all()
    assert wide[:, 50:].eq(99).all()


def test_no_columns() -> None:
    result = topk_select(torch.randn(3, 0), 4, None, int32([0] * 3))
    assert torch.equal(result, torch.full((3, 4), -1, dtype=torch.int32))


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots(block_size: int, dtype: torch.dtype) -> None:
    lengths = [1, 63, 64, 65, 127, 700]
    table = make_block_table(lengths, block_size, 2000, shared=1)
    table = torch.cat((table, table), 1)[:, : table.shape[1]].to(dtype)
    requests = torch.randint(0, 6, (50,))
    indices = torch.stack([torch.randint(-1, lengths[request], (33,)) for request in requests])
    slots = topk_slots(indices.to(dtype), table, requests.to(dtype), block_size)
    assert slots.dtype == torch.int64
    for row, request in enumerate(requests.tolist()):
        for index, slot in zip(indices[row].tolist(), slots[row].tolist(), strict=True):
            block = int(table[request, index // block_size]) if index >= 0 else -1
            assert slot == (block * block_size + index % block_size if index >= 0 else -1)


def test_slots_of_hostile_indices() -> None:
    table = torch.tensor([[3, 1, 9], [5, -1, 9]], dtype=torch.int32)[:, :2]  # not contiguous
    indices = int32([[0, 7, 8, 15, 16, -1, -(2**31), 2**31 - 1]])
    slots = topk_slots(indices.repeat(2, 1), table, int32([0, 1]), 8)
    assert slots.tolist() == [[24, 31, 8, 15, -1, -1, -1, -1], [40, 47, -1, -1, -1, -1, -1, -1]]


def test_slots_in_chunks() -> None:
    indices = int32(torch.randint(-1, 640, (3000, 512)))
    table = torch.randperm(30).view(3, 10).int()
    requests = torch.randint(0, 3, (3000,))
    slots = topk_slots(indices, table, requests, 64)
    expected = table[requests[:, None], indices.clamp(min=0) // 64].long() * 64 + indices % 64
    assert torch.equal(slots, expected.masked_fill(indices < 0, -1))


def test_indices_and_slots_at_once() -> None:
    logits, end = torch.randn(3, 100), int32([100, 40, 0])
    table, requests = torch.randperm(21).view(3, 7).int(), int32([2, 0, 1])
    indices, slots = topk_select_slots(logits, 50, end, table, requests, 16)
    assert torch.equal(indices, topk_select(logits, 50, None, end))
    assert torch.equal(slots, topk_slots(indices, table, requests, 16))
