"""Which tokens each row attends to: the lightning indexer's scores, and the top k of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsa_plugin.attention import ops

if TYPE_CHECKING:
    from torch import Tensor

    from dsa_plugin.attention.layer import Indexer, Projections
    from dsa_plugin.attention.metadata import DSAMetadata, PrefillChunk


def index_query(
    indexer: Indexer, projections: Projections, metadata: DSAMetadata, index_topk: int
) -> tuple[Tensor, Tensor] | None:
    """Queries and head weights of all rows; None where none sees more than index_topk keys."""
    if not _scores_decodes(metadata, index_topk) and not any(
        chunk.num_keys > index_topk for chunk in metadata.prefill_chunks
    ):
        return None
    assert projections.index is not None
    return ops.index_query(
        projections.index.q,
        projections.index.weights,
        indexer.rope,
        projections.positions,
        hadamard=indexer.is_fp8,
        fp8=indexer.is_fp8,
    )


def select(
    indexer: Indexer,
    query: tuple[Tensor, Tensor] | None,
    metadata: DSAMetadata,
    topk_indices: Tensor,
) -> Tensor | None:
    """Choose each row's tokens: writes `topk_indices[:T]`, [T, index_topk] int32, -1 padded.

    Args:
        indexer: its key cache is read.
        query: of `index_query`.
        metadata: the batch.
        topk_indices: written.

    Returns:
        Slots of the decode rows, [decode tokens, index_topk] int64, where they were scored.
    """
    if query is None:
        _select_all(metadata.context_lens, topk_indices[: metadata.num_tokens])
        return None
    (q, weights), topk, decodes = query, topk_indices.shape[1], metadata.num_decode_tokens
    keys = indexer.key_cache
    decode_slots = None
    if _scores_decodes(metadata, topk):
        decode_slots = _select_decodes(
            q[:decodes], weights[:decodes], keys, metadata, topk_indices[:decodes]
        )
    else:
        _select_all(metadata.context_lens[:decodes], topk_indices[:decodes])
    for chunk in metadata.prefill_chunks:
        rows = slice(chunk.start, chunk.end)
        if chunk.num_keys > topk:
            _select_chunk(q[rows], weights[rows], keys, metadata, chunk, topk_indices[rows])
        else:
            _select_all(metadata.context_lens[rows], topk_indices[rows])
    return decode_slots


def _scores_decodes(metadata: DSAMetadata, index_topk: int) -> bool:
    return metadata.num_decodes > 0 and metadata.max_decode_context_len > index_topk


def _select_all(context_lens: Tensor, topk_indices: Tensor) -> None:
    """Contexts no longer than index_topk need no scores: every visible token is selected."""
    everything = torch.arange(topk_indices.shape[1], dtype=torch.int32, device=topk_indices.device)
    visible = everything < context_lens[: topk_indices.shape[0], None]
    topk_indices.copy_(torch.where(visible, everything, -1))


def _select_decodes(
    q: Tensor, weights: Tensor, cache: Tensor, metadata: DSAMetadata, topk_indices: Tensor
) -> Tensor:
    """Writes topk_indices, and returns their slots."""
    slots = torch.empty(topk_indices.shape, dtype=torch.int64, device=q.device)
    query_len, max_context_len = metadata.decode_query_len, metadata.max_decode_context_len
    requests = max(1, metadata.workspace_bytes // (4 * query_len * max_context_len))
    for first in range(0, metadata.num_decodes, requests):
        last = min(first + requests, metadata.num_decodes)
        rows = slice(first * query_len, last * query_len)
        context_lens = metadata.context_lens[rows]
        logits = ops.indexer_logits_paged(
            q[rows].unflatten(0, (-1, query_len)),
            weights[rows].unflatten(0, (-1, query_len)),
            cache,
            metadata.block_table[first:last],
            context_lens.view(-1, query_len),
            max_context_len,
        )
        ops.topk_select_slots(
            logits,
            topk_indices.shape[1],
            context_lens,
            metadata.block_table,
            metadata.request_ids[rows],
            metadata.block_size,
            out=topk_indices[rows],
            slots=slots[rows],
        )
    return slots


def _select_chunk(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    metadata: DSAMetadata,
    chunk: PrefillChunk,
    topk_indices: Tensor,
) -> None:
    k, k_scale = ops.gather_index_keys(cache, metadata.block_table[chunk.request], chunk.num_keys)
    row_end = metadata.context_lens[chunk.start : chunk.end]
    logits = ops.indexer_logits(q, weights, k, torch.zeros_like(row_end), row_end, k_scale=k_scale)
    ops.topk_select(logits, topk_indices.shape[1], None, row_end, out=topk_indices)
