"""Triton kernels of cache_write.

Values are rounded to the input's dtype after each step, as the reference does. e4m3 is written by
integer arithmetic, the same on every chip: half of them have no such conversion.
"""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_kernels.arch import Arch, arch_of
from dsa_kernels.dims import (
    FP8_BLOCK,
    FP8_MAX,
    INDEX_FP8_BYTES,
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    LATENT_DIM,
    LATENT_FP8_BYTES,
    LATENT_SCALES,
    ROPE_DIM,
)
from dsa_kernels.launch import Launch, launch_config, strides
from dsa_kernels.norm_and_rope import Norm, Rope
from dsa_kernels.primitives import dot, quantise_e4m3, round_to

# fp32's exponent field of the smallest scales: of the scale itself in the latent cache, of
# amax / 448 in the index cache.
_LATENT_FLOOR = tl.constexpr(127 + math.frexp(1e-4)[1])
_INDEX_FLOOR = tl.constexpr(127 + math.frexp(1e-4 / FP8_MAX)[1])
_GROUPS = tl.constexpr(LATENT_SCALES)
_GROUP = tl.constexpr(FP8_BLOCK)
_RANK = tl.constexpr(KV_LORA_RANK)
_ROPE = tl.constexpr(ROPE_DIM)
_HEAD_DIM = tl.constexpr(INDEX_HEAD_DIM)


def latent_cache_write(
    kv: Tensor, norm: Norm, rope: Rope, positions: Tensor, cache: Tensor, slot_mapping: Tensor
) -> None:
    """As the public function."""
    arch = arch_of(kv.device)
    for launch in latent_launches(kv, norm, rope, positions, cache, slot_mapping, arch):
        launch.run()


def index_cache_write(
    k: Tensor,
    norm: Norm,
    rope: Rope,
    positions: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    hadamard: bool,
) -> None:
    """As the public function."""
    arch = arch_of(k.device)
    for launch in index_launches(k, norm, rope, positions, cache, slot_mapping, hadamard, arch):
        launch.run()


def index_query(
    q: Tensor,
    weights: Tensor,
    rope: Rope,
    positions: Tensor,
    hadamard: bool,
    out: Tensor,
    out_weights: Tensor,
) -> None:
    """As the public function, into `out`, in fp8 if that is, and `out_weights`."""
    arch, scaled = arch_of(q.device), (weights, out_weights)
    for launch in query_launches(q, rope, positions, out, arch, hadamard=hadamard, scaled=scaled):
        launch.run()


def apply_rope(x: Tensor, rope: Rope, positions: Tensor, out: Tensor) -> None:
    """As the public function, into `out`; both are [T, heads, 64]."""
    for launch in query_launches(x, rope, positions, out, arch_of(x.device)):
        launch.run()


def latent_launches(
    kv: Tensor,
    norm: Norm,
    rope: Rope,
    positions: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    arch: Arch,
) -> list[Launch]:
    tokens = kv.shape[0]
    if tokens == 0:
        return []
    arguments = {
        "kv": kv,
        "norm_weight": norm.weight.contiguous(),
        "eps": norm.eps,
        **_rotation(rope, positions),
        **_destination(cache, slot_mapping),
        **strides("kv", kv, "td"),
    }
    config = launch_config("cache_write", arch, "latent")
    return [Launch(_write_latent, (tokens,), arguments, config)]


def index_launches(
    k: Tensor,
    norm: Norm,
    rope: Rope,
    positions: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    hadamard: bool,
    arch: Arch,
) -> list[Launch]:
    tokens = k.shape[0]
    if tokens == 0:
        return []
    assert norm.bias is not None
    arguments = {
        "k": k,
        "norm_weight": norm.weight.contiguous(),
        "norm_bias": norm.bias.contiguous(),
        "eps": norm.eps,
        **_rotation(rope, positions),
        **_destination(cache, slot_mapping),
        "num_tokens": tokens,
        **strides("k", k, "td"),
        "INTERLEAVED": rope.interleaved,
        "HADAMARD": hadamard,
    }
    config = launch_config("cache_write", arch, "index")
    grid = (triton.cdiv(tokens, config.blocks["BLOCK_TOKENS"]),)
    return [Launch(_write_index_keys, grid, arguments, config)]


