"""What only topk_select's kernels have: samples, parts, offsets; test_topk_select.py the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsa_kernels.arch import ARCHS
from dsa_kernels.launch import launch_config
from dsa_kernels.topk_select import (
    device,
    kernel,
    reference,
    topk_select,
    topk_select_slots,
    topk_slots,
)
from dsa_testbed.far_apart import far_apart
from dsa_testbed.kernel_runs import DEVICE, captured
from dsa_testbed.topk import INT_MAX, expected_rows, int32, programs_hold, sampled

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]


def test_a_million_columns(kernels_run: list[str]) -> None:
    logits = torch.randint(-9000, 9000, (1, 1 << 20)).float()
    best = logits[0].sort(descending=True, stable=True).indices[:2048]
    result = topk_select(logits, 2048, None, int32([1 << 20]))
    assert torch.equal(result[0].long(), best.sort().values)
    assert kernels_run == ["_sift", "_finish"]


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


def hostile(columns: int, sample: int) -> dict[str, torch.Tensor]:
    """Rows of which a sample says the wrong thing, or whose scores leave little to say."""
    random, column = torch.randn(columns), torch.arange(columns)
    met = torch.zeros(columns, dtype=torch.bool)
    met[sampled(columns, sample)] = True
    nans = torch.where(torch.rand(columns) < 0.6, torch.nan, random)
    return {
        "random": random,
        "sample too low": random - 100 * met,
        "sample too high": random + 100 * met,
        "sample of one value": torch.where(met, 0.0, random),
        "equal": torch.full((columns,), -2.0),
        "two values": (torch.rand(columns) < 0.3).float(),
        "few above the rest": (torch.rand(columns) < 0.01).float(),
        "ascending": column.float(),
        "descending": -column.float(),
        "periodic": (column % (columns // sample)).float(),
        "best together": random + 50 * (column > columns - 40),
        "huge ones": torch.where(torch.rand(columns) < 0.01, 1e38, random),
        "nan": torch.where(torch.rand(columns) < 0.5, nans, -nans),
        "-inf": torch.where(torch.rand(columns) < 0.98, -torch.inf, random),
    }


@pytest.mark.parametrize("parts", [False, True], ids=["whole rows", "parts"])
@pytest.mark.parametrize("k", [1, 15, 100])
def test_hostile_rows(
    k: int, parts: bool, monkeypatch: pytest.MonkeyPatch, kernels_run: list[str]
) -> None:
    """A program holds 32 keys, and never more: the largest k is found without any candidates."""
    programs_hold(monkeypatch, 32, tile=64, parts=parts)
    monkeypatch.setattr(kernel, "_MOST_ROOM", 32)
    rows = hostile(330, 32)
    logits = torch.stack(list(rows.values()))
    end = int32([330] * len(rows))
    assert wrong(rows, topk_select(logits, k, None, end), logits, k, None, end) == []
    start = int32(torch.randint(-5, 150, (len(rows),)))
    end = start + int32(torch.randint(-5, 180, (len(rows),)))
    end[:4] = start[:4] + int32([0, 1, 32, 33])
    assert wrong(rows, topk_select(logits, k, start, end), logits, k, start, end) == []
    assert set(kernels_run) == ({"_sift", "_finish"} if parts else {"_finish"})


def wrong(
    rows: dict[str, torch.Tensor], result: torch.Tensor, logits: torch.Tensor, *rest: Any
) -> list[str]:
    equal = result == reference.topk_select(logits, *rest)
    return [name for name, right in zip(rows, equal.all(1).tolist(), strict=True) if not right]


@pytest.mark.parametrize("parts", [False, True], ids=["whole rows", "parts"])
def test_a_pass_counts_what_the_scores_reach(parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pivots of each sign, of both zeros, and of NaNs: k moves the pivot along the scores."""
    programs_hold(monkeypatch, 16, tile=32, parts=parts)
    bits = [0x7FC00000, 0xFFC00000, 0xFFFFFFFF, 0xFFFFFFFE, 0x7F800000, 0xFF800000]
    bits += [0x80000000, 0, 1, 0x80000001, 0x3F800000, 0xBF800000, 0x7FFFFFFF, 0xFF800001]
    scores = torch.tensor([bit - (bit >> 31 << 32) for bit in bits]).int()
    logits = scores[torch.randint(0, len(bits), (6, 130))].view(torch.float32)
    end = int32([130, 129, 120, 33, 17, 16])
    for k in (1, 3, 4, 6, 8, 40):
        expected = reference.topk_select(logits, k, None, end)
        assert torch.equal(topk_select(logits, k, None, end), expected)


@pytest.mark.parametrize(
    ("scores", "most"),
    [
        (lambda: torch.randn(8192), 8),
        (lambda: (torch.randn(8192, 64).relu() * torch.randn(64)).sum(1), 8),
        (lambda: 10 ** (40 * torch.rand(8192) - 20), 15),
        (lambda: torch.randint(0, 200, (8192,)).float(), 17),
    ],
    ids=["normal", "sums of weighted ReLUs", "40 powers of ten", "200 values"],
)
def test_a_search_takes_few_steps(
    scores: Callable[[], torch.Tensor], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the best 2,048: a step looks at both bounds. The worst that scores could do is 64."""
    if DEVICE.type != "cpu":
        pytest.skip("a GPU's steps are not seen")
    looks, score = [], device._score

    def noted(key: Any) -> Any:
        looks.append(key)
        return score(key)

    monkeypatch.setattr(device, "_score", noted)
    logits = torch.stack([scores() for _ in range(8)])
    topk_select(logits, 2048, None, int32([8192] * 8))
    assert len(looks) <= most * 2 * len(logits)


def test_nothing_is_kept_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of one call, on other scores and other ranges."""
    programs_hold(monkeypatch, 64)
    logits, end = torch.randn(4, 700), int32([700, 650, 300, 64])
    result, replay = captured(monkeypatch, lambda: topk_select(logits, 30, None, end))
    for _ in range(2):
        assert torch.equal(result, expected_rows(logits, 30, None, end))
        logits.copy_(torch.randint(0, 40, (4, 700)))
        end.copy_(int32([20, 700, 0, 690]))
        replay()


@pytest.mark.parametrize("name", ARCHS)
def test_counts_fit_their_half_of_an_int32(name: str, kernels_run: list[str]) -> None:
    kernels_run.append("none: a table")
    sizes = [kernel._MOST_ROOM]
    for key in ("select", "sift", "finish"):
        sizes += launch_config("topk_select", ARCHS[name], key).blocks.values()
    assert max(sizes) <= 1 << 14


@pytest.mark.parametrize("name", ARCHS)
def test_both_launches_have_the_same_room(name: str, kernels_run: list[str]) -> None:
    kernels_run.append("none: a table")
    sift, finish = (
        launch_config("topk_select", ARCHS[name], key).blocks for key in ("sift", "finish")
    )
    assert sift == finish


def test_slots_take_no_launch_of_their_own(
    kernels_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, end = torch.randperm(21).view(3, 7).int(), int32([100, 40, 0])
    topk_select_slots(torch.randn(3, 100), 50, end, table, int32([2, 0, 1]), 16)
    programs_hold(monkeypatch, 32)
    topk_select_slots(torch.randn(3, 100), 8, end, table, int32([2, 0, 1]), 16)
    assert kernels_run == ["_select", "_sift", "_finish"]
