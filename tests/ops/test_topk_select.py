"""topk_select in every form against a sort of (score, index) in Python: equal, entry by entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_kernels.testing import INDEX_TOPK, make_block_table
from dsa_kernels.topk_select import reference, topk_select, topk_select_slots, topk_slots
from dsa_testbed.kernel_runs import drawn, unless_interpreted
from dsa_testbed.topk import INT_MAX, INT_MIN, expected_rows, int32, programs_hold

pytestmark = pytest.mark.usefixtures("poisoned_empty", "form")


@drawn(300, interpreted=40)
@given(data=st.data())
def test_ties_and_ranges(data: st.DataObject) -> None:
    """Few distinct scores, so that nearly every choice is a tie; in short rows and in long ones."""
    rows, columns = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 130))
    block = data.draw(st.sampled_from([16, 64, 256]))
    k = data.draw(st.one_of(st.integers(1, 8), st.integers(1, block // 2)))
    score = st.sampled_from([-3.0, -1.0, -0.0, 0.0, 1.0, 1e-45, -1e-45, -torch.inf, torch.inf])
    few = torch.tensor(data.draw(st.lists(score, min_size=1, max_size=7)))
    logits = few[torch.randint(0, len(few), (rows, columns))]
    edge = st.sampled_from([-3, -1, 0, 1, columns - 1, columns, columns + 3, INT_MAX])
    bounds = st.lists(st.one_of(edge, st.integers(0, columns)), min_size=rows, max_size=rows)
    start = int32(data.draw(bounds)) if data.draw(st.booleans()) else None
    end = int32([data.draw(st.sampled_from([bound, INT_MIN])) for bound in data.draw(bounds)])
    with pytest.MonkeyPatch.context() as patch:
        programs_hold(patch, block)
        result = topk_select(logits, k, start, end)
    assert torch.equal(result, expected_rows(logits, k, start, end))


@pytest.mark.parametrize("block", [16, 64])
def test_ranges_that_pass_the_row(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start with each end, in long rows and in short ones."""
    programs_hold(monkeypatch, block)
    starts, ends = [-3, -1, 0, 39, INT_MAX], [INT_MIN, -1, 0, 1, 39, 40, 43, INT_MAX]
    start, end = torch.cartesian_prod(int32(starts), int32(ends)).unbind(1)
    logits = torch.randint(0, 9, (len(start), 40)).float()
    result = topk_select(logits, 5, start, end)
    assert torch.equal(result, expected_rows(logits, 5, start, end))


def test_zeros_of_both_signs_tie() -> None:
    zeros = torch.tensor([[-0.0, 0.0, 1e-45, -0.0, -1e-45, 0.0], [0.0, -0.0, 0.0, -0.0, 1.0, -1.0]])
    end = int32([6, 6])
    for k in range(1, 6):
        assert torch.equal(topk_select(zeros, k, None, end), expected_rows(zeros, k, None, end))


@pytest.mark.parametrize("kind", ["random", "integers", "equal", "negative", "steps"])
@pytest.mark.parametrize(
    ("columns", "k"),
    [
        *((columns, INDEX_TOPK) for columns in (2049, 4103, 40_000)),
        *unless_interpreted([(2048, INDEX_TOPK), (32768, 64)], []),
    ],
)
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


def test_a_large_k() -> None:
    """More than a program can hold, of what it can hold and of more; the last two rows tie."""
    for columns, k in ((1 << 13, 5000), (1 << 14, 7000), (1 << 14, 10_000)):
        logits = torch.randn(3, columns)
        logits[1], logits[2, :9000] = 1.0, 7.0
        end = int32([columns] * 3)
        result = topk_select(logits, k, None, end)
        assert torch.equal(result, expected_rows(logits, k, None, end))


