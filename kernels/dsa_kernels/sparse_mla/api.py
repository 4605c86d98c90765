"""Public signature of sparse_mla; which device runs what is `dsa_kernels.dispatch`'s choice."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.checks import check_devices, check_dtype, check_shape
from dsa_kernels.dispatch import use_triton
from dsa_kernels.layout import FLOAT_DTYPES, KV_LORA_RANK, LATENT_DIM, check_latent_cache
from dsa_kernels.sparse_mla import reference

_INT_DTYPES = (torch.int32, torch.int64)


def sparse_mla(
    q: Tensor,
    cache: Tensor,
    slots: Tensor,
    softmax_scale: float,
    *,
    topk_length: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each row over the latents it selected, in MLA's absorbed form.

    Every head of a row attends to the same latents: keys are all 576 values, values the first 512
    (DeepSeek-V3.2-Exp report, section 2.1, "Instantiate DSA Under MLA"). Scores and softmax are
    fp32; the weights are rounded to q's dtype before they meet the values, as a matrix unit needs;
    sums are fp32.

    Args:
        q: [T, heads, 576] float: 512 absorbed through W_UK, then 64 rotated. The cache's dtype if
            that is a float.
        cache: latent cache. Layouts: `dsa_kernels.layout`.
        slots: [T, k] int, from `topk_slots`; entries that are negative or >= num_blocks *
            block_size are ignored. An entry that occurs twice counts twice.
        softmax_scale: factor of q . k before the softmax.
        topk_length: [T] int; entries of a row from there on are ignored, and not even read. It may
            exceed k. None: every entry is looked at.
        out: [T, heads, 512], q's dtype, written if given.
        lse: [T, heads] fp32, written if given.

    Returns:
        out [T, heads, 512] and lse [T, heads]: the natural logarithm of the sum of
        exp(softmax_scale * q . k) over the selection. A row without any: 0 and -inf.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_dtype("q", q, FLOAT_DTYPES)
    check_shape("q", q, ("T", "heads", LATENT_DIM))
    check_latent_cache(cache)
    if cache.dtype not in (torch.uint8, q.dtype):
        raise ValueError(
            f"cache: dtype {cache.dtype} with {q.dtype} queries; "
            f"use a cache of {q.dtype} or the fp8 layout (uint8)"
        )
    rows, heads, _ = q.shape
    check_dtype("slots", slots, _INT_DTYPES)
    check_shape("slots", slots, (rows, "k"))
    if topk_length is not None:
        check_dtype("topk_length", topk_length, _INT_DTYPES)
        check_shape("topk_length", topk_length, (rows,))
    if out is not None:
        check_dtype("out", out, (q.dtype,))
        check_shape("out", out, (rows, heads, KV_LORA_RANK))
    if lse is not None:
        check_dtype("lse", lse, (torch.float32,))
        check_shape("lse", lse, (rows, heads))
    check_devices("q", q, cache=cache, slots=slots, topk_length=topk_length, out=out, lse=lse)
    if out is None:
        out = torch.empty(rows, heads, KV_LORA_RANK, dtype=q.dtype, device=q.device)
    if lse is None:
        lse = torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    if use_triton(q.device):
        from dsa_kernels.sparse_mla.kernel import sparse_mla_op

        sparse_mla_op(q, cache, slots, topk_length, softmax_scale, out, lse)
    else:
        reference.sparse_mla(q, cache, slots, topk_length, softmax_scale, out, lse)
    return out, lse