def query_launches(
    x: Tensor,
    rope: Rope,
    positions: Tensor,
    out: Tensor,
    arch: Arch,
    *,
    hadamard: bool = False,
    scaled: tuple[Tensor, Tensor] | None = None,
) -> list[Launch]:
    """`scaled`: the indexer's head weights, and where they go once multiplied."""
    tokens, heads, width = x.shape
    if x.numel() == 0:
        return []
    weights, out_weights = scaled or (None, None)
    fp8 = out.dtype == torch.float8_e4m3fn
    arguments = {
        "x": x,
        "weights": weights,
        "factor": heads**-0.5 * INDEX_HEAD_DIM**-0.5,
        **_rotation(rope, positions),
        "out": out.view(torch.uint8) if fp8 else out,
        "out_weights": out_weights,
        "num_rows": tokens * heads,
        "heads": heads,
        **strides("x", x, "thd"),
        **strides("out", out, "thd"),
        **strides("weights", weights, "th"),
        "WIDTH": width,
        "INTERLEAVED": rope.interleaved,
        "HADAMARD": hadamard,
        "FP8": fp8,
    }
    config = launch_config("cache_write", arch, "query")
    grid = (triton.cdiv(tokens * heads, config.blocks["BLOCK_ROWS"]),)
    return [Launch(_rotate_rows, grid, arguments, config)]