@pytest.mark.parametrize("k", [1, 64, 2048])
@pytest.mark.parametrize(
    "length",
    [
        *(edge + by for edge in (64, 128, 2048, 4096) for by in (-1, 0, 1)),
        *(1, 4100, 16384, 16385),
    ],
)
def test_lengths(length: int, k: int) -> None:
    """Around the powers of two: how many rows and keys a program takes changes there."""
    logits = torch.randn(3, length)
    end = int32([length, length - 1, 0])
    result = topk_select(logits, k, None, end)
    assert torch.equal(result, expected_rows(logits, k, None, end))


def test_more_rows_than_a_grid_axis_has() -> None:
    logits = torch.randint(0, 3, (66_001, 5)).float()
    end = torch.randint(0, 6, (66_001,))
    result = topk_select(logits, 3, None, end)
    assert torch.equal(result, expected_rows(logits, 3, None, end))


def test_outside_the_range_is_not_looked_at() -> None:
    logits = torch.full((3, 100), torch.nan)
    logits[:, 60:] = torch.inf
    logits[:, 10:50] = torch.randn(3, 40)
    start, end = int32([10] * 3), int32([50] * 3)
    for k in (5, 40, 60):
        result = topk_select(logits, k, start, end)
        assert torch.equal(result, expected_rows(logits, k, start, end))


