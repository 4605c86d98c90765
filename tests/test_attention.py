"""A prefill's two forms, through `attention.attend`: masked, some heads at a time, and gathered."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_kernels.sparse_mla import masked_mha
from dsa_kernels.testing import make_cos_sin_cache
from dsa_plugin import attention
from dsa_plugin.metadata import DSAMetadata, PrefillChunk
from dsa_testbed.latents import SCALE, filled_cache

HEADS, NOPE, V_HEAD_DIM = 5, 128, 96
KEYS, ROWS, TOPK = 100, 20, 30
HEAD_BYTES = KEYS * (NOPE + 64 + V_HEAD_DIM) * 4


def attended(
    monkeypatch: pytest.MonkeyPatch, *, masked: bool, workspace_bytes: int
) -> tuple[Tensor, list[int]]:
    """The last rows of a prompt, and how many heads each call of masked_mha was given."""
    torch.manual_seed(0)
    table = torch.tensor([[1, 3]], dtype=torch.int32)
    used = torch.cat((torch.arange(64, 128), torch.arange(192, 228)))
    cache, _ = filled_cache(torch.float32, 4, 64, used)
    mla = attention.MLAWeights(
        softmax_scale=SCALE,
        kv_norm=torch.ones(512),
        kv_norm_eps=1e-6,
        w_uk=torch.randn(HEADS, NOPE, 512) / 512**0.5,
        w_uv=torch.randn(HEADS, 512, V_HEAD_DIM) / 512**0.5,
        cos_sin_cache=make_cos_sin_cache(KEYS),
    )
    positions = torch.arange(KEYS - ROWS, KEYS)
    indices = torch.stack([torch.randperm(int(p) + 1)[:TOPK] for p in positions]).int()
    metadata = DSAMetadata(
        num_tokens=ROWS,
        num_decodes=0,
        decode_query_len=1,
        max_decode_context_len=0,
        prefill_chunks=(PrefillChunk(0, 0, ROWS, KEYS),),
        request_ids=torch.zeros(ROWS, dtype=torch.int32),
        context_lens=positions.int() + 1,
        block_table=table,
        slot_mapping=torch.full((ROWS,), -1),
        block_size=64,
        workspace_bytes=workspace_bytes,
    )
    groups: list[int] = []

    def noted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        groups.append(q.shape[1])
        return masked_mha(q, *args, **kwargs)

    monkeypatch.setattr(attention, "masked_mha", noted)
    monkeypatch.setattr(attention, "masked_is_faster", lambda *_args, **_kwargs: masked)
    q, out = torch.randn(ROWS, HEADS, NOPE + 64), torch.full((ROWS, HEADS, V_HEAD_DIM), torch.nan)
    attention.attend(mla, q, positions, cache, metadata, indices, None, out)
    return out, groups


@pytest.mark.parametrize(
    ("heads", "groups"), [(0, [1, 1, 1, 1, 1]), (1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (9, [5])]
)
def test_masked_heads_fit_the_workspace(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: list[int]
) -> None:
    """As many at a time as there is room for, at least one; the result is the gathered form's."""
    run = partial(attended, monkeypatch, workspace_bytes=heads * HEAD_BYTES + 1)
    gathered, none = run(masked=False)
    assert not none
    masked, calls = run(masked=True)
    assert calls == groups
    torch.testing.assert_close(masked, gathered, atol=2e-5, rtol=1e-5)
