"""Every op in a CUDA graph: replayed, it sees what a host has written into its tensors since.

A decode step's tensors keep their place and shape, and the next batch is written into them. An op
that read a value when it was captured, or kept a copy, would answer for the batch of then.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsa_kernels.cache_write import (
    Norm,
    Rope,
    apply_rope,
    index_cache_write,
    index_query,
    latent_cache_write,
    one_launch,
)
from dsa_kernels.indexer_logits import indexer_logits_paged
from dsa_kernels.invariants import LayerMemory, Rows, Used, check_rows, keep_first, mark_rows
from dsa_kernels.sparse_mla import sparse_mla
from dsa_kernels.testing import make_cos_sin_cache
from dsa_kernels.topk_select import topk_select, topk_select_slots, topk_slots
from dsa_testbed.kernel_runs import captured
from dsa_testbed.latents import SCALE

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "kernels_run")]

REQUESTS, HEADS, BLOCK, BLOCKS, TOPK, LONGEST = 3, 16, 64, 9, 32, 128
Batch = dict[str, Tensor]


def batch() -> Batch:
    """What one decode step of three requests may read."""
    slots = torch.randperm(BLOCKS * BLOCK)
    return {
        "q": torch.randn(REQUESTS, HEADS, 576).bfloat16(),
        "index_q": torch.randn(REQUESTS, HEADS, 128).bfloat16(),
        "weights": torch.randn(REQUESTS, HEADS),
        "kv": torch.randn(REQUESTS, 576).bfloat16(),
        "k": torch.randn(REQUESTS, 128).bfloat16(),
        "latents": torch.randn(BLOCKS, BLOCK, 576).bfloat16(),
        "keys": torch.randn(BLOCKS, BLOCK, 128).bfloat16(),
        "positions": torch.randint(0, LONGEST, (REQUESTS,)),
        "slot_mapping": slots[:REQUESTS],
        "context_lens": torch.randint(1, LONGEST, (REQUESTS,), dtype=torch.int32),
        "block_table": torch.randperm(BLOCKS)[: 2 * REQUESTS].view(REQUESTS, 2).int(),
        "request_ids": torch.randperm(REQUESTS).int(),
        "logits": torch.randn(REQUESTS, LONGEST),
        "topk_indices": torch.randint(-1, LONGEST, (REQUESTS, TOPK), dtype=torch.int32),
        "slots": slots[: REQUESTS * TOPK].view(REQUESTS, TOPK),
        "written": torch.randint(-1, LONGEST, (BLOCKS + 1, BLOCK), dtype=torch.int32),
        "first": torch.zeros(8, dtype=torch.int64),
        "number": torch.randint(1, 1000, (1,)),
        "cos_sin": make_cos_sin_cache(LONGEST),
    }


def write_latents(b: Batch) -> Tensor:
    norm, rope, cache = Norm(torch.ones(512), 1e-6), Rope(b["cos_sin"], True), b["latents"]
    latent_cache_write(b["kv"], norm, rope, b["positions"], cache, b["slot_mapping"])
    return cache


def write_keys(b: Batch) -> Tensor:
    norm, rope = Norm(torch.ones(128), 1e-6, torch.zeros(128)), Rope(b["cos_sin"], False)
    cache, slots = b["keys"], b["slot_mapping"]
    index_cache_write(b["k"], norm, rope, b["positions"], cache, slots, hadamard=True)
    return cache


def make_query(b: Batch) -> tuple[Tensor, Tensor]:
    rope = Rope(b["cos_sin"], False)
    q, weights = index_query(b["index_q"], b["weights"], rope, b["positions"], fp8=True)
    return q.view(torch.uint8), weights


def rotate(b: Batch) -> Tensor:
    return apply_rope(b["q"][..., 512:], Rope(b["cos_sin"], True), b["positions"])


def write_all(b: Batch) -> tuple[Tensor, ...]:
    with one_launch():
        latents, keys, (q, weights) = write_latents(b), write_keys(b), make_query(b)
        rotated = rotate(b)
    return latents, keys, q, weights, rotated


def score(b: Batch) -> Tensor:
    q, weights, lens = b["index_q"][:, None], b["weights"][:, None], b["context_lens"][:, None]
    return indexer_logits_paged(q, weights, b["keys"], b["block_table"], lens, LONGEST)


def select(b: Batch) -> Tensor:
    return topk_select(b["logits"], TOPK, None, b["context_lens"])


def select_slots(b: Batch) -> tuple[Tensor, Tensor]:
    table, requests = b["block_table"], b["request_ids"]
    return topk_select_slots(b["logits"], TOPK, b["context_lens"], table, requests, BLOCK)


def look_up_slots(b: Batch) -> Tensor:
    return topk_slots(b["topk_indices"], b["block_table"], b["request_ids"], BLOCK)


def attend(b: Batch) -> tuple[Tensor, Tensor]:
    """Few rows, so in parts that are merged."""
    length = b["context_lens"]
    return sparse_mla(b["q"], b["latents"], b["slots"], SCALE, topk_length=length)


def check(b: Batch) -> tuple[Tensor, Tensor]:
    requests, positions, lens = b["request_ids"], b["positions"], b["context_lens"]
    rows = Rows(requests, positions, lens, b["slot_mapping"], b["block_table"], BLOCK, BLOCKS)
    memory = LayerMemory(b["latents"], b["keys"], b["written"], ours_alone=True)
    used = Used(
        slice(0, REQUESTS), b["topk_indices"], b["slots"], True, (b["index_q"], b["weights"])
    )
    findings = mark_rows(rows, memory)
    check_rows(rows, memory, used, findings)
    keep_first(rows, findings, b["q"], b["number"], b["number"], b["first"])
    return findings[:-1], b["first"]


OPS = [
    check,
    write_latents,
    write_keys,
    make_query,
    rotate,
    write_all,
    score,
    select,
    select_slots,
    look_up_slots,
    attend,
]


@pytest.mark.parametrize("op", OPS)
def test_a_replay_sees_the_new_batch(
    op: Callable[[Batch], Tensor | tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, new = batch(), batch()
    result, replay = captured(monkeypatch, lambda: op(held))
    results = result if isinstance(result, tuple) else (result,)
    before = [tensor.clone() for tensor in results]
    for name, tensor in held.items():
        tensor.copy_(new[name])
    replay()
    expected = op(new)
    for was, now, wanted in zip(
        before, results, expected if isinstance(expected, tuple) else (expected,), strict=True
    ):
        assert torch.equal(now, wanted)
        assert not torch.equal(was, wanted)
