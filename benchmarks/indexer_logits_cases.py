"""indexer_logits: paged decode of a batch, and a prefill chunk of one request, with fp8 keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from benchmark_case import USUAL_CONTEXT, Calls, Case, Scale
from peers import Run, runs
from random_caches import BLOCK_SIZE, block_table, index_cache
from torch import Tensor

from dsa_kernels.dims import INDEX_HEAD_DIM
from dsa_kernels.indexer_logits import indexer_logits, indexer_logits_paged
from dsa_kernels.testing import GLM_5, V32, indexer_bytes, indexer_flops

# The same products of e4m3, summed in another order; NVIDIA's fp8 units keep fewer bits of sums.
TOLERANCE = 1e-3
DEEP_GEMM = "vllm.third_party.deep_gemm"


def cases(scale: Scale) -> Iterator[Case]:
    heads = (32,) if scale.tiny else (V32.index_n_heads, GLM_5.index_n_heads)
    for context in (128,) if scale.tiny else (8 << 10, 32 << 10, 128 << 10):
        for batch in (2,) if scale.tiny else (1, 8, 32, 128):
            for h in heads:
                yield _decode(scale, batch, context, h)
    chunk = 4 if scale.tiny else 4096
    for context in (128,) if scale.tiny else (32 << 10, 128 << 10):
        for h in heads:
            yield _prefill(scale, chunk, context, h)


def _case(
    step: str, context: int, rows: int, heads: int, work: tuple[int, int], make: Callable[[], Calls]
) -> Case:
    """`work`: flops and bytes."""
    return Case(
        op="indexer_logits",
        shape=f"{step} {context >> 10}K, {rows} rows, {heads} heads, fp8",
        order=(context != USUAL_CONTEXT) + (heads != V32.index_n_heads),
        flops=work[0],
        bytes=work[1],
        tolerance=TOLERANCE,
        make=make,
        fp8=True,
    )


def _decode(scale: Scale, batch: int, context: int, heads: int) -> Case:
    flops = indexer_flops(batch, heads, context)
    nbytes = indexer_bytes(batch, batch, context, torch.uint8)
    make = partial(_decode_calls, scale, batch, context, heads, scale.copies(nbytes))
    return _case("decode", context, batch, heads, (flops, nbytes), make)


def _decode_calls(scale: Scale, batch: int, context: int, heads: int, copies: int) -> Calls:
    ours: list[Run] = []
    inputs: list[tuple[Tensor, ...]] = []
    for _ in range(copies):
        q, weights = _queries(batch, heads, scale)
        cache = index_cache(batch * context // BLOCK_SIZE, scale.device)
        table = block_table(batch, context, scale.device)
        lengths = torch.full((batch, 1), context, dtype=torch.int32, device=scale.device)
        out = torch.empty(batch, context, device=scale.device)
        call = (q[:, None], weights[:, None], cache, table, lengths, context)
        ours.append(partial(indexer_logits_paged, *call, out=out))
        inputs.append((q, weights, cache, table, lengths))
    deep_gemm = partial(_deep_gemm_paged, state={})
    return Calls(ours, {"DeepGEMM": runs(scale.peers.module(DEEP_GEMM), deep_gemm, inputs)})


def _prefill(scale: Scale, rows: int, context: int, heads: int) -> Case:
    """The last `rows` rows of a prompt of `context` tokens."""
    mean_keys = context - rows // 2
    flops = indexer_flops(rows, heads, mean_keys)
    nbytes = indexer_bytes(rows, 1, mean_keys, torch.uint8)
    make = partial(_prefill_calls, scale, rows, context, heads, scale.copies(nbytes))
    return _case("prefill", context, rows, heads, (flops, nbytes), make)


def _prefill_calls(scale: Scale, rows: int, context: int, heads: int, copies: int) -> Calls:
    start = torch.zeros(rows, dtype=torch.int32, device=scale.device)
    end = torch.arange(context - rows + 1, context + 1, dtype=torch.int32, device=scale.device)
    ours: list[Run] = []
    inputs: list[tuple[Tensor, ...]] = []
    for _ in range(copies):
        q, weights = _queries(rows, heads, scale)
        k = torch.randn(context, INDEX_HEAD_DIM, device=scale.device).to(torch.float8_e4m3fn)
        k_scale = torch.randint(-2, 3, (context,), device=scale.device).exp2()
        out = torch.empty(rows, context, device=scale.device)
        call = partial(indexer_logits, q, weights, k, start, end, k_scale=k_scale, out=out)
        ours.append(call)
        inputs.append((q, weights, k, k_scale, start, end))
    vllm_triton = scale.peers.module("vllm.v1.attention.ops.triton_fp8_mqa_logits")
    peers = {
        "DeepGEMM": runs(scale.peers.module(DEEP_GEMM), _deep_gemm, inputs),
        "vLLM Triton": runs(vllm_triton, _vllm_triton, inputs),
    }
    return Calls(ours, peers, partial(_visible, end))


def _queries(rows: int, heads: int, scale: Scale) -> tuple[Tensor, Tensor]:
    q = torch.randn(rows, heads, INDEX_HEAD_DIM, device=scale.device).to(torch.float8_e4m3fn)
    return q, torch.randn(rows, heads, device=scale.device) * (heads * INDEX_HEAD_DIM) ** -0.5


def _visible(end: Tensor, logits: Tensor) -> Tensor:
    """Beyond a row's end peers leave what memory held."""
    beyond = torch.arange(logits.shape[1], device=logits.device) >= end[:, None]
    return logits.masked_fill(beyond, -torch.inf)


def _deep_gemm_paged(
    library: Any,
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    state: dict[str, Any],
) -> Tensor:
    if "schedule" not in state:  # the same for all layers of a step: not part of this op's time
        sms = library.get_num_sms()
        state["schedule"] = library.get_paged_mqa_logits_metadata(lengths, BLOCK_SIZE, sms)
    context = table.shape[1] * BLOCK_SIZE
    result: Tensor = library.fp8_fp4_paged_mqa_logits(
        (q[:, None], None),
        cache[:, :, None],
        weights,
        lengths,
        table,
        state["schedule"],
        context,
        clean_logits=False,
    )
    return result


def _deep_gemm(
    library: Any,
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    k_scale: Tensor,
    start: Tensor,
    end: Tensor,
) -> Tensor:
    result: Tensor = library.fp8_fp4_mqa_logits(
        (q, None), (k, k_scale), weights, start, end, clean_logits=False
    )
    return result


def _vllm_triton(
    library: Any,
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    k_scale: Tensor,
    start: Tensor,
    end: Tensor,
) -> Tensor:
    """vLLM's kernel for MI300X; its own launch passes options that NVIDIA's compiler refuses."""
    rows, heads, width = q.shape
    logits = q.new_empty(rows, k.shape[0], dtype=torch.float32)
    library._fp8_mqa_logits_kernel[(rows,)](
        q,
        k,
        k_scale,
        weights,
        start,
        end,
        logits,
        rows,
        k.shape[0],
        heads,
        width,
        *q.stride(),
        *k.stride(),
        *weights.stride(),
        *logits.stride(),
        BLOCK_KV=64,
        num_warps=4,
        num_stages=2,
    )
    return logits
