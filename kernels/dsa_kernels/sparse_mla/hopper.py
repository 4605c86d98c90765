"""Experimental: sparse_mla in Gluon for chips with wgmma; it has run on none, so no op calls it.

It compiles, and a model of the chip's rules runs it (tests/ops/test_hopper.py);
`benchmarks/kernels.py` is where it runs beside the Triton form, whose launches it takes over.

A program has 64 heads of one row, and tiles of 64 latents in two buffers: while one is multiplied,
the next arrives. Each of two warpgroups computes half of a tile's scores and half of the 512 sums,
so nothing is computed twice; the weights go from one to the other through shared memory. An fp8
tile is decoded while the matrix unit multiplies the one before.

fp8 needs Triton 3.6: 3.9 spills 88 bytes a thread there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsa_kernels.arch import Arch
from dsa_kernels.dims import FP8_BLOCK, KV_LORA_RANK, LATENT_DIM, LATENT_SCALES
from dsa_kernels.launch import Launch
from dsa_kernels.tuning import LaunchConfig

_NOPE = gl.constexpr(KV_LORA_RANK)
_ROPE = gl.constexpr(LATENT_DIM - KV_LORA_RANK)
_GROUP = gl.constexpr(FP8_BLOCK)
_ROPE_BYTE = gl.constexpr(KV_LORA_RANK + 4 * LATENT_SCALES)
_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)
# The peak before any score: finite, so that no difference of two peaks is NaN.
_NO_PEAK = gl.constexpr(-3e38)
_TILE = gl.constexpr(64)
# Layouts fix the warps; copies are pipelined by hand.
_CONFIG = LaunchConfig({}, num_warps=8, num_stages=1)

# What Triton 3.6 calls by other names than 3.9.
_async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def refusal(q: Tensor, cache: Tensor, arch: Arch) -> str:
    """Why this form does not take these arguments of `sparse_mla`; "" if it does."""
    if arch.matrix_instruction != "wgmma":
        return f"{arch.name} has no wgmma"
    if q.dtype != torch.bfloat16:
        return f"queries of {q.dtype}, not bfloat16"
    fp8 = cache.dtype == torch.uint8
    if fp8 and not triton.__version__.startswith("3.6."):
        return f"Triton {triton.__version__} spills with an fp8 cache; 3.6 does not"
    aligned = (cache.stride(0), cache.stride(1), cache.data_ptr())
    if any(value % 16 for value in aligned):
        return "latents that lie at no multiple of 16"
    return ""


def take_over(attend: Launch) -> Launch:
    """What does the same as this first one of kernel.py's `launches`, into as many parts."""
    arguments = dict(attend.arguments)
    del arguments["HAS_E4M3"]
    rows, heads, _ = arguments["q"].shape
    grid = (rows * triton.cdiv(heads, _TILE.value), attend.grid[1])
    return replace(attend, kernel=_attend, grid=grid, arguments=arguments, config=_CONFIG)


