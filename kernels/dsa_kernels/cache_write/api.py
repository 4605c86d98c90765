"""Public signatures of cache_write."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.cache_write import reference
from dsa_kernels.checks import check_devices, check_dtype, check_shape
from dsa_kernels.dims import INDEX_HEAD_DIM, KV_LORA_RANK, LATENT_DIM, ROPE_DIM
from dsa_kernels.dispatch import use_triton
from dsa_kernels.layout import FLOAT_DTYPES, check_index_cache, check_latent_cache

_INT_DTYPES = (torch.int32, torch.int64)


def latent_cache_write(
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin_cache: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Normalise, rotate and store MLA's compressed KV (DeepSeek-V2 report, section 2.1).

    RMSNorm over the first 512 values, in fp32 throughout and rounded once at the end, weight
    included (vLLM's rms_norm kernels; transformers rounds before the weight too). Interleaved RoPE
    over the last 64. In an fp8 cache each 128 of the 512 get the scale 2^ceil(log2(max(amax / 448,
    1e-4))), as vLLM's `fused_norm_rope` (models/deepseek_v32/common/kernels.py) writes fp8_ds_mla;
    RoPE values stay bf16.

    Args:
        kv: [T, 576] float: the kv_a projection's output, 512 before RMSNorm, 64 before RoPE.
        norm_weight: [512] float.
        eps: of the RMSNorm.
        positions: [T] int, < max_position.
        cos_sin_cache: [max_position, 64] float, 32 cosines then 32 sines.
        cache: latent cache, written. Layouts: `dsa_kernels.layout`.
        slot_mapping: [T] int, block * block_size + offset; a slot outside the cache (-1 is the
            host's padding) is skipped. Slots that are stored must differ.

    Raises:
        ValueError: a shape, dtype, stride or device that is not as above.
    """
    check_dtype("kv", kv, FLOAT_DTYPES)
    check_shape("kv", kv, ("T", LATENT_DIM))
    check_shape("norm_weight", norm_weight, (KV_LORA_RANK,))
    check_latent_cache(cache)
    _check_tokens("kv", kv, positions, cos_sin_cache)
    _check_slots("kv", kv, cache, slot_mapping)
    check_devices("kv", kv, norm_weight=norm_weight)
    if not use_triton(kv.device):
        reference.latent_cache_write(
            kv, norm_weight, eps, positions, cos_sin_cache, cache, slot_mapping
        )
        return
    from dsa_kernels.cache_write import kernel

    kernel.latent_cache_write(kv, norm_weight, eps, positions, cos_sin_cache, cache, slot_mapping)


def index_cache_write(
    k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin_cache: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool,
    hadamard: bool = False,
) -> None:
    """Normalise, rotate and store the lightning indexer's keys.

    As Indexer in DeepSeek-V3.2-Exp's inference/model.py: LayerNorm in fp32, RoPE over the *first*
    64 values, optionally the Hadamard transform H_128 * 128^-0.5; each step rounds to k's dtype. In
    an fp8 cache each key gets the scale 2^ceil(log2(max(amax, 1e-4) / 448)) (that file's act_quant
    with scale_fmt "ue8m0").

    Args:
        k: [T, 128] float: the wk projection's output.
        norm_weight: [128] float.
        norm_bias: [128] float.
        eps: of the LayerNorm.
        positions: [T] int, < max_position.
        cos_sin_cache: [max_position, 64] float, 32 cosines then 32 sines.
        cache: index-key cache, written. Layouts: `dsa_kernels.layout`.
        slot_mapping: [T] int, block * block_size + offset; a slot outside the cache (-1 is the
            host's padding) is skipped. Slots that are stored must differ.
        interleaved: RoPE pairs (2i, 2i+1) if true (GLM-5), halves (i, i+32) if not (DeepSeek-V3.2).
        hadamard: must agree with `index_query`.

    Raises:
        ValueError: a shape, dtype, stride or device that is not as above.
    """
    check_dtype("k", k, FLOAT_DTYPES)
    check_shape("k", k, ("T", INDEX_HEAD_DIM))
    check_shape("norm_weight", norm_weight, (INDEX_HEAD_DIM,))
    check_shape("norm_bias", norm_bias, (INDEX_HEAD_DIM,))
    check_index_cache(cache)
    _check_tokens("k", k, positions, cos_sin_cache)
    _check_slots("k", k, cache, slot_mapping)
    check_devices("k", k, norm_weight=norm_weight, norm_bias=norm_bias)
    arguments = (k, norm_weight, norm_bias, eps, positions, cos_sin_cache, cache, slot_mapping)
    if not use_triton(k.device):
        reference.index_cache_write(*arguments, interleaved=interleaved, hadamard=hadamard)
        return
    from dsa_kernels.cache_write import kernel

    kernel.index_cache_write(*arguments, interleaved, hadamard)


