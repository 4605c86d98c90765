"""What a program of cache_write's kernel does for each op: device functions.

RoPE's partners and the Hadamard transform come from shuffles within the rows that a program holds.
"""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from dsa_kernels.dims import (
    FP8_BLOCK,
    FP8_MAX,
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    LATENT_SCALES,
    ROPE_DIM,
)
from dsa_kernels.primitives import quantise_e4m3, round_to

# fp32's exponent field of the smallest scales: of the scale itself in the latent cache, of
# amax / 448 in the index cache.
_LATENT_FLOOR = tl.constexpr(127 + math.frexp(1e-4)[1])
_INDEX_FLOOR = tl.constexpr(127 + math.frexp(1e-4 / FP8_MAX)[1])
_GROUPS = tl.constexpr(LATENT_SCALES)
_GROUP = tl.constexpr(FP8_BLOCK)
_RANK = tl.constexpr(KV_LORA_RANK)
_ROPE = tl.constexpr(ROPE_DIM)
_HEAD_DIM = tl.constexpr(INDEX_HEAD_DIM)


@triton.jit
def write_latent(
    program,
    kv,
    norm_weight,
    eps,
    positions,
    cos_sin,
    cache,
    slot_mapping,
    num_slots,
    kv_t,
    kv_d,
    cos_sin_p,
    cos_sin_d,
    cache_b,
    cache_t,
    BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr,
):
    """One token: RMSNorm of the first 512 values, RoPE of the last 64."""
    token = program.to(tl.int64) + tl.arange(0, 1)
    DTYPE: tl.constexpr = kv.dtype.element_ty
    slot, stored = _slot(slot_mapping + token, token >= 0, num_slots)
    page, offset = _page(cache, slot, cache_b, BLOCK_SIZE)
    kv, entry = (kv + token * kv_t)[:, None], (page + offset * cache_t)[:, None]
    mask = stored[:, None]

    group, dim = tl.arange(0, _GROUPS)[:, None], tl.arange(0, _GROUP)[None, :]
    dim = group * _GROUP + dim
    nope = tl.load(kv + dim * kv_d).to(tl.float32)
    mean = tl.sum(tl.sum(nope * nope, 1), 0) / _RANK
    nope = nope * tl.rsqrt(mean + eps) * tl.load(norm_weight + dim).to(tl.float32)
    nope = round_to(nope, DTYPE).to(tl.float32)

    dim_pe = tl.arange(0, _ROPE)[None, :]
    pe = tl.load(kv + _RANK * kv_d + dim_pe * kv_d).to(tl.float32)
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * cos_sin_p
    pe = _rope(pe, angles[:, None], cos_sin_d, True)
    pe = round_to(pe, DTYPE).to(tl.float32)

    if FP8:
        code, scale = quantise_e4m3(nope, _LATENT_FLOOR)
        tl.store(entry + dim, code, mask=mask)
        scales = (entry + _RANK).to(tl.pointer_type(tl.float32))
        tl.store(scales + group, scale[:, None], mask=mask)
        rest = (entry + _RANK + 4 * _GROUPS).to(tl.pointer_type(tl.bfloat16))
        tl.store(rest + dim_pe, round_to(pe, tl.bfloat16), mask=mask)
    else:
        tl.store(entry + dim, round_to(nope, cache.dtype.element_ty), mask=mask)
        tl.store(entry + _RANK + dim_pe, round_to(pe, cache.dtype.element_ty), mask=mask)


