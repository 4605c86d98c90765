"""cache_write: both caches of a layer, beside vLLM's writer, and the indexer's queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from benchmark_case import Calls, Case, Scale
from peers import Run, runs
from random_caches import BLOCK_SIZE
from torch import Tensor

from dsa_kernels.cache_write import (
    Norm,
    Rope,
    index_cache_write,
    index_query,
    latent_cache_write,
    one_launch,
)
from dsa_kernels.dims import (
    INDEX_FP8_BYTES,
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    LATENT_DIM,
    LATENT_FP8_BYTES,
    ROPE_DIM,
)
from dsa_kernels.layout import index_fp8_views, latent_fp8_views
from dsa_kernels.testing import V32, make_cos_sin_cache

EPS = 1e-6
HEADS = V32.index_n_heads
MAX_POSITION = 163840
# Two roundings of the same values to e4m3, whose steps are 2^-3 at most: vLLM 0.26 has other scales
# for latents, and does not round to bf16 before.
TOLERANCE = 2.0**-4


def cases(scale: Scale) -> Iterator[Case]:
    for rows in (3,) if scale.tiny else (1, 8, 32, 128, 4096):
        # Both fp8 caches of a row: what is read, then written.
        values = 2 * (LATENT_DIM + INDEX_HEAD_DIM) + 4 * ROPE_DIM
        nbytes = rows * (values + LATENT_FP8_BYTES + INDEX_FP8_BYTES)
        yield _case(scale, f"latent and index key, {rows} rows", rows, nbytes, _write_calls)
        nbytes = rows * (HEADS * (3 * INDEX_HEAD_DIM + 6) + 4 * ROPE_DIM)
        yield _case(scale, f"index query, {rows} rows, {HEADS} heads", rows, nbytes, _query_calls)


def _case(
    scale: Scale, shape: str, rows: int, nbytes: int, make: Callable[[Scale, int, int], Calls]
) -> Case:
    return Case(
        op="cache_write",
        shape=f"{shape}, fp8",
        order=int(rows not in (1, 128, 4096)),
        flops=0,
        bytes=nbytes,
        tolerance=TOLERANCE,
        make=partial(make, scale, rows, scale.copies(nbytes)),
    )


def _write_calls(scale: Scale, rows: int, copies: int) -> Calls:
    """In one launch. No Hadamard transform, as vLLM has none."""
    blocks = -(-rows // BLOCK_SIZE)
    table = _cos_sin(scale)
    norm = torch.randn(KV_LORA_RANK, device=scale.device).bfloat16()
    index_norm = torch.randn(2, INDEX_HEAD_DIM, device=scale.device)
    ours: list[Run] = []
    inputs: list[tuple[Tensor, ...]] = []
    for _ in range(copies):
        x = torch.randn(rows, LATENT_DIM + INDEX_HEAD_DIM, device=scale.device).bfloat16()
        positions = torch.randint(len(table), (rows,), device=scale.device)
        slots = torch.randperm(blocks * BLOCK_SIZE, device=scale.device)[:rows]
        # A row for each page: the latent cache's, then the index cache's.
        pages = torch.zeros(
            blocks,
            BLOCK_SIZE * (LATENT_FP8_BYTES + INDEX_FP8_BYTES),
            dtype=torch.uint8,
            device=scale.device,
        )
        call = (x, norm, index_norm, table, positions, slots)
        ours.append(partial(_ours, *call, pages))
        inputs.append((*call, torch.zeros_like(pages)))
    library = scale.peers.module("vllm.models.deepseek_v32.nvidia.kernels")
    return Calls(ours, {"vLLM Triton": runs(library, _vllm, inputs)}, _decoded)


def _query_calls(scale: Scale, rows: int, copies: int) -> Calls:
    """RoPE, Hadamard, quantisation and head weights; no library has it as one kernel."""
    table = _cos_sin(scale)
    rope = Rope(table, interleaved=False)
    ours: list[Run] = []
    for _ in range(copies):
        q = torch.randn(rows, HEADS, INDEX_HEAD_DIM, device=scale.device).bfloat16()
        weights = torch.randn(rows, HEADS, device=scale.device).bfloat16()
        positions = torch.randint(len(table), (rows,), device=scale.device)
        ours.append(partial(_index_query, q, weights, rope, positions))
    return Calls(ours, {})


def _cos_sin(scale: Scale) -> Tensor:
    return make_cos_sin_cache(256 if scale.tiny else MAX_POSITION).to(scale.device)


def _caches(pages: Tensor) -> tuple[Tensor, Tensor]:
    """The fp8 latent and index caches that share pages."""
    latent, index = pages.split([BLOCK_SIZE * LATENT_FP8_BYTES, BLOCK_SIZE * INDEX_FP8_BYTES], 1)
    return (
        latent.unflatten(1, (BLOCK_SIZE, LATENT_FP8_BYTES)),
        index.unflatten(1, (BLOCK_SIZE, INDEX_FP8_BYTES)),
    )


def _decoded(pages: Tensor) -> Tensor:
    latent, index = _caches(pages)
    nope, scale, rope = latent_fp8_views(latent)
    key, key_scale = index_fp8_views(index)
    nope = nope.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]
    return torch.cat((nope.flatten(2), rope.float(), key.float() * key_scale[..., None]), -1)


def _ours(
    x: Tensor,
    norm: Tensor,
    index_norm: Tensor,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: Tensor,
) -> Tensor:
    latent, index = _caches(pages)
    kv, k = x.split([LATENT_DIM, INDEX_HEAD_DIM], 1)
    weight, bias = index_norm
    pairs, halves = Rope(table, interleaved=True), Rope(table, interleaved=False)
    with one_launch():
        latent_cache_write(kv, Norm(norm, EPS), pairs, positions, latent, slots)
        index_cache_write(k, Norm(weight, EPS, bias), halves, positions, index, slots)
    return pages


def _vllm(
    library: Any,
    x: Tensor,
    norm: Tensor,
    index_norm: Tensor,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: Tensor,
) -> Tensor:
    """fused_norm_rope, which writes both caches in one launch.

    It also normalises the query's latent and clears the selection: here 16 and 1 values a row.
    """
    latent, index = _caches(pages)
    kv, k_pe, k = x.split([KV_LORA_RANK, ROPE_DIM, INDEX_HEAD_DIM], 1)
    library.fused_norm_rope(
        positions,
        kv[:, :16],
        norm[:16],
        EPS,
        kv,
        norm,
        EPS,
        k_pe,
        table,
        k,
        *index_norm,
        EPS,
        table,
        slots.new_empty(len(slots), 1, dtype=torch.int32),
        slot_mapping=slots,
        indexer_k_cache=index,
        mla_kv_cache=latent,
        mla_kv_cache_dtype="fp8_ds_mla",
    )
    return pages


def _index_query(q: Tensor, weights: Tensor, rope: Rope, positions: Tensor) -> Tensor:
    return index_query(q, weights, rope, positions, hadamard=True, fp8=True)[0]