def compile_cases(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """Each kernel for each precision of its input and of its cache, and both styles of RoPE."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = 64
    position, table = meta(tokens, dtype=torch.int64), meta(4096, ROPE_DIM)
    rms, layer = Norm(meta(KV_LORA_RANK), 1e-6), Norm(meta(128), 1e-6, meta(128))
    pairs, halves = Rope(table, interleaved=True), Rope(table, interleaved=False)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q = meta(tokens, 64, INDEX_HEAD_DIM, dtype=dtype)
        scaled = (meta(tokens, 64, dtype=dtype), meta(tokens, 64))
        kv, k = meta(tokens, LATENT_DIM, dtype=dtype), meta(tokens, INDEX_HEAD_DIM, dtype=dtype)
        for fp8 in (True, False):
            name = f"{str(dtype).removeprefix('torch.')} to {'fp8' if fp8 else 'same'}"
            stored = torch.uint8 if fp8 else dtype
            latent = meta(8, 64, LATENT_FP8_BYTES if fp8 else LATENT_DIM, dtype=stored)
            index = meta(8, 64, INDEX_FP8_BYTES if fp8 else INDEX_HEAD_DIM, dtype=stored)
            out = torch.empty_like(q, dtype=torch.float8_e4m3fn if fp8 else dtype)
            rope = halves if fp8 else pairs
            (launch,) = latent_launches(kv, rms, pairs, position, latent, position, arch)
            yield f"latent {name}", launch
            (launch,) = index_launches(k, layer, rope, position, index, position, fp8, arch)
            yield f"index {name}", launch
            (launch,) = query_launches(q, rope, position, out, arch, hadamard=fp8, scaled=scaled)
            yield f"query {name}", launch
        q_pe = q[..., :ROPE_DIM]
        (launch,) = query_launches(q_pe, pairs, position, q_pe, arch)
        yield f"rope {str(dtype).removeprefix('torch.')}", launch


def _rotation(rope: Rope, positions: Tensor) -> dict[str, Any]:
    return {
        "positions": positions.contiguous(),
        "cos_sin": rope.cos_sin_cache,
        **strides("cos_sin", rope.cos_sin_cache, "pd"),
    }


def _destination(cache: Tensor, slot_mapping: Tensor) -> dict[str, Any]:
    blocks, block_size, _ = cache.shape
    return {
        "cache": cache,
        "slot_mapping": slot_mapping.contiguous(),
        "num_slots": blocks * block_size,
        **strides("cache", cache, "bt"),
        "BLOCK_SIZE": block_size,
        "FP8": cache.dtype == torch.uint8,
    }


@triton.jit(do_not_specialize=["num_slots"])
def _write_latent(
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
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if (slot < 0) | (slot >= num_slots):
        return
    page, offset = _page(cache, slot, cache_b, BLOCK_SIZE)
    entry = page + offset * cache_t
    DTYPE: tl.constexpr = kv.dtype.element_ty
    kv += token * kv_t

    group, dim = tl.arange(0, _GROUPS)[:, None], tl.arange(0, _GROUP)[None, :]
    dim = group * _GROUP + dim
    nope = tl.load(kv + dim * kv_d).to(tl.float32)
    mean = tl.sum(tl.sum(nope * nope, 1), 0) / _RANK
    nope = nope * tl.rsqrt(mean + eps) * tl.load(norm_weight + dim).to(tl.float32)
    nope = round_to(nope, DTYPE).to(tl.float32)

    dim_pe = tl.arange(0, _ROPE)
    address = kv + _RANK * kv_d
    rope = tl.load(address + dim_pe * kv_d).to(tl.float32)
    partner = tl.load(address + (dim_pe ^ 1) * kv_d).to(tl.float32)
    row = cos_sin + tl.load(positions + token).to(tl.int64) * cos_sin_p
    rope = round_to(_rope(rope, partner, dim_pe, row, cos_sin_d, True), DTYPE).to(tl.float32)

    if FP8:
        code, scale = quantise_e4m3(nope, _LATENT_FLOOR)
        tl.store(entry + dim, code)
        scales = (entry + _RANK).to(tl.pointer_type(tl.float32))
        tl.store(scales + tl.arange(0, _GROUPS), scale)
        pe = (entry + _RANK + 4 * _GROUPS).to(tl.pointer_type(tl.bfloat16))
        tl.store(pe + dim_pe, round_to(rope, tl.bfloat16))
    else:
        tl.store(entry + dim, round_to(nope, cache.dtype.element_ty))
        tl.store(entry + _RANK + dim_pe, round_to(rope, cache.dtype.element_ty))


@triton.jit(do_not_specialize=["num_slots", "num_tokens"])
def _write_index_keys(
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
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = token < num_tokens
    slot = tl.load(slot_mapping + token, mask=is_token, other=-1)
    stored = (slot >= 0) & (slot < num_slots)
    page, offset = _page(cache, tl.where(stored, slot, 0), cache_b, BLOCK_SIZE)
    DTYPE: tl.constexpr = k.dtype.element_ty

    dim = tl.arange(0, _HEAD_DIM)
    other = dim ^ (1 if INTERLEAVED else _ROPE // 2)
    row, mask = k + token[:, None] * k_t, is_token[:, None]
    key = tl.load(row + dim[None, :] * k_d, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(row + other[None, :] * k_d, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(key, 1) / _HEAD_DIM
    centred = key - mean[:, None]
    deviation = tl.rsqrt(tl.sum(centred * centred, 1) / _HEAD_DIM + eps)
    key = _normed(key, mean, deviation, norm_weight + dim, norm_bias + dim, DTYPE)
    partner = _normed(partner, mean, deviation, norm_weight + other, norm_bias + other, DTYPE)

    position = tl.load(positions + token, mask=is_token, other=0).to(tl.int64)
    angles = cos_sin + position[:, None] * cos_sin_p
    key = _rope(key, partner, dim[None, :], angles, cos_sin_d, INTERLEAVED)
    key = round_to(key, DTYPE).to(tl.float32)
    if HADAMARD:
        key = round_to(_hadamard(key, DTYPE), DTYPE).to(tl.float32)

    if FP8:
        code, scale = quantise_e4m3(key, _INDEX_FLOOR)
        address = page[:, None] + offset[:, None] * _HEAD_DIM + dim[None, :]
        tl.store(address, code, mask=stored[:, None])
        scales = (page + BLOCK_SIZE * _HEAD_DIM).to(tl.pointer_type(tl.float32))
        tl.store(scales + offset, scale, mask=stored)
    else:
        address = page[:, None] + offset[:, None] * cache_t + dim[None, :]
        tl.store(address, round_to(key, cache.dtype.element_ty), mask=stored[:, None])


@triton.jit(do_not_specialize=["positions", "num_rows"])
def _rotate_rows(
    x,
    weights,
    factor,
    positions,
    cos_sin,
    out,
    out_weights,
    num_rows,
    heads,
    x_t,
    x_h,
    x_d,
    out_t,
    out_h,
    out_d,
    weights_t,
    weights_h,
    cos_sin_p,
    cos_sin_d,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HADAMARD: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Some rows, a head of a token each: RoPE of the first 64 values, and what index_query adds."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    token, head = row // heads, row % heads
    DTYPE: tl.constexpr = x.dtype.element_ty

    dim = tl.arange(0, WIDTH)
    other = dim ^ (1 if INTERLEAVED else _ROPE // 2)
    source, mask = x + (token * x_t + head * x_h)[:, None], is_row[:, None]
    value = tl.load(source + dim[None, :] * x_d, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(source + other[None, :] * x_d, mask=mask, other=0.0).to(tl.float32)
    position = tl.load(positions + token, mask=is_row, other=0).to(tl.int64)
    angles = cos_sin + position[:, None] * cos_sin_p
    value = _rope(value, partner, dim[None, :], angles, cos_sin_d, INTERLEAVED)
    value = round_to(value, DTYPE).to(tl.float32)
    if HADAMARD:
        value = round_to(_hadamard(value, DTYPE), DTYPE).to(tl.float32)

    address = out + (token * out_t + head * out_h)[:, None] + dim[None, :] * out_d
    weight = tl.full((BLOCK_ROWS,), factor, tl.float32)
    if weights is not None:
        source = weights + token * weights_t + head * weights_h
        weight *= tl.load(source, mask=is_row, other=0.0).to(tl.float32)
    if FP8:
        code, scale = quantise_e4m3(value, _INDEX_FLOOR)
        tl.store(address, code, mask=mask)
        weight *= scale
    else:
        tl.store(address, round_to(value, DTYPE), mask=mask)
    if weights is not None:
        tl.store(out_weights + row, weight, mask=is_row)


@triton.jit
def _page(cache, slot, cache_b, BLOCK_SIZE: tl.constexpr):
    """Where a slot's page starts, and which of the page's tokens the slot is."""
    slot = slot.to(tl.int64)
    return cache + slot // BLOCK_SIZE * cache_b, slot % BLOCK_SIZE


@triton.jit
def _normed(x, mean, deviation, weight, bias, DTYPE: tl.constexpr):
    weight, bias = tl.load(weight).to(tl.float32), tl.load(bias).to(tl.float32)
    x = (x - mean[:, None]) * deviation[:, None] * weight[None, :] + bias[None, :]
    return round_to(x, DTYPE).to(tl.float32)


@triton.jit
def _rope(x, partner, dim, angles, cos_sin_d, INTERLEAVED: tl.constexpr):
    """Rotate the pairs (x, partner) of the first 64 values; dim: which value x is."""
    if INTERLEAVED:
        pair, first = dim // 2, dim % 2 == 0
    else:
        pair, first = dim % (_ROPE // 2), dim < _ROPE // 2
    rotated = dim < _ROPE
    cos = tl.load(angles + pair * cos_sin_d, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(angles + (pair + _ROPE // 2) * cos_sin_d, mask=rotated, other=0.0)
    turned = x * cos + tl.where(first, -partner, partner) * sin.to(tl.float32)
    return tl.where(rotated, turned, x)


@triton.jit
def _hadamard(x, DTYPE: tl.constexpr):
    """x [rows, 128] fp32 that holds values of DTYPE -> x . H_128 * 128^-0.5, summed in fp32."""
    line = tl.arange(0, _HEAD_DIM)
    # The sign of H[i, j] is the parity of i & j.
    parity = line[:, None] & line[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    sign = (1 - 2 * (parity & 1)).to(tl.float32)
    if tl.float32 == DTYPE:
        # Three bf16 hold all of an fp32, and no chip has room for the matrix in fp32.
        sign = sign.to(tl.bfloat16)
        high = round_to(x, tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = round_to(rest, tl.bfloat16)
        low = round_to(rest - middle.to(tl.float32), tl.bfloat16)
        product = dot(high, sign, dot(middle, sign, dot(low, sign)))
    else:
        product = dot(round_to(x, DTYPE), sign.to(DTYPE))
    return product * _HEAD_DIM**-0.5