def index_query(
    q: Tensor,
    weights: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    *,
    interleaved: bool,
    hadamard: bool = False,
    fp8: bool = False,
) -> tuple[Tensor, Tensor]:
    """Make the indexer's queries and head weights ready for `indexer_logits`.

    The query is rotated like the keys of `index_cache_write`. The weights take every constant
    factor of the score: heads^-0.5 * 128^-0.5, and in fp8 the query's own scale, which is positive
    and so commutes with the relu (DeepSeek-V3.2-Exp, inference/model.py, Indexer).

    Args:
        q: [T, heads, 128] float: the wq_b projection's output.
        weights: [T, heads] float: the weights_proj projection's output, signed.
        positions: [T] int, < max_position.
        cos_sin_cache: [max_position, 64] float, 32 cosines then 32 sines.
        interleaved: RoPE style, as in `index_cache_write`.
        hadamard: as in `index_cache_write`.
        fp8: quantise q with the scale 2^ceil(log2(max(amax, 1e-4) / 448)) per token and head.

    Returns:
        q [T, heads, 128] in its dtype, or float8_e4m3fn; weights [T, heads] fp32.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_dtype("q", q, FLOAT_DTYPES)
    check_shape("q", q, ("T", "heads", INDEX_HEAD_DIM))
    check_dtype("weights", weights, FLOAT_DTYPES)
    check_shape("weights", weights, q.shape[:2])
    _check_tokens("q", q, positions, cos_sin_cache)
    check_devices("q", q, weights=weights)
    if not use_triton(q.device):
        return reference.index_query(
            q,
            weights,
            positions,
            cos_sin_cache,
            interleaved=interleaved,
            hadamard=hadamard,
            fp8=fp8,
        )
    from dsa_kernels.cache_write import kernel

    dtype = torch.float8_e4m3fn if fp8 else q.dtype
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    out_weights = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    kernel.index_query(
        q, weights, positions, cos_sin_cache, interleaved, hadamard, out, out_weights
    )
    return out, out_weights


def apply_rope(
    x: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    *,
    interleaved: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) over 64 values, computed in fp32.

    Args:
        x: [T, ..., 64] float.
        positions: [T] int, < max_position.
        cos_sin_cache: [max_position, 64] float, 32 cosines then 32 sines.
        interleaved: rotate pairs (2i, 2i+1) if true (GPT-J), halves (i, i+32) if not (NeoX).
        out: [T, ..., 64], x's dtype, written if given; not x, and between T and 64 one stride.

    Returns:
        [T, ..., 64], x's dtype; the order of the values is kept.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_dtype("x", x, FLOAT_DTYPES)
    if x.dim() < 2 or x.shape[-1] != ROPE_DIM:
        raise ValueError(f"x: shape {tuple(x.shape)}; it must be [T, ..., {ROPE_DIM}]")
    _check_tokens("x", x, positions, cos_sin_cache)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_dtype("out", out, (x.dtype,))
    check_shape("out", out, x.shape)
    check_devices("x", x, out=out)
    if not use_triton(x.device):
        reference.apply_rope(x, positions, cos_sin_cache, interleaved=interleaved, out=out)
        return out
    from dsa_kernels.cache_write import kernel

    if x.dim() == 2:
        kernel.apply_rope(x[:, None], positions, cos_sin_cache, interleaved, out[:, None])
    else:
        rows = x.flatten(1, -2)
        kernel.apply_rope(rows, positions, cos_sin_cache, interleaved, out.view(rows.shape))
    return out


def _check_tokens(name: str, tokens: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> None:
    check_dtype("positions", positions, _INT_DTYPES)
    check_shape("positions", positions, (tokens.shape[0],))
    check_dtype("cos_sin_cache", cos_sin_cache, FLOAT_DTYPES)
    check_shape("cos_sin_cache", cos_sin_cache, ("max_position", ROPE_DIM))
    check_devices(name, tokens, positions=positions, cos_sin_cache=cos_sin_cache)


def _check_slots(name: str, tokens: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    check_dtype("slot_mapping", slot_mapping, _INT_DTYPES)
    check_shape("slot_mapping", slot_mapping, (tokens.shape[0],))
    if cache.shape[0] * cache.shape[1] == 0:
        raise ValueError(
            f"cache: shape {tuple(cache.shape)} has no slots; allocate at least one block"
        )
    check_devices(name, tokens, cache=cache, slot_mapping=slot_mapping)
