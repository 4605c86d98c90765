"""Public signatures of cache_write."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.cache_write import reference
from dsa_kernels.checks import check_devices, check_dtype, check_shape
from dsa_kernels.dims import INDEX_HEAD_DIM, KV_LORA_RANK, LATENT_DIM, ROPE_DIM
from dsa_kernels.dispatch import use_triton
from dsa_kernels.layout import FLOAT_DTYPES, check_index_cache, check_latent_cache
from dsa_kernels.norm_and_rope import Norm, Rope

_INT_DTYPES = (torch.int32, torch.int64)


def latent_cache_write(
    kv: Tensor, norm: Norm, rope: Rope, positions: Tensor, cache: Tensor, slot_mapping: Tensor
) -> None:
    """Normalise, rotate and store MLA's compressed KV (DeepSeek-V2 report, section 2.1).

    RMSNorm over the first 512 values, in fp32 throughout and rounded once at the end, weight
    included (vLLM's rms_norm kernels; transformers rounds before the weight too). Interleaved RoPE
    over the last 64. In an fp8 cache each 128 of the 512 get the scale 2^ceil(log2(max(amax / 448,
    1e-4))), as vLLM's `fused_norm_rope` (models/deepseek_v32/common/kernels.py) writes fp8_ds_mla;
    RoPE values stay bf16.

    Args:
        kv: [T, 576] float: the kv_a projection's output, 512 before RMSNorm, 64 before RoPE.
        norm: RMSNorm of 512 values.
        rope: interleaved.
        positions: [T] int, < max_position of `rope`.
        cache: latent cache, written. Layouts: `dsa_kernels.layout`.
        slot_mapping: [T] int, block * block_size + offset; a slot outside the cache (-1 is the
            host's padding) is skipped. Slots that are stored must differ.

    Raises:
        ValueError: a shape, dtype, stride or device that is not as above; a norm with a bias; a
            rope that rotates halves.
    """
    check_dtype("kv", kv, FLOAT_DTYPES)
    check_shape("kv", kv, ("T", LATENT_DIM))
    if norm.bias is not None:
        raise ValueError("norm: has a bias; latents take RMSNorm, which has none: leave it None")
    if not rope.interleaved:
        raise ValueError(
            "rope: interleaved is False; latents are rotated in pairs (2i, 2i+1): use a Rope with "
            "interleaved=True"
        )
    _check_norm("kv", kv, norm, KV_LORA_RANK)
    check_latent_cache(cache)
    _check_tokens("kv", kv, rope, positions)
    _check_slots("kv", kv, cache, slot_mapping)
    if not use_triton(kv.device):
        reference.latent_cache_write(kv, norm, rope, positions, cache, slot_mapping)
        return
    from dsa_kernels.cache_write import kernel

    kernel.latent_cache_write(kv, norm, rope, positions, cache, slot_mapping)


def index_cache_write(
    k: Tensor,
    norm: Norm,
    rope: Rope,
    positions: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    *,
    hadamard: bool = False,
) -> None:
    """Normalise, rotate and store the lightning indexer's keys.

    As Indexer in DeepSeek-V3.2-Exp's inference/model.py: LayerNorm in fp32, RoPE over the *first*
    64 values, optionally the Hadamard transform H_128 * 128^-0.5; each step rounds to k's dtype. In
    an fp8 cache each key gets the scale 2^ceil(log2(max(amax, 1e-4) / 448)) (that file's act_quant
    with scale_fmt "ue8m0").

    Args:
        k: [T, 128] float: the wk projection's output.
        norm: LayerNorm of 128 values.
        rope: interleaved in GLM-5, not in DeepSeek-V3.2.
        positions: [T] int, < max_position of `rope`.
        cache: index-key cache, written. Layouts: `dsa_kernels.layout`.
        slot_mapping: [T] int, block * block_size + offset; a slot outside the cache (-1 is the
            host's padding) is skipped. Slots that are stored must differ.
        hadamard: must agree with `index_query`.

    Raises:
        ValueError: a shape, dtype, stride or device that is not as above; a norm without a bias.
    """
    check_dtype("k", k, FLOAT_DTYPES)
    check_shape("k", k, ("T", INDEX_HEAD_DIM))
    if norm.bias is None:
        raise ValueError("norm: has no bias; index keys take LayerNorm: give one, if of zeros")
    _check_norm("k", k, norm, INDEX_HEAD_DIM)
    check_index_cache(cache)
    _check_tokens("k", k, rope, positions)
    _check_slots("k", k, cache, slot_mapping)
    if not use_triton(k.device):
        reference.index_cache_write(
            k, norm, rope, positions, cache, slot_mapping, hadamard=hadamard
        )
        return
    from dsa_kernels.cache_write import kernel

    kernel.index_cache_write(k, norm, rope, positions, cache, slot_mapping, hadamard)


def index_query(
    q: Tensor,
    weights: Tensor,
    rope: Rope,
    positions: Tensor,
    *,
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
        rope: as in `index_cache_write`.
        positions: [T] int, < max_position of `rope`.
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
    _check_tokens("q", q, rope, positions)
    check_devices("q", q, weights=weights)
    if not use_triton(q.device):
        return reference.index_query(q, weights, rope, positions, hadamard=hadamard, fp8=fp8)
    from dsa_kernels.cache_write import kernel

    dtype = torch.float8_e4m3fn if fp8 else q.dtype
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    out_weights = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    kernel.index_query(q, weights, rope, positions, hadamard, out, out_weights)
    return out, out_weights


def apply_rope(x: Tensor, rope: Rope, positions: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rotary position embedding over 64 values, computed in fp32: the maths are `Rope`'s.

    Args:
        x: [T, ..., 64] float.
        rope: which values are pairs, and their angles.
        positions: [T] int, < max_position of `rope`.
        out: [T, ..., 64], x's dtype, written if given; not x, and between T and 64 one stride.

    Returns:
        [T, ..., 64], x's dtype; the order of the values is kept.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_dtype("x", x, FLOAT_DTYPES)
    if x.dim() < 2 or x.shape[-1] != ROPE_DIM:
        raise ValueError(f"x: shape {tuple(x.shape)}; it must be [T, ..., {ROPE_DIM}]")
    _check_tokens("x", x, rope, positions)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_dtype("out", out, (x.dtype,))
    check_shape("out", out, x.shape)
    check_devices("x", x, out=out)
    if not use_triton(x.device):
        reference.apply_rope(x, rope, positions, out=out)
        return out
    from dsa_kernels.cache_write import kernel

    if x.dim() == 2:
        kernel.apply_rope(x[:, None], rope, positions, out[:, None])
    else:
        rows = x.flatten(1, -2)
        kernel.apply_rope(rows, rope, positions, out.view(rows.shape))
    return out


def _check_norm(name: str, tokens: Tensor, norm: Norm, width: int) -> None:
    check_shape("norm.weight", norm.weight, (width,))
    if norm.bias is not None:
        check_shape("norm.bias", norm.bias, (width,))
    check_devices(name, tokens, **{"norm.weight": norm.weight, "norm.bias": norm.bias})


def _check_tokens(name: str, tokens: Tensor, rope: Rope, positions: Tensor) -> None:
    check_dtype("positions", positions, _INT_DTYPES)
    check_shape("positions", positions, (tokens.shape[0],))
    check_dtype("rope.cos_sin_cache", rope.cos_sin_cache, FLOAT_DTYPES)
    check_shape("rope.cos_sin_cache", rope.cos_sin_cache, ("max_position", ROPE_DIM))
    others = {"positions": positions, "rope.cos_sin_cache": rope.cos_sin_cache}
    check_devices(name, tokens, **others)


def _check_slots(name: str, tokens: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    check_dtype("slot_mapping", slot_mapping, _INT_DTYPES)
    check_shape("slot_mapping", slot_mapping, (tokens.shape[0],))
    if cache.shape[0] * cache.shape[1] == 0:
        raise ValueError(
            f"cache: shape {tuple(cache.shape)} has no slots; allocate at least one block"
        )
    check_devices(name, tokens, cache=cache, slot_mapping=slot_mapping)