@gluon.jit(do_not_specialize=["topk_length", "num_slots", "lse_t", "lse_s"])
def _attend(
    q,
    cache,
    slots,
    topk_length,
    out,
    lse,
    softmax_scale,
    heads,
    k,
    num_slots,
    q_t,
    q_h,
    q_d,
    cache_b,
    cache_t,
    slots_t,
    slots_k,
    out_t,
    out_s,
    out_h,
    out_d,
    lse_t,
    lse_s,
    lse_h,
    BLOCK_SIZE: gl.constexpr,
    FP8: gl.constexpr,
):
    """Grid (rows * blocks of 64 heads, parts of the selection)."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    # A thread gathers 16 bytes of two tokens at a time, 4 tokens' 128 bytes a warp.
    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, GATHER)
    # Two warpgroups: each has half of a tile's scores, and half of the 512 sums.
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    head_blocks = (heads + _TILE - 1) // _TILE
    row = (gl.program_id(0) // head_blocks).to(gl.int64)
    first_head = gl.program_id(0) % head_blocks * _TILE
    split = gl.program_id(1)
    length = k
    if topk_length is not None:
        length = gl.minimum(gl.load(topk_length + row), k).to(gl.int32)
    tiles = (length + _TILE - 1) // _TILE
    splits = gl.num_programs(1)
    per_split = (tiles + splits - 1) // splits * _TILE
    first = split * per_split
    last = gl.minimum(first + per_split, length)
    slots += row * slots_t

    nope_tiles = gl.allocate_shared_memory(DTYPE, [2, _TILE, _NOPE], SHARED)
    rope_tiles = gl.allocate_shared_memory(DTYPE, [2, _TILE, _ROPE], SHARED)
    weight_tile = gl.allocate_shared_memory(DTYPE, [_TILE, _TILE], SHARED)
    # What is added to a key's scores: 0, or -inf where the slot is not valid.
    bias_tiles = gl.allocate_shared_memory(gl.float32, [2, _TILE], FLAT)

    slot = _slots_at(slots, slots_k, first + gl.arange(0, _TILE, ROWS), last)
    valid = (slot >= 0) & (slot < num_slots)
    token = _token(slot, valid, cache_b, cache_t, BLOCK_SIZE)
    bias_tiles.index(0).store(gl.where(valid, 0.0, float("-inf")))
    if FP8:
        raw = _load_raw(cache, token, valid, 0, GATHER)
        more_raw = _load_raw(cache, token, valid, 2, GATHER)
        _copy_rope_fp8(rope_tiles.index(0), cache, token, valid, GATHER)
    else:
        _copy(nope_tiles.index(0), rope_tiles.index(0), cache, token, valid, GATHER)
    async_copy.commit_group()
    slot = _slots_at(slots, slots_k, first + _TILE + gl.arange(0, _TILE, ROWS), last)

    head = first_head + gl.arange(0, _TILE, ROWS)
    q_head, head_mask = q + row * q_t + (head * q_h)[:, None], (head < heads)[:, None]
    dim = gl.arange(0, _NOPE, gl.SliceLayout(0, GATHER))
    rope_dim = gl.arange(0, _ROPE, gl.SliceLayout(0, GATHER))
    q_nope = gl.load(q_head + (dim * q_d)[None, :], mask=head_mask, other=0.0)
    q_rope = gl.load(q_head + ((rope_dim + _NOPE) * q_d)[None, :], mask=head_mask, other=0.0)
    q_nope_tile = gl.allocate_shared_memory(DTYPE, [_TILE, _NOPE], SHARED, q_nope)
    q_rope_tile = gl.allocate_shared_memory(DTYPE, [_TILE, _ROPE], SHARED, q_rope)
    if FP8:
        _decode(nope_tiles.index(0), raw, 0, DTYPE)
        _decode(nope_tiles.index(0), more_raw, 2, DTYPE)

    peak = gl.full([_TILE], _NO_PEAK, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([_TILE, _TILE], gl.float32, SCORES)
    acc = gl.zeros([_TILE, _NOPE], gl.float32, SUMS)
    zero = gl.zeros([_TILE, _TILE], gl.float32, SCORES)
    scale = softmax_scale * _LOG2_E
    turn = 0
    for start in range(first, last, _TILE):
        # Threads see the tile, and the matrix unit what threads stored.
        async_copy.wait_group(0)
        fence_async_shared()
        _barrier()
        scores = _scores(q_nope_tile, q_rope_tile, nope_tiles, rope_tiles, turn, zero)
        ahead = turn ^ 1
        valid = (slot >= 0) & (slot < num_slots)
        token = _token(slot, valid, cache_b, cache_t, BLOCK_SIZE)
        bias_tiles.index(ahead).store(gl.where(valid, 0.0, float("-inf")))
        if FP8:
            raw = _load_raw(cache, token, valid, 0, GATHER)
            _copy_rope_fp8(rope_tiles.index(ahead), cache, token, valid, GATHER)
        else:
            _copy(nope_tiles.index(ahead), rope_tiles.index(ahead), cache, token, valid, GATHER)
        async_copy.commit_group()
        column = start + 2 * _TILE + gl.arange(0, _TILE, ROWS)
        slot = _slots_at(slots, slots_k, column, last)
        key_bias = bias_tiles.index(turn).load(gl.SliceLayout(0, SCORES))
        scores = warpgroup_mma_wait(0, [scores])
        peak, total, rescale, weight = _soften(scores, key_bias, scale, peak, total)
        weight_tile.store(weight.to(DTYPE))
        if FP8:
            more_raw = _load_raw(cache, token, valid, 2, GATHER)
        acc *= gl.convert_layout(rescale, gl.SliceLayout(1, SUMS))[:, None]
        fence_async_shared()
        _barrier()
        acc = warpgroup_mma(weight_tile, nope_tiles.index(turn), acc, is_async=True)
        if FP8:
            _decode(nope_tiles.index(ahead), raw, 0, DTYPE)
            _decode(nope_tiles.index(ahead), more_raw, 2, DTYPE)
        acc = warpgroup_mma_wait(0, [acc])
        turn = ahead

    async_copy.wait_group(0)
    _barrier()
    all_of = gl.sum(total, 1)
    empty = all_of == 0.0
    all_of = gl.where(empty, 1.0, all_of)
    head = first_head + gl.arange(0, _TILE, gl.SliceLayout(1, SCORES))
    natural = gl.where(empty, float("-inf"), (peak + gl.log2(all_of)) * _LN_2)
    gl.store(lse + row * lse_t + split * lse_s + head * lse_h, natural, mask=head < heads)
    share = gl.convert_layout(1.0 / all_of, gl.SliceLayout(1, SUMS))
    value = (acc * share[:, None]).to(out.dtype.element_ty)
    out += row * out_t + split * out_s
    if out.dtype.element_ty == DTYPE:
        # By way of shared memory, for whole sectors.
        staging = nope_tiles.index(0)
        staging.store(value)
        _store(out, staging.load(GATHER), first_head, heads, out_h, out_d, GATHER)
    else:
        _store(out, value, first_head, heads, out_h, out_d, SUMS)


@gluon.jit
def _store(out, value, first_head, heads, out_h, out_d, LAYOUT: gl.constexpr):
    head = first_head + gl.arange(0, _TILE, gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, _NOPE, gl.SliceLayout(0, LAYOUT))
    address = out + (head * out_h)[:, None] + (dim * out_d)[None, :]
    gl.store(address, value, mask=(head < heads)[:, None])


@gluon.jit
def _scores(q_nope, q_rope, nope_tiles, rope_tiles, turn, zero):
    """Two groups of products, not waited for."""
    nope, rope = nope_tiles.index(turn), rope_tiles.index(turn)
    scores = warpgroup_mma(q_nope, nope.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, rope.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _soften(scores, bias, scale, peak, total):
    scores = scores * scale + bias[None, :]
    new_peak = gl.maximum(peak, gl.max(scores, 1))
    weight = gl.exp2(scores - new_peak[:, None])
    rescale = gl.exp2(peak - new_peak)
    return new_peak, total * rescale[:, None] + weight, rescale, weight


@gluon.jit
def _slots_at(slots, slots_k, column, last):
    return gl.load(slots + column * slots_k, mask=column < last, other=-1)


@gluon.jit
def _token(slot, valid, cache_b, cache_t, BLOCK_SIZE: gl.constexpr):
    """Offset of a slot's entry; of slot 0 where it is not valid."""
    slot = gl.where(valid, slot, 0).to(gl.int32)
    return (slot // BLOCK_SIZE).to(gl.int64) * cache_b + slot % BLOCK_SIZE * cache_t


@gluon.jit
def _copy(nope, rope, cache, token, valid, GATHER: gl.constexpr):
    dim = gl.arange(0, _NOPE, gl.SliceLayout(0, GATHER))
    rope_dim = gl.arange(0, _ROPE, gl.SliceLayout(0, GATHER))
    entry = (cache + token)[:, None]
    _async_load(nope, entry + dim[None, :], mask=valid[:, None])
    _async_load(rope, entry + (rope_dim + _NOPE)[None, :], mask=valid[:, None])


@gluon.jit
def _copy_rope_fp8(rope, cache, token, valid, GATHER: gl.constexpr):
    entry = (cache + token + _ROPE_BYTE).to(gl.pointer_type(gl.bfloat16))[:, None]
    dim = gl.arange(0, _ROPE, gl.SliceLayout(0, GATHER))
    _async_load(rope, entry + dim[None, :], mask=valid[:, None])


@gluon.jit
def _load_raw(cache, token, valid, GROUP: gl.constexpr, GATHER: gl.constexpr):
    """Codes and scales of two groups of 128 values, from this one on."""
    entry, mask = cache + token, valid[:, None]
    scales = (entry + _NOPE).to(gl.pointer_type(gl.float32)) + GROUP
    dim = gl.arange(0, _GROUP, gl.SliceLayout(0, GATHER))[None, :]
    entry = (entry + GROUP * _GROUP)[:, None]
    return (
        gl.load(entry + dim, mask=mask, other=0),
        gl.load(entry + (dim + _GROUP), mask=mask, other=0),
        gl.load(scales, mask=valid, other=0.0),
        gl.load(scales + 1, mask=valid, other=0.0),
    )


@gluon.jit
def _decode(nope, raw, GROUP: gl.constexpr, DTYPE: gl.constexpr):
    for index in gl.static_range(2):
        code = raw[index].to(gl.float8e4nv, bitcast=True)
        value = code.to(gl.float32) * raw[index + 2][:, None]
        nope.slice((GROUP + index) * _GROUP, _GROUP, dim=1).store(value.to(DTYPE))
