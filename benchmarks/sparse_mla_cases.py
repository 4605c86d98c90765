"""sparse_mla: decode of a batch, and a prefill chunk of one request, beside other libraries.

masked_mha, its form for short prefills, beside torch's attention with the same mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmark_case import USUAL_CONTEXT, Calls, Case, Scale
from peers import Run, runs
from random_caches import BLOCK_SIZE, block_table, latent_cache, selected_slots
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from dsa_kernels.arch import arch_of
from dsa_kernels.dims import KV_LORA_RANK, LATENT_DIM
from dsa_kernels.sparse_mla import kernel, masked_mha, sparse_mla
from dsa_kernels.sparse_mla.reference import selection
from dsa_kernels.testing import GLM_5, INDEX_TOPK, V32, sparse_mla_bytes, sparse_mla_flops

SOFTMAX_SCALE = V32.head_dim**-0.5
# bf16 weights and results, rounded in another order than ours: twice the error of either.
TOLERANCE = 2.0**-7
FLASH_MLA_HEADS = 64  # fewer are padded, as vLLM pads them
# An H100 did not finish vLLM's or SGLang's Triton kernels at four times as many.
MOST_TRITON_PEER_ROWS = 8 * 128
SGLANG = "sglang.kernels.ops.attention.dsa"


def cases(scale: Scale) -> Iterator[Case]:
    topk = 48 if scale.tiny else INDEX_TOPK
    # 16 are of a rank, of eight for V3.2.
    heads = (16,) if scale.tiny else (V32.num_attention_heads, GLM_5.num_attention_heads, 16)
    dtypes = (torch.uint8, torch.bfloat16)
    for context in (128,) if scale.tiny else (8 << 10, 32 << 10, 128 << 10):
        for batch in (1,) if scale.tiny else (1, 8, 32, 128):
            for h in heads:
                for dtype in dtypes:
                    yield _case(scale, "decode", _Shape(batch, batch, context, h, topk, dtype))
    chunk = 2 if scale.tiny else 4096
    for context in (128,) if scale.tiny else (32 << 10, 128 << 10):
        for h in heads:
            for dtype in dtypes:
                yield _case(scale, "prefill", _Shape(1, chunk, context, h, topk, dtype))
    for context in (128,) if scale.tiny else (4 << 10, 8 << 10):
        for h in (2,) if scale.tiny else heads:
            yield _masked_case(scale, 32 if scale.tiny else 4096, context, h, topk)


@dataclass(frozen=True)
class _Shape:
    """`rows` queries spread evenly over `requests` contexts of `context` tokens."""

    requests: int
    rows: int
    context: int
    heads: int
    topk: int
    cache_dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sparse_mla_bytes(self.rows, self.topk, self.cache_dtype)


def _case(scale: Scale, step: str, of: _Shape) -> Case:
    kind = "fp8" if of.cache_dtype == torch.uint8 else "bf16"
    return Case(
        op="sparse_mla",
        shape=f"{step} {of.context >> 10}K, {of.rows} rows, {of.heads} heads, {kind}",
        order=(of.context != USUAL_CONTEXT) + (of.heads != V32.num_attention_heads),
        flops=sparse_mla_flops(of.rows, of.heads, of.topk),
        bytes=of.nbytes,
        tolerance=TOLERANCE,
        make=partial(_calls, scale, of),
    )


def _calls(scale: Scale, of: _Shape) -> Calls:
    ours: list[Run] = []
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(scale.copies(of.nbytes)):
        cache = latent_cache(of.requests * of.context // BLOCK_SIZE, of.cache_dtype, scale.device)
        q = torch.randn(of.rows, of.heads, LATENT_DIM, device=scale.device).bfloat16()
        table = block_table(of.requests, of.context, scale.device)
        slots = selected_slots(table, of.rows // of.requests, of.topk)
        out = torch.empty_like(q[..., :KV_LORA_RANK])
        ours.append(partial(_ours, q, cache, slots, out))
        inputs.append((q, cache, slots.int()))
    peers = {
        "Gluon, experimental": runs(_gluon_form(*inputs[0][:2]), _gluon, inputs),
        "FlashMLA": runs(
            scale.peers.module("vllm.third_party.flashmla.flash_mla_interface"),
            partial(_flash_mla, heads=of.heads, state={}),
            [(pad(q, (0, 0, 0, max(0, FLASH_MLA_HEADS - of.heads))), *rest) for q, *rest in inputs],
        ),
    }
    if of.cache_dtype == torch.bfloat16:
        peers |= _triton_peers(scale, of, inputs)
    return Calls(ours, peers)


def _triton_peers(
    scale: Scale, of: _Shape, inputs: list[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, list[Run] | str]:
    options = {
        "topk_length": torch.full((of.rows,), of.topk, dtype=torch.int32, device=scale.device),
        # A tile: otherwise it asks the GPU.
        "config": (16, 4, 1) if scale.tiny else None,
    }
    kernels: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "vLLM Triton": ("vllm.v1.attention.ops.xpu_mla_sparse", _vllm_triton),
        "SGLang Triton": (
            f"{SGLANG}.triton_sparse_mla_prefill",
            partial(_sglang_prefill, options=options),
        ),
        "SGLang Triton, split": (f"{SGLANG}.triton_sparse_mla", _sglang_split),
    }
    if of.rows * of.heads > MOST_TRITON_PEER_ROWS:
        return dict.fromkeys(kernels, f"takes minutes at {of.rows} rows of {of.heads} heads")
    return {
        name: runs(scale.peers.module(module), call, inputs)
        for name, (module, call) in kernels.items()
    }


def _masked_case(scale: Scale, rows: int, context: int, heads: int, topk: int) -> Case:
    """The last `rows` of a prompt of `context` tokens; its keys and values are expanded already."""
    seen = rows * context - rows * (rows - 1) // 2
    nbytes = 2 * heads * (context + rows) * (V32.head_dim + V32.v_head_dim)
    return Case(
        op="masked_mha",
        shape=f"prefill {context >> 10}K, {rows} rows, {heads} heads",
        order=(context != 8 << 10) + (heads != V32.num_attention_heads),
        flops=2 * heads * seen * (V32.head_dim + V32.v_head_dim),
        bytes=nbytes,
        tolerance=TOLERANCE,
        make=partial(_masked_calls, scale, rows, context, heads, topk, scale.copies(nbytes)),
    )


def _masked_calls(
    scale: Scale, rows: int, context: int, heads: int, topk: int, copies: int
) -> Calls:
    seen = torch.arange(context - rows, context, device=scale.device) + 1
    scores = torch.rand(rows, context, device=scale.device)
    outside = torch.arange(context, device=scale.device) >= seen[:, None]
    chosen = scores.masked_fill_(outside, -1).topk(min(topk, context)).indices.int()
    chosen.masked_fill_(torch.arange(chosen.shape[1], device=scale.device) >= seen[:, None], -1)
    ours: list[Run] = []
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(copies):
        q = torch.randn(rows, heads, V32.head_dim, device=scale.device).bfloat16()
        k = torch.randn(heads, context, V32.head_dim, device=scale.device).bfloat16()
        v = torch.randn_like(k[..., : V32.v_head_dim])
        ours.append(partial(masked_mha, q, k, v, chosen, SOFTMAX_SCALE))
        inputs.append((q, k, v))
    sdpa = partial(_sdpa, mask=selection(chosen, context))
    return Calls(ours, {"torch.sdpa": runs(torch, sdpa, inputs)})


def _sdpa(_torch: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=SOFTMAX_SCALE
    )
    return out[0].transpose(0, 1)


def _ours(q: Tensor, cache: Tensor, slots: Tensor, out: Tensor) -> Tensor:
    return sparse_mla(q, cache, slots, SOFTMAX_SCALE, out=out)[0]


def _gluon_form(q: Tensor, cache: Tensor) -> Any | str:
    """The module of sparse_mla's Gluon form, or why it does not take these."""
    try:
        from dsa_kernels.sparse_mla import hopper
    except ImportError as failure:  # Gluon's names change with Triton's version
        return str(failure)
    return hopper.refusal(q, cache, arch_of(q.device)) or hopper


