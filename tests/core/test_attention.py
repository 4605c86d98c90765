"""A prefill's three forms, through `sparse.attend`: masked, decoded first, and gathered."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_kernels.arch import arch_of
from dsa_kernels.cache_write import Norm, Rope
from dsa_kernels.launch import Launch
from dsa_kernels.sparse_mla import gather_latents, masked_mha
from dsa_kernels.testing import make_cos_sin_cache
from dsa_plugin import attention
from dsa_plugin.attention import ops, sparse
from dsa_plugin.attention.metadata import DSAMetadata, PrefillChunk
from dsa_testbed.kernel_runs import DEVICE, stand_for
from dsa_testbed.latents import SCALE, filled_cache, filled_fp8_cache

HEADS, NOPE, V_HEAD_DIM = 5, 128, 96
KEYS, ROWS, TOPK = 100, 20, 30
HEAD_BYTES = KEYS * (NOPE + 64 + V_HEAD_DIM) * 4


@dataclass
class Prefill:
    """The last rows of a prompt: what `attend` takes, and where it writes."""

    layer: attention.Layer
    projections: attention.Projections
    metadata: DSAMetadata
    topk_indices: Tensor
    out: Tensor

    def attend(self) -> None:
        none = sparse.rotate_decodes(self.layer.mla, self.projections, self.metadata)
        sparse.attend(
            self.layer,
            self.projections,
            self.metadata,
            self.topk_indices,
            None,
            none,
            self.out,
        )


def prefill(workspace_bytes: int, filled: Callable[..., Any] = filled_cache) -> Prefill:
    used = torch.cat((torch.arange(64, 128), torch.arange(192, 228)))
    positions = torch.arange(KEYS - ROWS, KEYS)
    mla = attention.MLAWeights(
        softmax_scale=SCALE,
        kv_norm=Norm(torch.ones(512), 1e-6),
        rope=Rope(make_cos_sin_cache(KEYS), interleaved=True),
        w_uk=torch.randn(HEADS, NOPE, 512) / 512**0.5,
        w_uv=torch.randn(HEADS, 512, V_HEAD_DIM) / 512**0.5,
    )
    q, kv = torch.randn(ROWS, HEADS, NOPE + 64), torch.randn(ROWS, 576)
    return Prefill(
        layer=attention.Layer(mla, filled(torch.float32, 4, 64, used)[0], None),
        projections=attention.Projections(q, kv, positions, None),
        metadata=DSAMetadata(
            num_tokens=ROWS,
            num_decodes=0,
            decode_query_len=1,
            max_decode_context_len=0,
            prefill_chunks=(PrefillChunk(0, 0, ROWS, KEYS),),
            request_ids=torch.zeros(ROWS, dtype=torch.int32),
            context_lens=positions.int() + 1,
            block_table=torch.tensor([[1, 3]], dtype=torch.int32),
            slot_mapping=torch.full((ROWS,), -1),
            block_size=64,
            workspace_bytes=workspace_bytes,
        ),
        topk_indices=torch.stack([torch.randperm(int(p) + 1)[:TOPK] for p in positions]).int(),
        out=torch.full((ROWS, HEADS, V_HEAD_DIM), torch.nan),
    )


def choose(monkeypatch: pytest.MonkeyPatch, *, masked: bool) -> None:
    monkeypatch.setattr(sparse, "masked_is_faster", lambda *_args, **_kwargs: masked)


def peak_bytes(call: Callable[[], None]) -> int:
    """Most that a call's tensors took at once."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        call()
    profiler: Any = profile.profiler
    events = profiler.kineto_results.events()
    steps = sorted((e.start_ns(), int(e.nbytes())) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in steps))


@pytest.mark.parametrize(
    ("heads", "groups"), [(0, [1, 1, 1, 1, 1]), (1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (9, [5])]
)
def test_masked_heads_fit_the_workspace(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: list[int]
) -> None:
    """As many at a time as there is room for, at least one; the result is the gathered form's."""
    batch = prefill(heads * HEAD_BYTES + 1)
    choose(monkeypatch, masked=False)
    batch.attend()
    gathered = batch.out.clone()
    choose(monkeypatch, masked=True)
    calls: list[int] = []

    def noted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(q.shape[1])
        return masked_mha(q, *args, **kwargs)

    monkeypatch.setattr(ops, "masked_mha", noted)
    batch.attend()
    assert calls == groups
    torch.testing.assert_close(batch.out, gathered, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("room", [True, False])
def test_an_fp8_cache_is_decoded_once_for_all_rows(
    monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """Where the workspace has room for it; what lies behind the last key is NaN."""
    batch = prefill(128 * 576 * 4 - (not room), filled_fp8_cache)
    choose(monkeypatch, masked=False)
    batch.attend()
    gathered = batch.out.clone()
    monkeypatch.setattr(sparse, "decoding_first_is_faster", lambda *_args: True)
    decoded: list[int] = []

    def noted(cache: Tensor, table: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
        decoded.append(num_keys)
        return gather_latents(cache, table, num_keys, dtype)

    monkeypatch.setattr(ops, "gather_latents", noted)
    batch.out.fill_(torch.nan)
    batch.attend()
    assert decoded == ([128] if room else [])
    torch.testing.assert_close(batch.out, gathered, atol=2e-5, rtol=1e-5)


@pytest.mark.triton
@pytest.mark.skipif(DEVICE.type != "cpu", reason="measures what is allocated on a CPU")
def test_what_is_reserved_is_what_the_gathered_form_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels, which take no scratch memory where the rows fill the chip; none has to run."""
    from dsa_kernels.sparse_mla import kernel

    stand_for(monkeypatch, kernel, replace(arch_of(DEVICE), num_sms=1))
    monkeypatch.setattr(Launch, "run", lambda _launch: None)
    choose(monkeypatch, masked=False)
    batch = prefill(0)
    taken = peak_bytes(batch.attend)
    reserved = peak_bytes(lambda: attention.reserve(batch.projections.q, TOPK, 0))
    assert 0.9 * reserved < taken <= reserved
