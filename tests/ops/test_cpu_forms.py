"""What only the forms for a CPU have: tiles, which bound their memory and change no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_kernels import workspace
from dsa_kernels.indexer_logits import cpu as indexer_cpu
from dsa_kernels.indexer_logits import indexer_logits, indexer_logits_paged
from dsa_kernels.sparse_mla import cpu as sparse_cpu
from dsa_kernels.testing import make_block_table, make_index_cache, make_slots
from dsa_kernels.topk_select import topk_select
from dsa_testbed.index_keys import assert_within, bound, fill, inputs, mask, truth
from dsa_testbed.latents import SCALE, filled_cache, random_slots

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows, a tile's buffers stay within the budget."""
    largest = 0
    create = workspace.scratch

    def measured(*args: Any) -> Tensor:
        nonlocal largest
        tensor = create(*args)
        largest = max(largest, tensor.nbytes)
        return tensor

    monkeypatch.setattr(sparse_cpu, "scratch", measured)
    used = torch.arange(640)
    cache, _ = filled_cache(torch.bfloat16, 10, 64, used)
    q = torch.randn(200, 4, 576).bfloat16()
    out, lse = torch.empty(200, 4, 512).bfloat16(), torch.empty(200, 4)
    sparse_cpu.sparse_mla(q, cache, random_slots(200, 300, used), None, SCALE, out, lse)
    assert 1 << 20 < largest <= workspace.TILE_BYTES


def test_buffers_of_inference_mode_serve_outside_of_it() -> None:
    scores, lens = torch.randn(2, 300), torch.tensor([300, 200], dtype=torch.int32)
    starts = torch.zeros_like(lens)
    workspace.release()
    with torch.inference_mode():
        expected = topk_select(scores, 64, starts, lens).clone()
    assert torch.equal(topk_select(scores, 64, starts, lens), expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_indexer_tiling_changes_nothing(data: st.DataObject) -> None:
    """Whatever the tile, each row gets what it gets alone."""
    rows, keys = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 150))
    q, weights, k = inputs(rows, 8, keys, torch.float32)
    start = torch.tensor([data.draw(st.integers(0, keys)) for _ in range(rows)])
    end = torch.tensor([data.draw(st.integers(0, keys)) for _ in range(rows)])
    with pytest.MonkeyPatch.context() as patch:
        queries = data.draw(st.sampled_from([8, 24, 80]))
        patch.setattr(indexer_cpu, "_TILE_QUERIES", queries)
        patch.setattr(indexer_cpu, "_TILE_ELEMENTS", queries * data.draw(st.integers(1, 70)))
        result = indexer_logits(q, weights, k, start, end)
    assert_within(result, mask(truth(q, weights, k), start, end), bound(q, weights, k, form="cpu"))


@pytest.mark.parametrize("next_n", [1, 5])
@pytest.mark.parametrize("keys_a_tile", [1, 48, 50])
def test_paged_indexer_tiling_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, next_n: int, keys_a_tile: int
) -> None:
    monkeypatch.setattr(indexer_cpu, "_TILE_QUERIES", 16)
    monkeypatch.setattr(indexer_cpu, "_TILE_ELEMENTS", 16 * keys_a_tile)
    cache, length = make_index_cache(torch.float32, 40, 16), 205
    table = make_block_table([length] * 3, 16, 40, shared=2)
    k = torch.randn(3, length, 128)
    k[:, :32] = k[:1, :32]
    for row in range(3):
        fill(cache, make_slots(table[row], torch.arange(length), 16), k[row], None)
    q, weights = torch.randn(3, next_n, 8, 128), torch.randn(3, next_n, 8)
    end = torch.randint(0, length + 1, (3, next_n))
    result = indexer_logits_paged(q, weights, cache, table, end, length).view(3, next_n, length)
    for row in range(3):
        expected = mask(truth(q[row], weights[row], k[row]), torch.zeros(next_n), end[row])
        assert_within(result[row], expected, bound(q[row], weights[row], k[row], form="cpu"))