@triton.jit
def write_keys(
    program,
    k,
    norm_weight,
    norm_bias,
    eps,
    positions,
    cos_sin,
    cache,
    slot_mapping,
    num_slots,
    num_tokens,
    k_t,
    k_d,
    cos_sin_p,
    cos_sin_d,
    cache_b,
    cache_t,
    BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HADAMARD: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Some tokens: LayerNorm, RoPE of the first 64 values, the Hadamard transform."""
    token = program.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = token < num_tokens
    DTYPE: tl.constexpr = k.dtype.element_ty
    slot, stored = _slot(slot_mapping + token, is_token, num_slots)
    page, offset = _page(cache, slot, cache_b, BLOCK_SIZE)

    dim = tl.arange(0, _HEAD_DIM)
    address = k + token[:, None] * k_t + dim[None, :] * k_d
    key = tl.load(address, mask=is_token[:, None], other=0.0).to(tl.float32)
    centred = key - tl.sum(key, 1)[:, None] / _HEAD_DIM
    deviation = tl.rsqrt(tl.sum(centred * centred, 1) / _HEAD_DIM + eps)
    weight = tl.load(norm_weight + dim).to(tl.float32)
    bias = tl.load(norm_bias + dim).to(tl.float32)
    key = centred * deviation[:, None] * weight[None, :] + bias[None, :]
    key = round_to(key, DTYPE).to(tl.float32)

    position = tl.load(positions + token, mask=is_token, other=0).to(tl.int64)
    key = _rope(key, cos_sin + position[:, None] * cos_sin_p, cos_sin_d, INTERLEAVED)
    key = round_to(key, DTYPE).to(tl.float32)
    if HADAMARD:
        key = round_to(_hadamard(key), DTYPE).to(tl.float32)

    mask = stored[:, None]
    if FP8:
        code, scale = quantise_e4m3(key, _INDEX_FLOOR)
        tl.store(page[:, None] + offset[:, None] * _HEAD_DIM + dim[None, :], code, mask=mask)
        scales = (page + BLOCK_SIZE * _HEAD_DIM).to(tl.pointer_type(tl.float32))
        tl.store(scales + offset, scale, mask=stored)
    else:
        address = page[:, None] + offset[:, None] * cache_t + dim[None, :]
        tl.store(address, round_to(key, cache.dtype.element_ty), mask=mask)


@triton.jit
def rotate_heads(
    program,
    x,
    weights,
    factor,
    positions,
    cos_sin,
    out,
    out_weights,
    heads,
    x_t,
    x_h,
    x_d,
    weights_t,
    weights_h,
    cos_sin_p,
    cos_sin_d,
    out_t,
    out_h,
    out_d,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HADAMARD: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Some heads of one token: RoPE of the first 64 values, and what index_query adds."""
    groups = tl.cdiv(heads, BLOCK_HEADS)
    token = (program // groups).to(tl.int64)
    head = (program % groups).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_head = head < heads
    DTYPE: tl.constexpr = x.dtype.element_ty

    dim, mask = tl.arange(0, WIDTH)[None, :], is_head[:, None]
    address = x + token * x_t + head[:, None] * x_h + dim * x_d
    value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * cos_sin_p
    value = round_to(_rope(value, angles, cos_sin_d, INTERLEAVED), DTYPE).to(tl.float32)
    if HADAMARD:
        value = round_to(_hadamard(value), DTYPE).to(tl.float32)

    address = out + token * out_t + head[:, None] * out_h + dim * out_d
    scale = tl.full((BLOCK_HEADS,), factor, tl.float32)
    if FP8:
        code, fp8_scale = quantise_e4m3(value, _INDEX_FLOOR)
        tl.store(address, code, mask=mask)
        scale *= fp8_scale
    else:
        tl.store(address, round_to(value, DTYPE), mask=mask)
    if weights is not None:
        source = weights + token * weights_t + head * weights_h
        weight = tl.load(source, mask=is_head, other=0.0).to(tl.float32)
        tl.store(out_weights + token * heads + head, weight * scale, mask=is_head)


@triton.jit
def _slot(address, mask, num_slots):
    """A slot, 0 where it is none of the cache's, and whether it is."""
    slot = tl.load(address, mask=mask, other=-1)
    stored = (slot >= 0) & (slot < num_slots)
    return tl.where(stored, slot, 0).to(tl.int64), stored


@triton.jit
def _page(cache, slot, cache_b, BLOCK_SIZE: tl.constexpr):
    """Where a slot's page starts, and which of the page's tokens the slot is."""
    return cache + slot // BLOCK_SIZE * cache_b, slot % BLOCK_SIZE


@triton.jit
def _rope(x, angles, cos_sin_d, INTERLEAVED: tl.constexpr):
    """Rotate the first 64 values of rows x [rows, n]; angles: of each row, [rows, 1], or of all."""
    dim = tl.arange(0, x.shape[1])[None, :]
    if INTERLEAVED:
        partner = _swapped(x, 1)
        pair, first = dim // 2, dim % 2 == 0
    else:
        partner = _swapped(x, _ROPE // 2)
        pair, first = dim % (_ROPE // 2), dim < _ROPE // 2
    rotated = dim < _ROPE
    cos = tl.load(angles + pair * cos_sin_d, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(angles + (pair + _ROPE // 2) * cos_sin_d, mask=rotated, other=0.0)
    sin = tl.where(first, -sin.to(tl.float32), sin.to(tl.float32))
    turned = x * cos + partner * sin
    return tl.where(rotated, turned, x)


@triton.jit
def _hadamard(x):
    """x [rows, 128] fp32 -> x . H_128 * 128^-0.5, summed in fp32: sums and differences of pairs."""
    dim = tl.arange(0, _HEAD_DIM)[None, :]
    for stage in tl.static_range(7):
        sign = tl.where((dim >> stage) & 1 == 0, 1.0, -1.0)
        x = x * sign + _swapped(x, 1 << stage)
    return x * _HEAD_DIM**-0.5


@triton.jit
def _swapped(x, STEP: tl.constexpr):
    """x [rows, n] fp32 with the values i and i ^ STEP of each row in each other's place.

    A thread has its partner's bits by a shuffle: the sum of both, less its own.
    """
    pairs = tl.reshape(x.to(tl.int32, bitcast=True), (x.numel // (2 * STEP), 2, STEP))
    swapped = tl.sum(pairs, 1, keep_dims=True) - pairs
    return tl.reshape(swapped, x.shape).to(tl.float32, bitcast=True)
