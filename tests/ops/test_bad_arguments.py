"""What the ops refuse: their arguments are checked before a form is chosen, so once for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dsa_kernels.indexer_logits.api
import dsa_kernels.sparse_mla.api
import dsa_kernels.topk_select.api
from dsa_kernels.indexer_logits import gather_index_keys, indexer_logits, indexer_logits_paged
from dsa_kernels.sparse_mla import masked_mha, sparse_mla
from dsa_kernels.topk_select import topk_select, topk_select_slots, topk_slots
from dsa_testbed.index_keys import FP8
from dsa_testbed.latents import SCALE

APIS = [dsa_kernels.indexer_logits.api, dsa_kernels.sparse_mla.api, dsa_kernels.topk_select.api]


@pytest.fixture(autouse=True)
def no_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that got as far as asking for its form refused nothing."""

    def asked(_device: torch.device) -> bool:
        raise AssertionError("a form is chosen before the arguments are checked")

    for api in APIS:
        monkeypatch.setattr(api, "use_triton", asked)


def int32(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.randn(2, 4, 512), r"q: shape \(2, 4, 512\).*\[T, heads, 576\]"),
        ("q", torch.randn(2, 4, 576).double(), "q: dtype torch.float64"),
        (
            "q",
            torch.randn(2, 4, 576).half(),
            "cache: dtype torch.float32 with torch.float16 queries",
        ),
        ("cache", torch.zeros(1, 16, 656), r"latent cache: shape.*block_size, 576\]"),
        ("slots", torch.zeros(3, 5).long(), r"slots: shape \(3, 5\).*\[2, k\]"),
        ("slots", torch.zeros(2, 5), "slots: dtype torch.float32.*use int32, int64"),
        ("topk_length", torch.zeros(3).int(), r"topk_length: shape \(3,\); it must be \[2\]"),
        ("topk_length", torch.zeros(2), "topk_length: dtype torch.float32.*use int32, int64"),
        ("out", torch.zeros(2, 4, 576), r"out: shape \(2, 4, 576\).*\[2, 4, 512\]"),
        ("lse", torch.zeros(2, 4).bfloat16(), "lse: dtype torch.bfloat16.*use float32"),
    ],
)
def test_sparse_mla(name: str, value: Tensor, message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 4, 576),
        "cache": torch.zeros(1, 16, 576),
        "slots": torch.zeros(2, 5, dtype=torch.int64),
        "softmax_scale": SCALE,
    }
    with pytest.raises(ValueError, match=message):
        sparse_mla(**{**arguments, name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(4, 9, 100)}, r"k: shape \(4, 9, 100\).*\[4, N, 192\]"),
        ({"v": torch.zeros(4, 8, 128)}, r"v: shape \(4, 8, 128\).*\[4, 9, DV\]"),
        ({"v": torch.zeros(4, 9, 256)}, "v: 256 values a head; at most q's and k's 192"),
        ({"topk_indices": torch.zeros(3, 2)}, "topk_indices: dtype torch.float32"),
        ({"k": torch.zeros(4, 9, 192).half()}, "k: dtype torch.float16"),
    ],
)
def test_masked_mha(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(3, 4, 192),
        "k": torch.zeros(4, 9, 192),
        "v": torch.zeros(4, 9, 128),
        "topk_indices": torch.zeros(3, 2, dtype=torch.int32),
        "softmax_scale": SCALE,
    }
    with pytest.raises(ValueError, match=message):
        masked_mha(**(arguments | changes))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.randn(2, 5).bfloat16(), "logits: dtype torch.bfloat16.*use float32"),
        ("logits", torch.randn(5), r"logits: shape \(5,\).*\[M, N\]"),
        ("k", 0, "k: 0; at least one"),
        ("row_start", torch.zeros(3).int(), r"row_start: shape \(3,\).*\[2\]"),
        ("row_end", torch.zeros(2), "row_end: dtype torch.float32.*use int32, int64"),
        ("out", torch.zeros(2, 3).long(), "out: dtype torch.int64.*use int32"),
        ("out", torch.zeros(2, 4).int(), r"out: shape \(2, 4\).*\[2, 3\]"),
    ],
)
def test_topk_select(name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.randn(2, 5),
        "k": 3,
        "row_start": None,
        "row_end": int32([5, 5]),
    }
    with pytest.raises(ValueError, match=message):
        topk_select(**arguments | {name: value})


