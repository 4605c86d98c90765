"""Public signatures of topk_select."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsa_kernels.checks import check_devices, check_dtype, check_shape
from dsa_kernels.dispatch import use_triton
from dsa_kernels.topk_select import cpu, reference

_INT_DTYPES = (torch.int32, torch.int64)


def topk_select(
    logits: Tensor,
    k: int,
    row_start: Tensor | None,
    row_end: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The k best columns of each row: fine-grained token selection.

    DeepSeek-V3.2-Exp report, section 2.1.

    Notes:
        - Of equal scores the smaller index wins; -0.0 equals 0.0.
        - A row's result depends on that row alone, not on the batch, so tensor-parallel ranks
          agree.
        - Indices are ascending, none occurs twice, and -1 fills the rest of a row.
        - A row with fewer than k columns gets all of them, negative scores and -inf included.
        - A NaN counts as larger than every number if its sign is positive, else as smaller. Outside
          a row's range nothing is looked at.
        - No tensor need be contiguous, `out` included.
        - Of rows longer than 8192 the Triton kernel takes a k above 4096 many times as long.

    Args:
        logits: [M, N] fp32.
        k: >= 1; may exceed N.
        row_start: [M] int, first column of each row's range; None is 0.
        row_end: [M] int, one past the last. Empty ranges are allowed.
        out: [M, k] int32, written if given.

    Returns:
        topk_indices [M, k] int32, relative to row_start, ascending, then -1.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    _check_select(logits, k, row_start, row_end, out)
    if not use_triton(logits.device):
        return _torch_select(logits)(logits, k, row_start, row_end, out=out)
    from dsa_kernels.topk_select import kernel

    if out is None:
        out = torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)
    kernel.topk_select(logits, k, row_start, row_end, out)
    return out


def topk_select_slots(
    logits: Tensor,
    k: int,
    row_end: Tensor,
    block_table: Tensor,
    request_ids: Tensor,
    block_size: int,
    *,
    out: Tensor | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`topk_select` of rows that start at 0, and `topk_slots` of what it selects, in one pass.

    Args:
        logits, k, row_end, out: as `topk_select` takes them.
        block_table, request_ids, block_size: as `topk_slots` takes them.
        slots: [M, k] int64, written if given.

    Returns:
        topk_indices [M, k] int32 and slots [M, k] int64.

    Raises:
        ValueError: as both of them.
    """
    _check_select(logits, k, None, row_end, out)
    rows = logits.shape[0]
    _check_pages(rows, block_table, request_ids, block_size)
    if slots is not None:
        check_dtype("slots", slots, (torch.int64,))
        check_shape("slots", slots, (rows, k))
    check_devices("logits", logits, block_table=block_table, request_ids=request_ids, slots=slots)
    if out is None:
        out = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    if slots is None:
        slots = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    if use_triton(logits.device):
        from dsa_kernels.topk_select import kernel

        kernel.topk_select_slots(
            logits, k, row_end, block_table, request_ids, block_size, out, slots
        )
    else:
        _torch_select(logits)(logits, k, None, row_end, out=out)
        slots.copy_(reference.topk_slots(out, block_table, request_ids, block_size))
    return out, slots


def topk_slots(
    topk_indices: Tensor, block_table: Tensor, request_ids: Tensor, block_size: int
) -> Tensor:
    """Where the selected tokens lie in the latent cache.

    Args:
        topk_indices: [M, k] int, positions within each row's request; an index that is negative or
            beyond the block table gives -1.
        block_table: [num_requests, max_blocks] int, physical block of each logical one; an entry
            that is negative gives -1.
        request_ids: [M] int, row of block_table.
        block_size: tokens a block.

    Returns:
        slots [M, k] int64: block * block_size + offset, or -1.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_dtype("topk_indices", topk_indices, _INT_DTYPES)
    check_shape("topk_indices", topk_indices, ("M", "k"))
    _check_pages(topk_indices.shape[0], block_table, request_ids, block_size)
    check_devices("topk_indices", topk_indices, block_table=block_table, request_ids=request_ids)
    if not use_triton(topk_indices.device):
        return reference.topk_slots(topk_indices, block_table, request_ids, block_size)
    from dsa_kernels.topk_select import slots_kernel

    slots = torch.empty(topk_indices.shape, dtype=torch.int64, device=topk_indices.device)
    slots_kernel.topk_slots(topk_indices, block_table, request_ids, block_size, slots)
    return slots


def _check_select(
    logits: Tensor, k: int, row_start: Tensor | None, row_end: Tensor, out: Tensor | None
) -> None:
    check_dtype("logits", logits, (torch.float32,))
    check_shape("logits", logits, ("M", "N"))
    if k < 1:
        raise ValueError(f"k: {k}; at least one index must be selected")
    rows = logits.shape[0]
    for name, bound in (("row_start", row_start), ("row_end", row_end)):
        if bound is not None:
            check_dtype(name, bound, _INT_DTYPES)
            check_shape(name, bound, (rows,))
    if out is not None:
        check_dtype("out", out, (torch.int32,))
        check_shape("out", out, (rows, k))
    check_devices("logits", logits, row_start=row_start, row_end=row_end, out=out)


def _check_pages(rows: int, block_table: Tensor, request_ids: Tensor, block_size: int) -> None:
    check_dtype("block_table", block_table, _INT_DTYPES)
    check_shape("block_table", block_table, ("num_requests", "max_blocks"))
    check_dtype("request_ids", request_ids, _INT_DTYPES)
    check_shape("request_ids", request_ids, (rows,))
    if block_size < 1:
        raise ValueError(f"block_size: {block_size}; it must be at least 1")


def _torch_select(logits: Tensor) -> Callable[..., Tensor]:
    return cpu.topk_select if logits.device.type == "cpu" else reference.topk_select
