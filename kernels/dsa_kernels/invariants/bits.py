"""Device functions of the checks: entries of either cache, and rows of tensors, as bits."""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from dsa_kernels.dims import INDEX_HEAD_DIM, KV_LORA_RANK, LATENT_SCALES, ROPE_DIM

_RANK = tl.constexpr(KV_LORA_RANK)
_SCALES = tl.constexpr(LATENT_SCALES)
_ROPE = tl.constexpr(ROPE_DIM)
_HEAD_DIM = tl.constexpr(INDEX_HEAD_DIM)

# Bits without the sign, of the greatest that are no NaN.
E4M3 = tl.constexpr(0x7E)
FLOAT16 = tl.constexpr(0x7C00)
BFLOAT16 = tl.constexpr(0x7F80)
FLOAT32 = tl.constexpr(0x7F800000)


@triton.jit
def fill_latent(entry, FP8: tl.constexpr):
    """Ones into each bit of the latent at `entry`, bits of its dtype."""
    if FP8:
        words = entry.to(tl.pointer_type(tl.int32))
        _fill(words, _RANK // 4)
        _fill(words + _RANK // 4, _SCALES)
        _fill(words + _RANK // 4 + _SCALES, _ROPE // 2)
    else:
        _fill(entry, _RANK)
        _fill(entry + _RANK, _ROPE)


@triton.jit
def fill_key(cache, block, offset, cache_b, cache_t, BLOCK_SIZE: tl.constexpr, FP8: tl.constexpr):
    """The same of an index key."""
    page = cache + block * cache_b
    if FP8:
        words = page.to(tl.pointer_type(tl.int32))
        _fill(words + offset * (_HEAD_DIM // 4), _HEAD_DIM // 4)
        _fill(words + BLOCK_SIZE * (_HEAD_DIM // 4) + offset, 1)
    else:
        _fill(page + offset * cache_t, _HEAD_DIM)


@triton.jit
def _fill(address, COUNT: tl.constexpr):
    tl.store(address + tl.arange(0, COUNT), tl.full((COUNT,), -1, address.dtype.element_ty))


@triton.jit
def look_at_latent(entry, GREATEST: tl.constexpr, FP8: tl.constexpr):
    """Whether each bit of the latent at `entry` is one, and whether a value is NaN."""
    one = tl.arange(0, 1)
    entry, here = entry + one, one == 0
    if FP8:
        scales = (entry + _RANK).to(tl.pointer_type(tl.int32))
        rope = (entry + _RANK + 4 * _SCALES).to(tl.pointer_type(tl.int16))
        filled, nan = _look(entry, here, _RANK, E4M3)
        of_scales, nan_scales = _look(scales, here, _SCALES, FLOAT32)
        of_rope, nan_rope = _look(rope, here, _ROPE, BFLOAT16)
        filled, nan = filled & of_scales, nan | nan_scales
    else:
        filled, nan = _look(entry, here, _RANK, GREATEST)
        of_rope, nan_rope = _look(entry + _RANK, here, _ROPE, GREATEST)
    return tl.min(filled & of_rope, 0) != 0, tl.max(nan | nan_rope, 0) != 0


@triton.jit
def look_at_keys(
    cache,
    block,
    offset,
    here,
    cache_b,
    cache_t,
    BLOCK_SIZE: tl.constexpr,
    GREATEST: tl.constexpr,
    FP8: tl.constexpr,
):
    """Of index keys [n] of a block: whether each bit is one, and whether one is NaN, 1 or 0.

    Where they are not `here`, they are neither looked at nor NaN.
    """
    page = cache + block * cache_b
    if FP8:
        scales = (page + BLOCK_SIZE * _HEAD_DIM).to(tl.pointer_type(tl.int32))
        filled, nan = _look(page + offset * _HEAD_DIM, here, _HEAD_DIM, E4M3)
        of_scale, nan_scale = _look(scales + offset, here, 1, FLOAT32)
        filled, nan = filled & of_scale, nan | nan_scale
    else:
        filled, nan = _look(page + offset * cache_t, here, _HEAD_DIM, GREATEST)
    return filled, nan


@triton.jit
def _look(address, here, COUNT: tl.constexpr, GREATEST: tl.constexpr):
    """Of runs of values at address [n]."""
    bits = tl.load(address[:, None] + tl.arange(0, COUNT)[None, :], mask=here[:, None], other=0)
    return tl.min((bits == -1).to(tl.int32), 1), tl.max(is_nan(bits, GREATEST).to(tl.int32), 1)


@triton.jit
def is_nan(bits, GREATEST: tl.constexpr):
    """Of signed integers as wide as the values."""
    SIGN: tl.constexpr = 1 << (bits.dtype.primitive_bitwidth - 1)
    return (bits & (SIGN - 1)) > GREATEST


@triton.jit
def has_nan(
    row,
    heads,
    width,
    row_h,
    row_d,
    GREATEST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Whether a row of bits [heads, width] holds a NaN."""
    dim, found = tl.arange(0, WIDTH)[None, :], 0
    for first in range(0, heads, BLOCK_HEADS):
        head = first + tl.arange(0, BLOCK_HEADS)[:, None]
        address = row + head.to(tl.int64) * row_h + dim * row_d
        bits = tl.load(address, mask=(head < heads) & (dim < width), other=0)
        found = tl.maximum(found, tl.max(tl.max(is_nan(bits, GREATEST).to(tl.int32), 1), 0))
    return found != 0