def test_topk_slots() -> None:
    indices, table, requests = int32([[0]]), int32([[0]]), int32([0])
    with pytest.raises(ValueError, match="block_size: 0; it must be at least 1"):
        topk_slots(indices, table, requests, 0)
    with pytest.raises(ValueError, match=r"request_ids: shape \(2,\).*\[1\]"):
        topk_slots(indices, table, int32([0, 0]), 64)
    with pytest.raises(ValueError, match=r"block_table: shape \(1,\).*num_requests, max_blocks"):
        topk_slots(indices, table[0], requests, 64)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("slots", torch.zeros(3, 50).int(), "slots: dtype torch.int32.*use int64"),
        ("slots", torch.zeros(3, 49).long(), r"slots: shape \(3, 49\).*\[3, 50\]"),
        ("request_ids", int32([0]), r"request_ids: shape \(1,\).*\[3\]"),
        ("k", 0, "k: 0; at least one"),
    ],
)
def test_topk_select_slots(name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.randn(3, 100),
        "k": 50,
        "row_end": int32([100, 40, 0]),
        "block_table": torch.randperm(21).view(3, 7).int(),
        "request_ids": int32([2, 0, 1]),
        "block_size": 16,
    }
    with pytest.raises(ValueError, match=message):
        topk_select_slots(**arguments | {name: value})


def _prefill_arguments() -> dict[str, Any]:
    return {
        "q": torch.randn(2, 8, 128),
        "weights": torch.randn(2, 8),
        "k": torch.randn(5, 128),
        "row_start": torch.zeros(2, dtype=torch.int32),
        "row_end": torch.ones(2, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.randn(2, 8, 64), r"q: shape \(2, 8, 64\).*\[M, heads, 128\]"),
        ("q", torch.randn(2, 8, 128).double(), "q: dtype torch.float64"),
        ("weights", torch.randn(2, 8).bfloat16(), "weights: dtype torch.bfloat16.*use float32"),
        ("k", torch.randn(5, 128).bfloat16(), "k: dtype torch.bfloat16.*use float32"),
        ("row_end", torch.ones(3).int(), r"row_end: shape \(3,\).*\[2\]"),
        ("k_scale", torch.ones(5), "k_scale: given with torch.float32 keys"),
        ("out", torch.ones(2, 6), r"out: shape \(2, 6\).*\[2, 5\]"),
        ("k", torch.randn(5, 128, device="meta"), "k is on meta but q is on cpu"),
    ],
)
def test_indexer_logits(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        indexer_logits(**_prefill_arguments() | {name: value})


def test_fp8_keys_need_scales() -> None:
    arguments = _prefill_arguments()
    arguments |= {"q": arguments["q"].to(FP8), "k": arguments["k"].to(FP8)}
    with pytest.raises(ValueError, match=r"k_scale: absent with torch.float8_e4m3fn keys"):
        indexer_logits(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.randn(2, 1, 8, 128).to(FP8), "q: dtype torch.float8_e4m3fn.*use float32"),
        ("max_context_len", 33, "max_context_len: 33; the block table has room for 32 keys"),
        ("block_table", torch.zeros(3, 2).int(), r"block_table: shape \(3, 2\).*\[2, max_blocks\]"),
        ("context_lens", torch.zeros(2).int(), r"context_lens: shape \(2,\).*\[2, 1\]"),
        ("cache", torch.zeros(2, 16, 64), r"index cache: shape.*block_size, 128\]"),
    ],
)
def test_indexer_logits_paged(name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 1, 8, 128),
        "weights": torch.randn(2, 1, 8),
        "cache": torch.zeros(2, 16, 128),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "context_lens": torch.ones(2, 1, dtype=torch.int32),
        "max_context_len": 20,
    }
    with pytest.raises(ValueError, match=message):
        indexer_logits_paged(**arguments | {name: value})
    with pytest.raises(ValueError, match=r"num_keys: 33; the block table row has room for 32 keys"):
        gather_index_keys(arguments["cache"], torch.zeros(2, dtype=torch.int32), 33)
