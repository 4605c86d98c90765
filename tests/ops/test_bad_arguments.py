"""What the ops refuse: their arguments are checked before a form is chosen, so once for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dsa_kernels.cache_write.api
import dsa_kernels.indexer_logits.api
import dsa_kernels.invariants.api
import dsa_kernels.sparse_mla.api
import dsa_kernels.topk_select.api
from dsa_kernels.cache_write import (
    Norm,
    Rope,
    apply_rope,
    index_cache_write,
    index_query,
    latent_cache_write,
)
from dsa_kernels.indexer_logits import gather_index_keys, indexer_logits, indexer_logits_paged
from dsa_kernels.invariants import LayerMemory, Rows, Used, check_rows, keep_first, mark_rows
from dsa_kernels.sparse_mla import masked_mha, sparse_mla
from dsa_kernels.testing import make_latent_cache
from dsa_kernels.topk_select import topk_select, topk_select_slots, topk_slots
from dsa_testbed.cache_entries import EPS, make_rope
from dsa_testbed.index_keys import FP8
from dsa_testbed.latents import SCALE

APIS = [
    dsa_kernels.cache_write.api,
    dsa_kernels.indexer_logits.api,
    dsa_kernels.invariants.api,
    dsa_kernels.sparse_mla.api,
    dsa_kernels.topk_select.api,
]


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
        ("kv", torch.randn(2, 512), r"kv: shape \(2, 512\).*\[T, 576\]"),
        ("kv", torch.randn(2, 576).double(), "kv: dtype torch.float64.*use float32, bfloat16"),
        ("norm", Norm(torch.ones(576), EPS), r"norm.weight: shape \(576,\).*\[512\]"),
        (
            "norm",
            Norm(torch.ones(512, device="meta"), EPS),
            "norm.weight is on meta but kv is on cpu",
        ),
        (
            "norm",
            Norm(torch.ones(512), EPS, torch.zeros(512)),
            "norm: has a bias; latents take RMSNorm.*leave it None",
        ),
        ("rope", make_rope(4, interleaved=False), "rope: interleaved is False.*interleaved=True"),
        ("positions", torch.arange(3), r"positions: shape \(3,\).*\[2\]"),
        ("positions", torch.ones(2), "positions: dtype torch.float32.*use int32, int64"),
        ("rope", Rope(torch.ones(4, 32), True), r"cos_sin_cache: shape.*\[max_position, 64\]"),
        (
            "rope",
            Rope(torch.ones(4, 64, device="meta"), True),
            "rope.cos_sin_cache is on meta but kv is on cpu",
        ),
        ("cache", torch.ones(1, 4, 512), r"latent cache: shape.*num_blocks, block_size, 576"),
        ("cache", torch.ones(1, 4, 576).byte(), r"latent cache: shape.*block_size, 656\]"),
        (
            "cache",
            torch.ones(1, 4, 576).int(),
            "latent cache: dtype torch.int32.*uint8 for the fp8",
        ),
        ("cache", torch.ones(0, 4, 576), r"no slots; allocate at least one block"),
        ("cache", torch.ones(1, 4, 1152)[..., ::2], "2 elements apart; the last stride must be 1"),
        (
            "cache",
            torch.zeros(4 * 656 + 1, dtype=torch.uint8)[1:].view(1, 4, 656),
            "offset 1 in bytes.*multiple of 4",
        ),
        ("slot_mapping", torch.arange(3), r"slot_mapping: shape \(3,\).*\[2\]"),
        (
            "slot_mapping",
            torch.arange(2, device="meta"),
            "slot_mapping is on meta but kv is on cpu",
        ),
    ],
)
def test_latent_cache_write(name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {
        "kv": torch.randn(2, 576),
        "norm": Norm(torch.ones(512), EPS),
        "rope": make_rope(4, interleaved=True),
        "positions": torch.arange(2),
        "cache": make_latent_cache(torch.float32, 1, 4),
        "slot_mapping": torch.arange(2),
    }
    with pytest.raises(ValueError, match=message):
        latent_cache_write(**arguments | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"140 bytes apart.*token stride must be 132"),
        (
            {"norm": Norm(torch.ones(128), EPS)},
            "norm: has no bias; index keys take LayerNorm",
        ),
        (
            {"norm": Norm(torch.ones(128), EPS, torch.zeros(64))},
            r"norm.bias: shape \(64,\).*\[128\]",
        ),
    ],
)
def test_index_cache_write(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "k": torch.randn(2, 128),
        "norm": Norm(torch.ones(128), EPS, torch.zeros(128)),
        "rope": make_rope(4, interleaved=True),
        "positions": torch.arange(2),
        "cache": torch.zeros(2, 4, 140, dtype=torch.uint8)[..., :132],
        "slot_mapping": torch.arange(2),
    }
    with pytest.raises(ValueError, match=message):
        index_cache_write(**arguments | changes)


def test_index_query_and_apply_rope() -> None:
    rope, positions = make_rope(4, interleaved=True), torch.arange(2)
    with pytest.raises(ValueError, match=r"weights: shape \(2, 3\).*\[2, 4\]"):
        index_query(torch.randn(2, 4, 128), torch.randn(2, 3), rope, positions)
    with pytest.raises(ValueError, match=r"x: shape \(2, 32\).*\[T, \.\.\., 64\]"):
        apply_rope(torch.randn(2, 32), rope, positions)


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


@pytest.mark.parametrize(
    ("of", "name", "value", "message"),
    [
        ("rows", "lens", int32([1]), r"lens: shape \(1,\); it must be \[2\]"),
        ("rows", "positions", torch.zeros(2), "positions: dtype torch.float32"),
        ("rows", "num_blocks", 9, "cache: 8 blocks of 16 tokens; the rows are of 9 blocks of 16"),
        ("memory", "latent_cache", torch.zeros(8, 16, 512), r"latent cache: shape \(8, 16, 512\)"),
        ("memory", "key_cache", torch.zeros(8, 8, 128), "cache: 8 blocks of 8 tokens"),
        ("memory", "written", torch.zeros(9, 16), "written: dtype torch.float32"),
        ("memory", "written", int32([[0] * 9] * 16).T, "written: strides .* dense"),
        ("used", "rows", slice(1, 3), "rows: slice.* of 2"),
        ("used", "topk_indices", torch.zeros(2, 4), "topk_indices: dtype torch.float32"),
        ("used", "slots", torch.zeros(1, 4).long(), r"slots: shape \(1, 4\).*\[2, 4\]"),
        ("used", "query", (torch.zeros(2, 3, 64),) * 2, "weights|query: shape"),
        ("record", "out", torch.zeros(2, 3), "out: shape"),
        ("record", "first", torch.zeros(8), "first: dtype torch.float32"),
        ("record", "number", torch.zeros(2).long(), r"number: shape \(2,\)"),
    ],
)
def test_invariants(of: str, name: str, value: Any, message: str) -> None:
    findings = torch.zeros(3, 4, dtype=torch.int64)
    ids, one = int32([0, 0]), torch.zeros(1).long()
    given: dict[str, dict[str, Any]] = {
        "rows": {
            **dict.fromkeys(("requests", "positions", "lens", "slots"), ids),
            "block_table": int32([[1]]),
            "block_size": 16,
            "num_blocks": 8,
        },
        "memory": {
            "latent_cache": torch.zeros(8, 16, 576),
            "key_cache": torch.zeros(8, 16, 128),
            "written": int32([[0] * 16] * 9),
            "ours_alone": True,
        },
        "used": {
            "rows": slice(0, 2),
            "topk_indices": int32([[0] * 4] * 2),
            "slots": None,
            "selected": True,
            "query": None,
        },
        "record": {
            "out": torch.zeros(2, 3, 4),
            "layer": one,
            "number": one,
            "first": torch.zeros(8).long(),
        },
    }
    given[of][name] = value
    rows, memory = Rows(**given["rows"]), LayerMemory(**given["memory"])
    used = Used(**given["used"])
    calls: dict[str, Callable[[], Any]] = {
        "rows": lambda: mark_rows(rows, memory),
        "memory": lambda: mark_rows(rows, memory),
        "used": lambda: check_rows(rows, memory, used, findings),
        "record": lambda: keep_first(rows, findings, **given["record"]),
    }
    with pytest.raises(ValueError, match=message):
        calls[of]()
