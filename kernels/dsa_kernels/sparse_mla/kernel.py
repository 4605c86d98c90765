"""sparse_mla in Triton: a program attends a block of heads of one row to a part of its selection.

FlashAttention's online softmax (arXiv 2205.14135) over gathered latents. Small batches are split
over the selection (Flash-Decoding), and a second kernel merges the parts by their lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_kernels.arch import Arch, arch_of
from dsa_kernels.dims import FP8_BLOCK, KV_LORA_RANK, LATENT_DIM, LATENT_FP8_BYTES, LATENT_SCALES
from dsa_kernels.launch import Launch, check_near_heads, launch_config, strides
from dsa_kernels.primitives import decode_e4m3, dot, round_to
from dsa_kernels.tuning import LaunchConfig

_MAX_SPLITS = tl.constexpr(64)
_NOPE = tl.constexpr(KV_LORA_RANK)
_ROPE = tl.constexpr(LATENT_DIM - KV_LORA_RANK)
_GROUP = tl.constexpr(FP8_BLOCK)
_ROPE_BYTE = tl.constexpr(KV_LORA_RANK + 4 * LATENT_SCALES)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# The peak before any score: finite, so that no difference of two peaks is NaN.
_NO_PEAK = tl.constexpr(-3e38)


def sparse_mla(
    q: Tensor,
    cache: Tensor,
    slots: Tensor,
    topk_length: Tensor | None,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """As `dsa_kernels.sparse_mla.sparse_mla`, on arguments that it has checked."""
    arch = arch_of(q.device)
    for launch in launches(q, cache, slots, topk_length, softmax_scale, out, lse, arch):
        launch.run()


def launches(
    q: Tensor,
    cache: Tensor,
    slots: Tensor,
    topk_length: Tensor | None,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor,
    arch: Arch,
) -> list[Launch]:
    """One launch where the rows fill the chip, else one over parts and one that merges them.

    Shape keys: `shape_key`'s, "float32" queries, "merge".
    """
    rows, heads, _ = q.shape
    k = slots.shape[1]
    if rows == 0 or heads == 0:
        return []
    check_near_heads(q=q, out=out, lse=lse)
    fp8 = cache.dtype == torch.uint8
    wide = launch_config("sparse_mla", arch, ("float", 64))
    key = shape_key(rows, heads, k, fp8, arch, wide)
    config = launch_config("sparse_mla", arch, "float32" if q.dtype == torch.float32 else key)
    programs = rows * triton.cdiv(heads, config.blocks["BLOCK_H"])
    # The registers of an SM have room for 256 threads of these kernels.
    places = arch.num_sms * max(1, 256 // (config.num_warps * arch.warp_size))
    splits = _splits(programs, triton.cdiv(k, config.blocks["BLOCK_K"]), places)
    part_out, part_lse = out[:, None], lse[:, None]
    if splits > 1:
        part_out = torch.empty(
            rows, splits, heads, KV_LORA_RANK, dtype=torch.float32, device=q.device
        )
        part_lse = torch.empty(rows, splits, heads, dtype=torch.float32, device=q.device)
    attend = Launch(
        _attend,
        (programs, splits),
        {
            "q": q,
            "cache": cache,
            "slots": slots,
            "topk_length": topk_length if topk_length is None else topk_length.contiguous(),
            "out": part_out,
            "lse": part_lse,
            "softmax_scale": softmax_scale,
            "heads": heads,
            "k": k,
            "num_slots": cache.shape[0] * cache.shape[1],
            **strides("q", q, "thd"),
            **strides("cache", cache, "bt"),
            **strides("slots", slots, "tk"),
            **strides("out", part_out, "tshd"),
            **strides("lse", part_lse, "tsh"),
            "BLOCK_SIZE": cache.shape[1],
            "FP8": fp8,
            "HAS_E4M3": arch.has_e4m3,
        },
        config,
    )
    if splits == 1:
        return [attend]
    config = launch_config("sparse_mla", arch, "merge")
    merge = Launch(
        _merge,
        (rows * heads, KV_LORA_RANK // config.blocks["BLOCK_D"]),
        {
            "part_out": part_out,
            "part_lse": part_lse,
            "out": out,
            "lse": lse,
            "heads": heads,
            "splits": splits,
            **strides("out", out, "thd"),
            **strides("lse", lse, "th"),
        },
        config,
    )
    return [attend, merge]


def shape_key(
    rows: int, heads: int, k: int, fp8: bool, arch: Arch, wide: LaunchConfig
) -> tuple[str, int]:
    """("float" or "fp8" cache, heads that a program may take: up to 16, 32 or 64).

    Where 64 of rows so few would leave half the chip without a tile, up to 32: other programs take
    the rest of them. Not of fp8 latents, which each program would decode anew.

    Args:
        wide: the configuration of ("float", 64).
    """
    block = min(64, max(16, triton.next_power_of_2(heads)))
    if fp8:
        return "fp8", block
    tiles = min(triton.cdiv(k, wide.blocks["BLOCK_K"]), _MAX_SPLITS.value)
    few = 2 * rows * triton.cdiv(heads, wide.blocks["BLOCK_H"]) * tiles <= arch.num_sms
    return "float", min(block, 32) if few else block


@cache
def _splits(programs: int, tiles: int, places: int) -> int:
    """Parts of a row's selection, none without a tile: those that take least time, in tiles.

    Programs run in waves of `places`. Each takes two tiles' time to start and to end, of a part
    two more: its result is float32, is written, and is merged.
    """
    best, least = 1, tiles + 2
    if programs >= places:
        return best
    for parts in range(2, min(tiles, _MAX_SPLITS.value) + 1):
        per_part = triton.cdiv(tiles, parts)
        time = triton.cdiv(programs * parts, places) * (per_part + 4)
        if triton.cdiv(tiles, per_part) == parts and time < least:
            best, least = parts, time
    return best


def compile_cases(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """Every dtype of queries, kind of cache and block of heads; prefill, and a split decode."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for kind in ("float", "fp8"):
            for heads in (16, 32, 128):
                for launch in _meta_launches(4096, heads, dtype, kind == "fp8", arch):
                    yield f"prefill {name}, {kind} cache, {heads} heads", launch
        for launch in _meta_launches(1, 16, dtype, dtype == torch.bfloat16, arch):
            step = "merge" if launch.kernel is _merge else "decode"
            yield f"{step} {name}, split, 16 heads", launch


