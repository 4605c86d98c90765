"""Specification of cache_write in eager torch.

Rounding: each step (norm, RoPE, Hadamard) computes in fp32 and rounds once, to the input's dtype,
as the modules of DeepSeek-V3.2-Exp's inference/model.py do; fp8 is quantised from the rounded
value.
"""

from __future__ import annotations

from functools import cache as memoise

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_kernels.dims import (
    FP8_BLOCK,
    FP8_MAX,
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    LATENT_SCALES,
    ROPE_DIM,
)
from dsa_kernels.fp8 import encode_e4m3, quantise_ue8m0, round_up_to_power_of_two
from dsa_kernels.layout import index_fp8_views
from dsa_kernels.norm_and_rope import Norm, Rope
from dsa_kernels.workspace import TILE_BYTES

_LATENT_SCALE_FLOOR = 1e-4


def latent_cache_write(
    kv: Tensor, norm: Norm, rope: Rope, positions: Tensor, cache: Tensor, slot_mapping: Tensor
) -> None:
    if kv.shape[0] == 0:
        return
    nope = kv[:, :KV_LORA_RANK].float()
    nope = nope * torch.rsqrt(nope.square().mean(-1, keepdim=True) + norm.eps)
    nope = (nope * norm.weight.float()).to(kv.dtype)
    pe = apply_rope(kv[:, KV_LORA_RANK:], rope, positions)
    if cache.dtype == torch.uint8:
        entry = _pack_latent(nope, pe)
    else:
        entry = torch.cat((nope, pe), -1).to(cache.dtype)
    _store(slot_mapping, (cache, entry))


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
    if k.shape[0] == 0:
        return
    bias = None if norm.bias is None else norm.bias.float()
    key = F.layer_norm(k.float(), (INDEX_HEAD_DIM,), norm.weight.float(), bias, norm.eps)
    key = _rotate(key.to(k.dtype), rope, positions, hadamard)
    if cache.dtype == torch.uint8:
        keys, scales = index_fp8_views(cache)
        value, scale = quantise_ue8m0(key)
        _store(slot_mapping, (keys.view(torch.uint8), value.view(torch.uint8)), (scales, scale))
    else:
        _store(slot_mapping, (cache, key.to(cache.dtype)))


def index_query(
    q: Tensor,
    weights: Tensor,
    rope: Rope,
    positions: Tensor,
    *,
    hadamard: bool = False,
    fp8: bool = False,
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    dtype = torch.float8_e4m3fn if fp8 else q.dtype
    rotated = torch.empty(q.shape, dtype=dtype, device=q.device)
    weights = weights.float() * (heads**-0.5 * INDEX_HEAD_DIM**-0.5)
    step = max(1, TILE_BYTES // (4 * INDEX_HEAD_DIM * heads))
    for first in range(0, tokens, step):
        tile = slice(first, first + step)
        query = _rotate(q[tile], rope, positions[tile], hadamard)
        if fp8:
            query, scale = quantise_ue8m0(query)
            weights[tile] *= scale
        rotated[tile] = query
    return rotated, weights


def apply_rope(x: Tensor, rope: Rope, positions: Tensor, *, out: Tensor | None = None) -> Tensor:
    half = ROPE_DIM // 2
    table = rope.cos_sin_cache[positions].float().view(-1, *(1,) * (x.dim() - 2), ROPE_DIM)
    cos, sin = table[..., :half], table[..., half:]
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rope.interleaved:
        first, second = x[..., 0::2].float(), x[..., 1::2].float()
        out_first, out_second = out[..., 0::2], out[..., 1::2]
    else:
        first, second = x[..., :half].float(), x[..., half:].float()
        out_first, out_second = out[..., :half], out[..., half:]
    out_first.copy_(first * cos - second * sin)
    out_second.copy_(second * cos + first * sin)
    return out


def _rotate(x: Tensor, rope: Rope, positions: Tensor, hadamard: bool) -> Tensor:
    """RoPE on the first 64 of 128, then the Hadamard transform if asked."""
    pe = apply_rope(x[..., :ROPE_DIM], rope, positions)
    x = torch.cat((pe, x[..., ROPE_DIM:]), -1)
    return (x.float() @ hadamard_matrix(x.device)).to(x.dtype) if hadamard else x


@memoise
def hadamard_matrix(device: torch.device) -> Tensor:
    """Sylvester's H_128 * 128^-0.5: symmetric and orthogonal, so it is its own inverse."""
    matrix: Tensor = torch.ones(1, 1, device=device)
    while matrix.shape[0] < INDEX_HEAD_DIM:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix.mul_(INDEX_HEAD_DIM**-0.5)


def _pack_latent(nope: Tensor, pe: Tensor) -> Tensor:
    """[T, 512], [T, 64] -> [T, 656] uint8."""
    blocks = nope.float().unflatten(-1, (LATENT_SCALES, FP8_BLOCK))
    # The floor is on the scale here, on amax in the index cache: vLLM's writers differ so.
    scale = round_up_to_power_of_two(
        (blocks.abs().amax(-1) / FP8_MAX).clamp(min=_LATENT_SCALE_FLOOR)
    )
    value = encode_e4m3(blocks / scale[..., None])
    return torch.cat(
        (
            value.flatten(1).view(torch.uint8),
            scale.view(torch.uint8),
            pe.to(torch.bfloat16).view(torch.uint8),
        ),
        -1,
    )


def _store(slot_mapping: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """cache[slot] = entry for each (cache, entry) pair; slots outside the cache are skipped.

    Without a data-dependent shape, which would sync: a skipped token repeats the write of some
    token that is stored (same place, same bytes, so the order is irrelevant), or, if none is,
    rewrites slot 0 with what it holds.
    """
    blocks, block_size = pairs[0][0].shape[:2]
    stored = (slot_mapping >= 0) & (slot_mapping < blocks * block_size)
    any_stored = stored.any()
    source = torch.where(
        stored, torch.arange(stored.numel(), device=stored.device), stored.int().argmax()
    )
    slots = torch.where(any_stored, slot_mapping[source], 0)
    block, offset = slots // block_size, slots % block_size
    for cache, entry in pairs:
        cache[block, offset] = torch.where(any_stored, entry[source], cache[0, 0])
