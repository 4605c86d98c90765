"""Public signatures of indexer_logits."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.checks import check_devices, check_dtype, check_shape
from dsa_kernels.dims import INDEX_HEAD_DIM
from dsa_kernels.dispatch import use_triton
from dsa_kernels.indexer_logits import cpu, reference
from dsa_kernels.layout import FLOAT_DTYPES, check_index_cache

_INT_DTYPES = (torch.int32, torch.int64)
_QUERY_DTYPES = (*FLOAT_DTYPES, torch.float8_e4m3fn)


def indexer_logits(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    *,
    k_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Score every row against its range of keys (DeepSeek-V3.2-Exp report, equation 1).

    logits[m, n] = k_scale[n] * sum_h relu(q[m, h] . k[n]) * weights[m, h], accumulated in fp32, for
    n in [row_start[m], row_end[m]); -inf elsewhere.

    Args:
        q: [M, heads, 128] float or float8_e4m3fn, from `index_query`.
        weights: [M, heads] fp32, from `index_query`: signed, constants and q's scale included.
        k: [N, 128], q's dtype.
        row_start: [M] int.
        row_end: [M] int.
        k_scale: [N] fp32; required for fp8, absent otherwise.
        out: [M, N] fp32, written if given.

    Returns:
        logits [M, N] fp32; rows may lie further apart than N.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_dtype("q", q, _QUERY_DTYPES)
    check_shape("q", q, ("M", "heads", INDEX_HEAD_DIM))
    check_dtype("weights", weights, (torch.float32,))
    check_shape("weights", weights, q.shape[:2])
    check_dtype("k", k, (q.dtype,))
    check_shape("k", k, ("N", INDEX_HEAD_DIM))
    rows, keys = q.shape[0], k.shape[0]
    for name, bound in (("row_start", row_start), ("row_end", row_end)):
        check_dtype(name, bound, _INT_DTYPES)
        check_shape(name, bound, (rows,))
    if (k_scale is not None) != (q.dtype == torch.float8_e4m3fn):
        raise ValueError(
            f"k_scale: {'given' if k_scale is not None else 'absent'} with {q.dtype} keys; "
            "fp8 keys need their scales and no other keys have any"
        )
    if k_scale is not None:
        check_dtype("k_scale", k_scale, (torch.float32,))
        check_shape("k_scale", k_scale, (keys,))
    _check_out(out, rows, keys)
    check_devices(
        "q",
        q,
        weights=weights,
        k=k,
        row_start=row_start,
        row_end=row_end,
        k_scale=k_scale,
        out=out,
    )
    if not use_triton(q.device):
        run = cpu.indexer_logits if q.device.type == "cpu" else reference.indexer_logits
        return run(q, weights, k, row_start, row_end, k_scale=k_scale, out=out)
    from dsa_kernels.indexer_logits import kernel

    if out is None:
        out = _new_logits(rows, keys, q.device)
    kernel.indexer_logits(q, weights, k, row_start, row_end, k_scale, out)
    return out


def indexer_logits_paged(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    max_context_len: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Score decode rows against the keys in the cache; same maths as `indexer_logits`.

    Args:
        q: [B, next_n, heads, 128], the cache's float dtype, or float8_e4m3fn for an fp8 cache.
        weights: [B, next_n, heads] fp32.
        cache: index-key cache. Layouts: `dsa_kernels.layout`.
        block_table: [B, max_blocks] int, physical block of each logical one; entries past a
            context's end are not used, whatever they hold.
        context_lens: [B, next_n] int, keys visible to each row.
        max_context_len: width of the result, at least the largest context length and at most
            max_blocks * block_size; keys beyond it are not scored.
        out: [B * next_n, max_context_len] fp32, written if given.

    Returns:
        logits [B * next_n, max_context_len] fp32, as of `indexer_logits`; -inf from each row's
        context length on.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_index_cache(cache)
    check_shape("q", q, ("B", "next_n", "heads", INDEX_HEAD_DIM))
    check_dtype("q", q, (torch.float8_e4m3fn if cache.dtype == torch.uint8 else cache.dtype,))
    check_dtype("weights", weights, (torch.float32,))
    check_shape("weights", weights, q.shape[:3])
    check_dtype("block_table", block_table, _INT_DTYPES)
    check_shape("block_table", block_table, (q.shape[0], "max_blocks"))
    check_dtype("context_lens", context_lens, _INT_DTYPES)
    check_shape("context_lens", context_lens, q.shape[:2])
    capacity = block_table.shape[1] * cache.shape[1]
    if not 0 <= max_context_len <= capacity:
        raise ValueError(
            f"max_context_len: {max_context_len}; the block table has room for {capacity} keys "
            f"({block_table.shape[1]} blocks of {cache.shape[1]}) a request"
        )
    _check_out(out, q.shape[0] * q.shape[1], max_context_len)
    check_devices(
        "q",
        q,
        weights=weights,
        cache=cache,
        block_table=block_table,
        context_lens=context_lens,
        out=out,
    )
    if not use_triton(q.device):
        run = cpu.indexer_logits_paged if q.device.type == "cpu" else reference.indexer_logits_paged
        return run(q, weights, cache, block_table, context_lens, max_context_len, out=out)
    from dsa_kernels.indexer_logits import kernel

    if out is None:
        out = _new_logits(q.shape[0] * q.shape[1], max_context_len, q.device)
    kernel.indexer_logits_paged(q, weights, cache, block_table, context_lens, out)
    return out


def gather_index_keys(
    cache: Tensor, block_table_row: Tensor, num_keys: int
) -> tuple[Tensor, Tensor | None]:
    """The first keys of one request, out of its pages: what `indexer_logits` scores.

    Args:
        cache: index-key cache. Layouts: `dsa_kernels.layout`.
        block_table_row: [max_blocks] int, physical block of each of the request's logical ones.
        num_keys: at most max_blocks * block_size.

    Returns:
        k [num_keys, 128] in the cache's dtype, or float8_e4m3fn; k_scale [num_keys] fp32 for an fp8
        cache, else None.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_index_cache(cache)
    check_dtype("block_table_row", block_table_row, _INT_DTYPES)
    check_shape("block_table_row", block_table_row, ("max_blocks",))
    capacity = block_table_row.shape[0] * cache.shape[1]
    if not 0 <= num_keys <= capacity:
        raise ValueError(
            f"num_keys: {num_keys}; the block table row has room for {capacity} keys "
            f"({block_table_row.shape[0]} blocks of {cache.shape[1]})"
        )
    check_devices("cache", cache, block_table_row=block_table_row)
    if not use_triton(cache.device):
        return reference.gather_index_keys(cache, block_table_row, num_keys)
    from dsa_kernels.indexer_logits import gather_kernel

    fp8 = cache.dtype == torch.uint8
    k = torch.empty(num_keys, INDEX_HEAD_DIM, dtype=cache.dtype, device=cache.device)
    k_scale = torch.empty(num_keys, dtype=torch.float32, device=cache.device) if fp8 else None
    gather_kernel.gather_index_keys(cache, block_table_row, k, k_scale)
    return k.view(torch.float8_e4m3fn) if fp8 else k, k_scale


def warm_up_indexer(device: torch.device, cache_dtype: torch.dtype) -> None:
    """Compile what the first long request would otherwise wait for: on a CPU, some seconds once."""
    if device.type == "cpu" and cache_dtype in (torch.bfloat16, torch.uint8):
        cpu.warm_up()


def _new_logits(rows: int, keys: int, device: torch.device) -> Tensor:
    """Rows that lie a multiple of 64 bytes apart, whatever their length.

    Triton compiles kernels anew for other rows, and these it reads and writes four values at once.
    """
    return torch.empty(rows, -(-keys // 16) * 16, dtype=torch.float32, device=device)[:, :keys]


def _check_out(out: Tensor | None, rows: int, columns: int) -> None:
    if out is not None:
        check_dtype("out", out, (torch.float32,))
        check_shape("out", out, (rows, columns))