def _meta_launches(
    rows: int, heads: int, dtype: torch.dtype, fp8: bool, arch: Arch
) -> list[Launch]:
    with torch.device("meta"):
        width, cache_dtype = (LATENT_FP8_BYTES, torch.uint8) if fp8 else (LATENT_DIM, dtype)
        return launches(
            torch.empty(rows, heads, LATENT_DIM, dtype=dtype),
            torch.empty(1024, 64, width, dtype=cache_dtype),
            torch.empty(rows, 2048, dtype=torch.int64),
            torch.empty(rows, dtype=torch.int32),
            0.1,
            torch.empty(rows, heads, KV_LORA_RANK, dtype=dtype),
            torch.empty(rows, heads),
            arch,
        )


@triton.jit(do_not_specialize=["topk_length", "num_slots", "lse_t", "lse_s"])
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
    BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (rows * blocks of heads, parts of the selection)."""
    # Blocks of heads of one row are neighbours: they gather the same latents through L2.
    head_blocks = tl.cdiv(heads, BLOCK_H)
    row = (tl.program_id(0) // head_blocks).to(tl.int64)
    head = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(1)
    real_head = head < heads

    length = k
    if topk_length is not None:
        length = tl.minimum(tl.load(topk_length + row), k).to(tl.int32)
    per_split = tl.cdiv(tl.cdiv(length, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    first = split * per_split
    last = tl.minimum(first + per_split, length)

    # Four groups of 128, each with its own scale in fp8, keep few addresses in registers.
    dim, rope_dim = tl.arange(0, _GROUP), tl.arange(0, _ROPE)
    q_head, head_mask = q + row * q_t + head[:, None] * q_h, real_head[:, None]
    q0 = tl.load(q_head + dim[None, :] * q_d, mask=head_mask, other=0.0)
    q1 = tl.load(q_head + (dim + _GROUP)[None, :] * q_d, mask=head_mask, other=0.0)
    q2 = tl.load(q_head + (dim + 2 * _GROUP)[None, :] * q_d, mask=head_mask, other=0.0)
    q3 = tl.load(q_head + (dim + 3 * _GROUP)[None, :] * q_d, mask=head_mask, other=0.0)
    q_rope = tl.load(q_head + (rope_dim + _NOPE)[None, :] * q_d, mask=head_mask, other=0.0)

    peak = tl.full([BLOCK_H], _NO_PEAK, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc0 = tl.zeros([BLOCK_H, _GROUP], tl.float32)
    acc1 = tl.zeros([BLOCK_H, _GROUP], tl.float32)
    acc2 = tl.zeros([BLOCK_H, _GROUP], tl.float32)
    acc3 = tl.zeros([BLOCK_H, _GROUP], tl.float32)
    # Slots are read one tile ahead, by hand, so that Triton's pipeline may hold the gather alone.
    column = first + tl.arange(0, BLOCK_K)
    slot = tl.load(slots + row * slots_t + column * slots_k, mask=column < last, other=-1)
    for _ in range(first, last, BLOCK_K):
        column += BLOCK_K
        ahead = tl.load(slots + row * slots_t + column * slots_k, mask=column < last, other=-1)
        valid = (slot >= 0) & (slot < num_slots)
        slot = tl.where(valid, slot, 0).to(tl.int32)
        token = (slot // BLOCK_SIZE).to(tl.int64) * cache_b + slot % BLOCK_SIZE * cache_t
        nope0 = load_nope(cache, token, valid, 0, q.dtype.element_ty, FP8, HAS_E4M3)
        nope1 = load_nope(cache, token, valid, 1, q.dtype.element_ty, FP8, HAS_E4M3)
        nope2 = load_nope(cache, token, valid, 2, q.dtype.element_ty, FP8, HAS_E4M3)
        nope3 = load_nope(cache, token, valid, 3, q.dtype.element_ty, FP8, HAS_E4M3)
        rope = load_rope(cache, token, valid, q.dtype.element_ty, FP8)

        scores = dot(q0, tl.trans(nope0))
        scores = dot(q1, tl.trans(nope1), scores)
        scores = dot(q2, tl.trans(nope2), scores)
        scores = dot(q3, tl.trans(nope3), scores)
        scores = dot(q_rope, tl.trans(rope), scores)
        scores = tl.where(valid[None, :], scores * (softmax_scale * _LOG2_E), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weight = tl.exp2(scores - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(weight, 1)
        peak = new_peak
        weight = round_to(weight, nope0.dtype)
        acc0 = dot(weight, nope0, acc0 * rescale[:, None])
        acc1 = dot(weight, nope1, acc1 * rescale[:, None])
        acc2 = dot(weight, nope2, acc2 * rescale[:, None])
        acc3 = dot(weight, nope3, acc3 * rescale[:, None])
        slot = ahead

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    share = (1.0 / total)[:, None]
    out_head = out + row * out_t + split * out_s + head[:, None] * out_h
    dtype = out.dtype.element_ty
    tl.store(out_head + dim[None, :] * out_d, round_to(acc0 * share, dtype), mask=head_mask)
    tl.store(
        out_head + (dim + _GROUP)[None, :] * out_d, round_to(acc1 * share, dtype), mask=head_mask
    )
    tl.store(
        out_head + (dim + 2 * _GROUP)[None, :] * out_d,
        round_to(acc2 * share, dtype),
        mask=head_mask,
    )
    tl.store(
        out_head + (dim + 3 * _GROUP)[None, :] * out_d,
        round_to(acc3 * share, dtype),
        mask=head_mask,
    )
    natural = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * _LN_2)
    tl.store(lse + row * lse_t + split * lse_s + head * lse_h, natural, mask=real_head)


@triton.jit
def load_nope(
    cache,
    token,
    valid,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    FP8: tl.constexpr,
    HAS_E4M3: tl.constexpr,
):
    """A group of 128 of the 512 values of the tokens at these offsets, zeros where not valid."""
    entry = cache + token[:, None] + (tl.arange(0, _GROUP) + GROUP * _GROUP)[None, :]
    value = tl.load(entry, mask=valid[:, None], other=0)
    if FP8:
        scales = (cache + token + _NOPE).to(tl.pointer_type(tl.float32))
        scale = tl.load(scales + GROUP, mask=valid, other=0.0)
        value = round_to(decode_e4m3(value, HAS_E4M3) * scale[:, None], DTYPE)
    return value


@triton.jit
def load_rope(cache, token, valid, DTYPE: tl.constexpr, FP8: tl.constexpr):
    """The 64 RoPE values of the tokens at these offsets, zeros where not valid."""
    dim = tl.arange(0, _ROPE)[None, :]
    if FP8:
        rope = (cache + token[:, None] + _ROPE_BYTE).to(tl.pointer_type(tl.bfloat16))
        value = tl.load(rope + dim, mask=valid[:, None], other=0.0).to(DTYPE)
    else:
        value = tl.load(cache + token[:, None] + _NOPE + dim, mask=valid[:, None], other=0.0)
    return value


@triton.jit(do_not_specialize=["splits"])
def _merge(
    part_out,
    part_lse,
    out,
    lse,
    heads,
    splits,
    out_t,
    out_h,
    out_d,
    lse_t,
    lse_h,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Grid (rows * heads, 512 / BLOCK_D); parts are [rows, splits, heads, ...], dense."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    part, every = row * splits * heads + head, tl.arange(0, _MAX_SPLITS)
    logs = tl.load(part_lse + part + every * heads, mask=every < splits, other=float("-inf"))
    peak = tl.max(logs, 0)
    finite_peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(logs - finite_peak), 0)
    merged = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, UNROLL):
        for ahead in tl.static_range(UNROLL):
            split = first + ahead
            at = part + tl.minimum(split, splits - 1) * heads
            weight = tl.exp(tl.load(part_lse + at) - finite_peak)
            # What is masked costs no load.
            real = split * _NOPE + dim < splits * _NOPE
            values = tl.load(part_out + at * _NOPE + dim, mask=real, other=0.0)
            merged += tl.where(real, values * weight, 0.0)
    merged /= tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * out_t + head * out_h + dim * out_d, round_to(merged, out.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(lse + row * lse_t + head * lse_h, peak + tl.log(total))
