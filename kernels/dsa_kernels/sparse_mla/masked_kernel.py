"""masked_mha in Triton: FlashAttention over a request's whole context, a bit for each pair.

A program attends a block of rows of one head to every key up to the last that one of them selected
(FlashAttention-2, arXiv 2307.08691). Bits are made of the indices once, for all heads.
"""

# Triton's annotations describe calls within the compiler, not those in a kernel's source.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_kernels.arch import Arch, arch_of
from dsa_kernels.launch import Launch, launch_config, strides
from dsa_kernels.primitives import dot, round_to

_WORD = tl.constexpr(32)  # keys whose bits are one integer
_LOG2_E = tl.constexpr(1.4426950408889634)
# The peak before any score: finite, so that no difference of two peaks is NaN.
_NO_PEAK = tl.constexpr(-3e38)


def masked_mha(
    q: Tensor, k: Tensor, v: Tensor, topk_indices: Tensor, softmax_scale: float, out: Tensor
) -> None:
    """As the public function, into `out`."""
    for launch in launches(q, k, v, topk_indices, softmax_scale, out, arch_of(q.device)):
        launch.run()


def launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_indices: Tensor,
    softmax_scale: float,
    out: Tensor,
    arch: Arch,
) -> list[Launch]:
    """One launch that makes the mask, one that attends.

    Shape keys: "mask"; ("masked", 192 or 256), the width of queries up to which; "masked float32".
    """
    rows, heads, width = q.shape
    _, keys, v_width = v.shape
    if rows == 0 or heads == 0:
        return []
    fp32, columns = q.dtype == torch.float32, topk_indices.shape[1]
    key = ("masked", 192 if width <= 192 else 256)
    attend_config = launch_config("sparse_mla", arch, "masked float32" if fp32 else key)
    block_keys = attend_config.blocks["BLOCK_KEYS"]
    words = triton.cdiv(keys, block_keys) * block_keys // _WORD.value
    mask = torch.empty(rows, words, dtype=torch.int32, device=q.device)
    end = torch.empty(rows, dtype=torch.int32, device=q.device)
    make_mask = Launch(
        _make_mask,
        (rows,),
        {
            "topk_indices": topk_indices,
            "mask": mask,
            "end": end,
            "columns": columns,
            "keys": keys,
            "words": words,
            **strides("topk_indices", topk_indices, "tk"),
            "COLUMNS": max(16, triton.next_power_of_2(columns)),
        },
        launch_config("sparse_mla", arch, "mask"),
    )
    low = 1 << (width.bit_length() - 1)
    attend = Launch(
        _attend_masked,
        (triton.cdiv(rows, attend_config.blocks["BLOCK_ROWS"]) * heads,),
        {
            "q": q,
            "k": k,
            "v": v,
            "mask": mask,
            "end": end,
            "out": out,
            "softmax_scale": softmax_scale,
            "rows": rows,
            "keys": keys,
            "words": words,
            **strides("q", q, "thd"),
            **strides("k", k, "hnd"),
            **strides("v", v, "hnd"),
            **strides("out", out, "thd"),
            "WIDTH": width,
            "LOW": max(16, low),
            "HIGH": max(16, triton.next_power_of_2(width - low)) if width > low else 0,
            "V_WIDTH": v_width,
            "V_BLOCK": max(16, triton.next_power_of_2(v_width)),
        },
        attend_config,
    )
    return [make_mask, attend]


