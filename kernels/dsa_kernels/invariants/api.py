"""Public signatures of the checks of `DSA_CHECK`.

In a layer's pass they are called in this order: `mark_rows` before the caches are written,
`check_rows` of each row once, where it is known what attention goes by, `keep_first` at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.checks import check_devices, check_dtype, check_shape
from dsa_kernels.dispatch import use_triton
from dsa_kernels.invariants import reference
from dsa_kernels.invariants.findings import NOTES
from dsa_kernels.invariants.inputs import LayerMemory, Rows, Used
from dsa_kernels.layout import FLOAT_DTYPES, check_index_cache, check_latent_cache

_INT_DTYPES = (torch.int32, torch.int64)


def mark_rows(rows: Rows, memory: LayerMemory) -> Tensor:
    """Before a pass writes: fill the entries it has to write, note whose they are, check the place.

    An entry's filling is all ones, which is a NaN in every dtype of both layouts, and another one
    than arithmetic makes. Entries of padding keep what they hold.

    Args:
        rows: of the pass, T.
        memory: of the layer; its caches and `written` are written.

    Returns:
        findings [T + 1, 4] int64: of each row check, kind, at and seen, or zeros; the last row is
        `keep_first`'s. What a kind's numbers mean: `findings.FIELDS`.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    _check_rows(rows, memory)
    if not use_triton(rows.slots.device):
        return reference.mark_rows(rows, memory)
    from dsa_kernels.invariants import kernel

    shape = len(rows.slots) + 1, NOTES
    findings = torch.empty(shape, dtype=torch.int64, device=rows.slots.device)
    kernel.mark_rows(rows, memory, findings)
    return findings


def check_rows(rows: Rows, memory: LayerMemory, used: Used, findings: Tensor) -> None:
    """What some rows of a pass have written, and what attention goes by, once both are known.

    Each row's first finding is noted, if it has none before. Its entries are written and hold no
    NaN, nor does its index query; of one page of its request every slot was last written for its
    position, and no index key is NaN; its selection ascends, lies in what it sees, has as many
    tokens as it has to, and their slots are in its request's pages, last written for them.

    Args:
        rows, memory: as `mark_rows` had them.
        used: of which rows, and by what.
        findings: of `mark_rows`, written.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    _check_used(rows, used, findings)
    if not use_triton(rows.slots.device):
        reference.check_rows(rows, memory, used, findings)
        return
    from dsa_kernels.invariants import kernel

    kernel.check_rows(rows, memory, used, findings)


def keep_first(
    rows: Rows, findings: Tensor, out: Tensor, layer: Tensor, number: Tensor, first: Tensor
) -> None:
    """Check that attention gave no NaN, and keep a pass's first finding, if none was kept before.

    The first is that of the least check, of several rows the least row's.

    Args:
        rows: as `mark_rows` had them.
        findings: of `mark_rows`, all rows checked; written.
        out: [T, heads, v_head_dim].
        layer, number: [1] int64, of the layer and the pass.
        first: [8] int64, `findings.FIELDS`; zeros before the first violation; written.

    Raises:
        ValueError: a shape, dtype or device that is not as above.
    """
    check_dtype("out", out, FLOAT_DTYPES)
    check_shape("out", out, (len(rows.slots), "heads", "v_head_dim"))
    check_shape("findings", findings, (len(rows.slots) + 1, NOTES))
    for name, tensor, size in (("layer", layer, 1), ("number", number, 1), ("first", first, 8)):
        check_dtype(name, tensor, (torch.int64,))
        check_shape(name, tensor, (size,))
    check_devices("out", out, findings=findings, layer=layer, number=number, first=first)
    if not use_triton(out.device):
        reference.keep_first(rows, findings, out, layer, number, first)
        return
    from dsa_kernels.invariants import kernel

    kernel.keep_first(rows, findings, out, layer, number, first)


def _check_rows(rows: Rows, memory: LayerMemory) -> None:
    tokens, caches = rows.slots.shape[0], [memory.latent_cache]
    for name in ("requests", "positions", "lens", "slots"):
        check_dtype(name, getattr(rows, name), _INT_DTYPES)
        check_shape(name, getattr(rows, name), (tokens,))
    check_dtype("block_table", rows.block_table, _INT_DTYPES)
    check_shape("block_table", rows.block_table, ("num_requests", "max_blocks"))
    check_latent_cache(memory.latent_cache)
    if memory.key_cache is not None:
        check_index_cache(memory.key_cache)
        caches.append(memory.key_cache)
    size, blocks = rows.block_size, rows.num_blocks
    for cache in caches:
        if cache.shape[0] < blocks or cache.shape[1] != size:
            raise ValueError(
                f"cache: {cache.shape[0]} blocks of {cache.shape[1]} tokens; the rows are of "
                f"{blocks} blocks of {size}"
            )
    check_dtype("written", memory.written, (torch.int32,))
    check_shape("written", memory.written, (blocks + 1, size))
    if not memory.written.is_contiguous():
        raise ValueError(f"written: strides {memory.written.stride()}; it must be dense")
    tensors = (rows.requests, rows.positions, rows.lens, rows.block_table, memory.written, *caches)
    for tensor in tensors:
        check_devices("slots", rows.slots, other=tensor)


def _check_used(rows: Rows, used: Used, findings: Tensor) -> None:
    tokens, k = rows.slots.shape[0], used.topk_indices.shape[-1]
    count = used.rows.stop - used.rows.start
    if not 0 <= used.rows.start <= used.rows.stop <= tokens:
        raise ValueError(f"rows: {used.rows} of {tokens}")
    check_shape("findings", findings, (tokens + 1, NOTES))
    check_dtype("topk_indices", used.topk_indices, (torch.int32,))
    check_shape("topk_indices", used.topk_indices, ("T", "index_topk"))
    if used.slots is not None:
        check_dtype("slots", used.slots, (torch.int64,))
        check_shape("slots", used.slots, (count, k))
    others = {"findings": findings, "topk_indices": used.topk_indices, "slots": used.slots}
    if used.query is not None:
        query, weights = used.query
        check_dtype("query", query, (*FLOAT_DTYPES, torch.float8_e4m3fn))
        check_dtype("weights", weights, (torch.float32,))
        check_shape("query", query, ("T", "heads", 128))
        check_shape("weights", weights, ("T", query.shape[1]))
        others |= {"query": query, "weights": weights}
    check_devices("rows", rows.slots, **others)
