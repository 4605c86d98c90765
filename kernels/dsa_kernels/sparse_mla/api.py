"""Public signatures of sparse_mla, and of masked_mha, its form for contexts that are not long."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.checks import check_devices, check_dtype, check_shape
from dsa_kernels.dims import KV_LORA_RANK, LATENT_DIM
from dsa_kernels.dispatch import use_triton
from dsa_kernels.layout import FLOAT_DTYPES, check_latent_cache
from dsa_kernels.prefill_forms import is_decoding_first_faster, is_masked_faster
from dsa_kernels.sparse_mla import cpu, reference

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
        from dsa_kernels.sparse_mla import kernel

        kernel.sparse_mla(q, cache, slots, topk_length, softmax_scale, out, lse)
    else:
        run = cpu.sparse_mla if q.device.type == "cpu" else reference.sparse_mla
        run(q, cache, slots, topk_length, softmax_scale, out, lse)
    return out, lse


def masked_mha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_indices: Tensor,
    softmax_scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of each row over the keys it selected, in MLA's expanded form: all others masked.

    The same result as `sparse_mla` on the latents that k and v were expanded from. Its cost grows
    with N instead of the selection, but a key costs less and nothing is gathered:
    `masked_is_faster` says where. DeepSeek's report on V3.2-Exp names such a mode for short
    prefills (section 3, "Inference Costs").

    Args:
        q: [T, heads, D] float, the last 64 values rotated.
        k: [heads, N, D], q's dtype.
        v: [heads, N, DV], q's dtype, DV <= D.
        topk_indices: [T, k] int: the keys of each row, from `topk_select`; negative entries are
            ignored, others must be below N.
        softmax_scale: factor of q . k before the softmax.
        out: [T, heads, DV], q's dtype, written if given.

    Returns:
        out [T, heads, DV]; 0 for a row that selected nothing.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_dtype("q", q, FLOAT_DTYPES)
    check_shape("q", q, ("T", "heads", "D"))
    rows, heads, width = q.shape
    check_dtype("k", k, (q.dtype,))
    check_shape("k", k, (heads, "N", width))
    check_dtype("v", v, (q.dtype,))
    check_shape("v", v, (heads, k.shape[1], "DV"))
    if v.shape[2] > width:
        raise ValueError(f"v: {v.shape[2]} values a head; at most q's and k's {width}")
    check_dtype("topk_indices", topk_indices, _INT_DTYPES)
    check_shape("topk_indices", topk_indices, (rows, "k"))
    if out is not None:
        check_dtype("out", out, (q.dtype,))
        check_shape("out", out, (rows, heads, v.shape[2]))
    check_devices("q", q, k=k, v=v, topk_indices=topk_indices, out=out)
    if out is None:
        out = torch.empty(rows, heads, v.shape[2], dtype=q.dtype, device=q.device)
    if use_triton(q.device):
        from dsa_kernels.sparse_mla import masked_kernel

        masked_kernel.masked_mha(q, k, v, topk_indices, softmax_scale, out)
    else:
        run = cpu.masked_mha if q.device.type == "cpu" else reference.masked_mha
        run(q, k, v, topk_indices, softmax_scale, out)
    return out


def gather_latents(
    cache: Tensor, block_table_row: Tensor, num_keys: int, dtype: torch.dtype
) -> Tensor:
    """The first latents of one request, out of its pages: what k and v are expanded from.

    Args:
        cache: latent cache. Layouts: `dsa_kernels.layout`.
        block_table_row: [max_blocks] int, physical block of each of the request's logical ones.
        num_keys: at most max_blocks * block_size.
        dtype: of the result; the cache's if that is a float.

    Returns:
        [num_keys, 576] of `dtype`.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_latent_cache(cache)
    check_dtype("block_table_row", block_table_row, _INT_DTYPES)
    check_shape("block_table_row", block_table_row, ("max_blocks",))
    capacity = block_table_row.shape[0] * cache.shape[1]
    if not 0 <= num_keys <= capacity:
        raise ValueError(
            f"num_keys: {num_keys}; the block table row has room for {capacity} keys "
            f"({block_table_row.shape[0]} blocks of {cache.shape[1]})"
        )
    if cache.dtype not in (torch.uint8, dtype):
        raise ValueError(f"dtype: {dtype} from a cache of {cache.dtype}; ask for {cache.dtype}")
    check_devices("cache", cache, block_table_row=block_table_row)
    if not use_triton(cache.device):
        return reference.gather_latents(cache, block_table_row, num_keys, dtype)
    from dsa_kernels.sparse_mla import gather_kernel

    latents = torch.empty(num_keys, LATENT_DIM, dtype=dtype, device=cache.device)
    gather_kernel.gather_latents(cache, block_table_row, latents)
    return latents


def masked_is_faster(
    device: torch.device,
    rows: int,
    keys: int,
    topk: int,
    *,
    heads: int,
    width: int,
    v_width: int,
) -> bool:
    """Whether expanding N keys and `masked_mha` beat absorbing T queries and `sparse_mla`.

    On a CPU they cross at about 4 x topk keys with 2048 rows and 16 heads, by measurement
    (benchmarks/serve_cpu.py has the machine), once expanding a key is counted as the 400 rows of
    attention that it costs: 512 x (128 + 128) against 192 + 128 products. Elsewhere both are
    counted in an H100's times (docs/measured.md), whose relation other GPUs are taken to share.
    Both decode an fp8 cache first. vLLM 0.32 has, measured on sm100 against FlashMLA, 4K, and 16K
    to 32K with few heads (_MASKED_MHA_THRESHOLDS of
    vllm/model_executor/layers/attention/mla_attention.py).

    Args:
        device: where.
        rows, keys, topk: T queries, N keys that the last of them sees, and how many each selects.
        heads: of this rank.
        width, v_width: values of a head's query and of its result, as in `masked_mha`.
    """
    if device.type == "cpu" and not use_triton(device):
        return keys * (rows + 400) <= 4 * topk * rows
    return is_masked_faster(rows, keys, topk, heads=heads, width=width, v_width=v_width)


def decoding_first_is_faster(cache: Tensor, rows: int, keys: int, topk: int) -> bool:
    """Whether `gather_latents` and then `sparse_mla` beat `sparse_mla` on an fp8 cache itself.

    The kernel decodes each latent that it gathers anew for every row and block of heads; this way
    each of the request's N is decoded once. On an H100 (docs/measured.md) one takes 0.7 ns, at
    97 % of the bandwidth, and saves 0.3 ns for each row that selects it, with 16 heads, and more
    with more; launching it takes as long as 4,096 of them. Both give the same result, but for the
    order of sums where the two forms have other launch configurations.

    Args:
        cache: latent cache.
        rows, keys, topk: T queries, N keys that the last of them sees, and how many each selects.
    """
    if cache.dtype != torch.uint8 or not use_triton(cache.device):
        return False
    return is_decoding_first_faster(rows, keys, topk)