def compile_cases(arch: Arch) -> Iterator[tuple[str, Launch]]:
    """Every dtype, with the widths of DeepSeek-V3.2 and of GLM-5."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for width, v_width in ((192, 128), (256, 256)):
            with torch.device("meta"):
                mask, attend = launches(
                    torch.empty(4096, 128, width, dtype=dtype),
                    torch.empty(128, 8192, width, dtype=dtype),
                    torch.empty(128, 8192, v_width, dtype=dtype),
                    torch.empty(4096, 2048, dtype=torch.int32),
                    0.1,
                    torch.empty(4096, 128, v_width, dtype=dtype),
                    arch,
                )
            yield f"masked {name}, {width} and {v_width} values", attend
    yield "mask", mask


@triton.jit(do_not_specialize=["columns", "keys", "words"])
def _make_mask(
    topk_indices,
    mask,
    end,
    columns,
    keys,
    words,
    topk_indices_t,
    topk_indices_k,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Grid (rows): bits of what a row selected, and the end of all of it."""
    row = tl.program_id(0).to(tl.int64)
    mask_row = mask + row * words
    for first in range(0, words, WORDS):
        word = first + tl.arange(0, WORDS)
        tl.store(mask_row + word, tl.zeros([WORDS], tl.int32), mask=word < words)
    column = tl.arange(0, COLUMNS)
    entry = topk_indices + row * topk_indices_t + column.to(tl.int64) * topk_indices_k
    index = tl.load(entry, mask=column < columns, other=-1)
    index = tl.where((index >= 0) & (index < keys), index, -1).to(tl.int32)
    tl.store(end + row, tl.max(index, 0) + 1)
    # All words are zero before the first bit is set.
    tl.debug_barrier()
    bit = tl.full([COLUMNS], 1, tl.int32) << (index % _WORD)
    tl.atomic_or(mask_row + index // _WORD, bit, mask=index >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "keys", "words"])
def _attend_masked(
    q,
    k,
    v,
    mask,
    end,
    out,
    softmax_scale,
    rows,
    keys,
    words,
    q_t,
    q_h,
    q_d,
    k_h,
    k_n,
    k_d,
    v_h,
    v_n,
    v_d,
    out_t,
    out_h,
    out_d,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Grid (heads * blocks of rows). Queries and keys are two parts, LOW values and up to HIGH."""
    # Blocks of rows of one head are neighbours: they read the same keys through L2. In a causal
    # prefill the last have the most to do, so they start first.
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    block = row_blocks - 1 - tl.program_id(0) % row_blocks
    row = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real_row = row < rows
    last = tl.max(tl.load(end + row, mask=real_row, other=0), 0)

    low, high = tl.arange(0, LOW)[None, :], LOW + tl.arange(0, max(HIGH, 1))[None, :]
    v_dim = tl.arange(0, V_BLOCK)[None, :]
    q_row, row_mask = q + row[:, None] * q_t + head * q_h, real_row[:, None]
    q_low = tl.load(q_row + low * q_d, mask=row_mask & (low < WIDTH), other=0.0)
    if HIGH:
        q_high = tl.load(q_row + high * q_d, mask=row_mask & (high < WIDTH), other=0.0)

    mask_row = mask + row[:, None] * words
    tile_key, k_head, v_head = tl.arange(0, BLOCK_KEYS), k + head * k_h, v + head * v_h
    peak = tl.full([BLOCK_ROWS], _NO_PEAK, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, V_BLOCK], tl.float32)
    for first in range(0, last, BLOCK_KEYS):
        key_mask = (first + tile_key < keys)[:, None]
        word = tl.load(mask_row + first // _WORD, mask=row_mask, other=0)
        for w in tl.static_range(1, BLOCK_KEYS // _WORD):
            next_word = tl.load(mask_row + first // _WORD + w, mask=row_mask, other=0)
            word = tl.where(tile_key[None, :] < w * _WORD, word, next_word)
        k_row = k_head + tile_key[:, None] * k_n
        k_low = tl.load(k_row + low * k_d, mask=key_mask & (low < WIDTH), other=0.0)
        scores = dot(q_low, tl.trans(k_low))
        if HIGH:
            k_high = tl.load(k_row + high * k_d, mask=key_mask & (high < WIDTH), other=0.0)
            scores = dot(q_high, tl.trans(k_high), scores)
        selected = (word >> (tile_key % _WORD)[None, :]) & 1
        scores = tl.where(selected != 0, scores * (softmax_scale * _LOG2_E), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weight = tl.exp2(scores - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(weight, 1)
        peak = new_peak
        v_row = v_head + tile_key[:, None] * v_n
        value = tl.load(v_row + v_dim * v_d, mask=key_mask & (v_dim < V_WIDTH), other=0.0)
        acc = dot(round_to(weight, value.dtype), value, acc * rescale[:, None])
        k_head += BLOCK_KEYS * k_n
        v_head += BLOCK_KEYS * v_n

    attended = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.store(
        out + row[:, None] * out_t + head * out_h + v_dim * out_d,
        round_to(attended, out.dtype.element_ty),
        mask=row_mask & (v_dim < V_WIDTH),
    )