def _gluon(hopper: Any, q: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    out = torch.empty_like(q[..., :KV_LORA_RANK])
    lse = torch.empty(q.shape[:2], device=q.device)
    arguments = (q, cache, slots, None, SOFTMAX_SCALE, out, lse, arch_of(q.device))
    attend, *merge = kernel.launches(*arguments)
    for launch in (hopper.take_over(attend), *merge):
        launch.run()
    return out


def _flash_mla(
    library: Any, q: Tensor, cache: Tensor, slots: Tensor, heads: int, state: dict[str, Any]
) -> Tensor:
    """FlashMLA's prefill kernel for bf16, its decode kernel for fp8, one query a request."""
    if cache.dtype == torch.uint8:
        plan = state.setdefault("plan", library.get_mla_metadata()[0])
        out, _ = library.flash_mla_with_kvcache(
            q[:, None],
            cache[:, :, None],
            None,
            None,
            KV_LORA_RANK,
            plan,
            softmax_scale=SOFTMAX_SCALE,
            is_fp8_kvcache=True,
            indices=slots[:, None],
        )
        out = out[:, 0]
    else:
        latents = cache.view(-1, 1, LATENT_DIM)
        out = library.flash_mla_sparse_fwd(q, latents, slots[:, None], SOFTMAX_SCALE)[0]
    result: Tensor = out[:, :heads]
    return result


def _vllm_triton(library: Any, q: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    latents = cache.view(-1, 1, LATENT_DIM)
    result: Tensor = library.triton_bf16_mla_sparse_interface(
        q, latents, slots[:, None], SOFTMAX_SCALE
    )[0]
    return result


def _sglang_prefill(
    library: Any, q: Tensor, cache: Tensor, slots: Tensor, options: dict[str, Any]
) -> Tensor:
    latents = cache.view(-1, LATENT_DIM)
    result: Tensor = library.sparse_mla_prefill(q, latents, slots, SOFTMAX_SCALE, **options)
    return result


def _sglang_split(library: Any, q: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """What SGLang runs on AMD: one pass over many rows, split and merged for few."""
    nope, rope = q[..., :KV_LORA_RANK], q[..., KV_LORA_RANK:]
    latents = cache.view(-1, 1, LATENT_DIM)
    result: Tensor = library.triton_sparse_mla_fwd(
        nope, rope, latents, slots[:, None], SOFTMAX_SCALE
    )
    return result[0]