@pytest.mark.parametrize("block", [16, 64, 1024])
def test_nan_scores(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the reference chooses, in range, and none of them twice."""
    programs_hold(monkeypatch, block)
    logits = torch.randn(5, 50)
    logits[1, 7:30], logits[2], logits[3, ::2] = torch.nan, torch.nan, -torch.nan
    logits[4].view(torch.int32)[:] = -1  # the NaN that is the least of all bit patterns
    end = int32([50, 20, 50, 50, 50])
    for k in (1, 8):
        result = topk_select(logits, k, None, end)
        assert torch.equal(result, reference.topk_select(logits, k, None, end))
        assert ((result >= 0) & (result < end[:, None])).all()
        assert (result.diff(dim=1) > 0).all()


def test_nans_of_any_sign_and_payload() -> None:
    """By sign and magnitude of their bits, as other floats, but that the two least tie.

    Arithmetic would make them one NaN.
    """
    nans = [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE, 0x7F800001, 0xFF800001]
    others = [0x7F800000, 0xFF800000, 0x00000000, 0x80000000, 0x3F800000, 0xBF800000]
    bits = torch.tensor(2 * [*nans, *others])[torch.stack([torch.randperm(26) for _ in range(8)])]
    logits = (bits - (bits >> 31 << 32)).int().view(torch.float32)
    magnitude = bits & 0x7FFFFFFF
    order = torch.where(bits >> 31 == 1, -magnitude, magnitude).clamp(min=-0x7FFFFFFE).double()
    start, end = int32([0, 3] * 4), int32([26, 24] * 4)
    for k in range(1, 27):
        result = topk_select(logits, k, start, end)
        assert torch.equal(result, expected_rows(order, k, start, end))


def test_the_least_nan_is_the_last_choice() -> None:
    logits = torch.tensor([[-1, -1, 0, -1]], dtype=torch.int32).view(torch.float32)
    for k, expected in ((1, [2]), (2, [0, 2]), (4, [0, 1, 2, 3])):
        assert topk_select(logits, k, None, int32([4])).tolist() == [expected]


@pytest.mark.parametrize("columns", [700, 300])
def test_a_row_does_not_depend_on_its_batch(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    programs_hold(monkeypatch, 512)
    rows = unless_interpreted(40, 9)
    logits = torch.randint(0, 50, (rows, columns)).float()
    end = int32(torch.randint(0, columns + 1, (rows,)))
    result = topk_select(logits, 64, None, end)
    alone = [
        topk_select(logits[row : row + 1], 64, None, end[row : row + 1]) for row in range(rows)
    ]
    assert torch.equal(result, torch.cat(alone))


def test_strided_inputs_and_out() -> None:
    logits = torch.randn(300, 12).T[:, 50:250]
    start, end = torch.randint(0, 201, (12, 2)).sort().values.unbind(1)
    wide = torch.full((12, 100), INT_MAX, dtype=torch.int32)
    out = wide[:, 10:90:2]
    result = topk_select(logits, 40, start, end, out=out)
    assert torch.equal(out, expected_rows(logits, 40, start, end))
    assert result.data_ptr() == out.data_ptr()
    assert int((wide == INT_MAX).sum()) == 12 * (100 - 40)


def test_no_columns() -> None:
    result = topk_select(torch.randn(3, 0), 4, None, int32([0] * 3))
    assert torch.equal(result, torch.full((3, 4), -1, dtype=torch.int32))


@pytest.mark.parametrize("block_size", [1, 16, 48, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots(block_size: int, dtype: torch.dtype) -> None:
    lengths = [1, 63, 64, 65, 127, 700]
    table = make_block_table(lengths, block_size, 2000, shared=1).to(dtype)
    table = table.repeat(1, 2)[:, : table.shape[1]]  # not contiguous
    requests = torch.randint(0, 6, (50,))
    indices = torch.stack([torch.randint(-1, lengths[request], (33,)) for request in requests])
    slots = topk_slots(indices.to(dtype), table, requests.to(dtype), block_size)
    block = table[requests[:, None], indices.clamp(min=0) // block_size].long()
    expected = (block * block_size + indices % block_size).masked_fill(indices < 0, -1)
    assert torch.equal(slots, expected)


@pytest.mark.parametrize(("dtype", "far"), [(torch.int32, INT_MAX), (torch.int64, 2**63 - 1)])
def test_slots_of_hostile_indices(dtype: torch.dtype, far: int) -> None:
    """No input is contiguous."""
    table = torch.tensor([[3, 1, 9], [5, -1, 9]], dtype=torch.int32)[:, :2]
    indices = torch.tensor([0, 7, 8, 15, 16, -1, -far - 1, far], dtype=dtype)
    slots = topk_slots(indices[:, None].repeat(1, 2).T, table, int32([0, 0, 1, 0])[::2], 8)
    assert slots.tolist() == [[24, 31, 8, 15, -1, -1, -1, -1], [40, 47, -1, -1, -1, -1, -1, -1]]


def test_slots_of_many_and_wide_rows() -> None:
    table = torch.randperm(30).view(3, 10).int()
    for rows, k in unless_interpreted(
        [(70_001, 3), (2, 5000), (3000, 512)], [(70_001, 3), (2, 5000)]
    ):
        indices, requests = int32(torch.randint(-1, 640, (rows, k))), torch.randint(0, 3, (rows,))
        slots = topk_slots(indices, table, requests, 64)
        expected = table[requests[:, None], indices.clamp(min=0) // 64].long() * 64 + indices % 64
        assert torch.equal(slots, expected.masked_fill(indices < 0, -1))


@pytest.mark.parametrize("block", [16, 64, 1024])
def test_slots_in_the_same_pass(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to `topk_slots`, past the block table too, of long rows and of short ones."""
    programs_hold(monkeypatch, block)
    logits = torch.randint(0, 9, (7, 90)).float()
    end = int32([90, 1, 0, 64, INT_MIN, INT_MAX, 65])
    table = torch.randperm(40).view(4, 10).int()[:, ::2]  # 5 blocks of 16: ten columns have none
    table[2, 1] = -1
    requests = int32([0, 1, 1, 2, 3, 3, 0])
    wide = torch.full((7, 30), 99)
    indices, slots = topk_select_slots(logits, 8, end, table, requests, 16, slots=wide[:, 5:13])
    assert torch.equal(indices, expected_rows(logits, 8, None, end))
    assert torch.equal(slots, reference.topk_slots(indices, table, requests, 16))
    assert slots.data_ptr() == wide[:, 5:13].data_ptr()
    assert wide[:, :5].eq(99).all()
    assert wide[:, 13:].eq(99).all()
