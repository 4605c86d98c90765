"""DeepSeek Sparse Attention of one layer: the way of the data from projections to heads' outputs.

DeepSeek-V3.2-Exp report, section 2.1 (lightning indexer, fine-grained token selection), under MLA
in its absorbed (MQA) form: every head attends to the same selected latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_kernels.cache_write import apply_rope, index_cache_write, index_query, latent_cache_write
from dsa_kernels.indexer_logits import gather_index_keys, indexer_logits, indexer_logits_paged
from dsa_kernels.layout import KV_LORA_RANK, LATENT_DIM
from dsa_kernels.sparse_mla import sparse_mla
from dsa_kernels.topk_select import topk_select, topk_slots
from dsa_plugin.metadata import DSAMetadata, PrefillChunk
from dsa_plugin.op_counts import count


@dataclass
class MLAWeights:
    """What one layer's sparse MLA is made of, per tensor-parallel rank.

    Attributes:
        softmax_scale: of the queries' q.k, YaRN's mscale^2 included.
        kv_norm: [512] RMSNorm weight of the latent; `kv_norm_eps` its epsilon.
        w_uk: [heads, qk_nope_head_dim, 512], absorbs the key's up-projection into the query.
        w_uv: [heads, 512, v_head_dim], the value's up-projection.
        cos_sin_cache: [max_position, 64], cos then sin, YaRN included.
    """

    softmax_scale: float
    kv_norm: Tensor
    kv_norm_eps: float
    w_uk: Tensor
    w_uv: Tensor
    cos_sin_cache: Tensor


@dataclass
class Indexer:
    """The lightning indexer's constants of one layer.

    Attributes:
        k_norm, k_norm_bias: [128] LayerNorm of the index key; `k_norm_eps` its epsilon.
        interleaved: RoPE style of the indexer: pairs (2i, 2i+1) if true, halves (i, i+32) if not.
        cos_sin_cache: [max_position, 64].
    """

    k_norm: Tensor
    k_norm_bias: Tensor
    k_norm_eps: float
    interleaved: bool
    cos_sin_cache: Tensor


@dataclass
class IndexerInputs:
    """One layer's projections of this pass: q [T, heads, 128], k [T, 128], weights [T, heads]."""

    q: Tensor
    k: Tensor
    weights: Tensor


def write_latent(
    mla: MLAWeights, kv: Tensor, positions: Tensor, cache: Tensor, metadata: DSAMetadata
) -> None:
    """Normalise, rotate and store this pass's latents; kv [T, 576] comes from the projection."""
    count("latent_cache_write")
    latent_cache_write(
        kv,
        mla.kv_norm,
        mla.kv_norm_eps,
        positions,
        mla.cos_sin_cache,
        cache,
        metadata.slot_mapping,
    )


def write_index_key(
    indexer: Indexer, k: Tensor, positions: Tensor, cache: Tensor, metadata: DSAMetadata
) -> None:
    """Normalise, rotate and store this pass's index keys: also where nothing will be scored.

    A later pass of the same request, or another request with the same prefix, scores them.
    """
    count("index_cache_write")
    index_cache_write(
        k,
        indexer.k_norm,
        indexer.k_norm_bias,
        indexer.k_norm_eps,
        positions,
        indexer.cos_sin_cache,
        cache,
        metadata.slot_mapping,
        interleaved=indexer.interleaved,
        hadamard=_is_fp8(cache),
    )


def select(
    indexer: Indexer,
    inputs: IndexerInputs,
    positions: Tensor,
    cache: Tensor,
    metadata: DSAMetadata,
    topk_indices: Tensor,
) -> None:
    """Choose each row's tokens: writes `topk_indices[:T]`, [T, index_topk] int32, -1 padded."""
    topk = topk_indices.shape[1]
    decodes = metadata.num_decode_tokens
    score_decodes = decodes > 0 and metadata.max_decode_context_len > topk
    scored = [chunk for chunk in metadata.prefill_chunks if chunk.num_keys > topk]
    if not score_decodes and not scored:
        _select_all(metadata.context_lens, topk_indices[: metadata.num_tokens])
        return

    count("index_query")
    q, weights = index_query(
        inputs.q,
        inputs.weights,
        positions,
        indexer.cos_sin_cache,
        interleaved=indexer.interleaved,
        hadamard=_is_fp8(cache),
        fp8=_is_fp8(cache),
    )
    if score_decodes:
        _select_decodes(q[:decodes], weights[:decodes], cache, metadata, topk_indices[:decodes])
    else:
        _select_all(metadata.context_lens[:decodes], topk_indices[:decodes])
    for chunk in metadata.prefill_chunks:
        rows = slice(chunk.start, chunk.end)
        if chunk.num_keys > topk:
            _select_chunk(q[rows], weights[rows], cache, metadata, chunk, topk_indices[rows])
        else:
            _select_all(metadata.context_lens[rows], topk_indices[rows])


def attend(
    mla: MLAWeights,
    q: Tensor,
    positions: Tensor,
    cache: Tensor,
    metadata: DSAMetadata,
    topk_indices: Tensor,
    out: Tensor,
) -> None:
    """Sparse MLA over the selected latents.

    Args:
        mla: the layer.
        q: [T, heads, qk_nope_head_dim + 64], before RoPE.
        positions: [T] int64.
        cache: latent cache.
        metadata: the batch; T is its num_tokens.
        topk_indices: [>= T, index_topk] int32, positions within each row's request.
        out: [T, heads, v_head_dim], written.
    """
    count("topk_slots")
    slots = topk_slots(
        topk_indices[: metadata.num_tokens],
        metadata.block_table,
        metadata.request_ids,
        metadata.block_size,
    )
    count("sparse_mla")
    latent, _ = sparse_mla(
        _absorb(mla, q, positions),
        cache,
        slots,
        mla.softmax_scale,
        topk_length=metadata.context_lens,
    )
    torch.bmm(latent.transpose(0, 1), mla.w_uv, out=out.transpose(0, 1))


def _absorb(mla: MLAWeights, q: Tensor, positions: Tensor) -> Tensor:
    """[T, heads, nope + 64] -> [T, heads, 576]: q_nope through W_UK, q_pe rotated."""
    nope = mla.w_uk.shape[1]
    absorbed = q.new_empty(q.shape[0], q.shape[1], LATENT_DIM)
    torch.bmm(
        q[..., :nope].transpose(0, 1),
        mla.w_uk,
        out=absorbed[..., :KV_LORA_RANK].transpose(0, 1),
    )
    absorbed[..., KV_LORA_RANK:] = apply_rope(
        q[..., nope:], positions, mla.cos_sin_cache, interleaved=True
    )
    return absorbed


def _select_all(context_lens: Tensor, topk_indices: Tensor) -> None:
    """Contexts no longer than index_topk need no scores: every visible token is selected."""
    everything = torch.arange(topk_indices.shape[1], dtype=torch.int32, device=topk_indices.device)
    visible = everything < context_lens[: topk_indices.shape[0], None]
    topk_indices.copy_(torch.where(visible, everything, -1))


def _select_decodes(
    q: Tensor, weights: Tensor, cache: Tensor, metadata: DSAMetadata, topk_indices: Tensor
) -> None:
    query_len, max_context_len = metadata.decode_query_len, metadata.max_decode_context_len
    requests = max(1, metadata.workspace_bytes // (4 * query_len * max_context_len))
    for first in range(0, metadata.num_decodes, requests):
        last = min(first + requests, metadata.num_decodes)
        rows = slice(first * query_len, last * query_len)
        context_lens = metadata.context_lens[rows]
        count("indexer_logits_paged")
        logits = indexer_logits_paged(
            q[rows].unflatten(0, (-1, query_len)),
            weights[rows].unflatten(0, (-1, query_len)),
            cache,
            metadata.block_table[first:last],
            context_lens.view(-1, query_len),
            max_context_len,
        )
        count("topk_select")
        topk_select(logits, topk_indices.shape[1], None, context_lens, out=topk_indices[rows])


def _select_chunk(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    metadata: DSAMetadata,
    chunk: PrefillChunk,
    topk_indices: Tensor,
) -> None:
    k, k_scale = gather_index_keys(cache, metadata.block_table[chunk.request], chunk.num_keys)
    row_end = metadata.context_lens[chunk.start : chunk.end]
    count("indexer_logits")
    logits = indexer_logits(q, weights, k, torch.zeros_like(row_end), row_end, k_scale=k_scale)
    count("topk_select")
    topk_select(logits, topk_indices.shape[1], None, row_end, out=topk_indices)


def _is_fp8(index_cache: Tensor) -> bool:
    """The fp8 index cache is bytes; DeepSeek's reference rotates q and k (Hadamard) only for it."""
    return index_cache.dtype == torch.uint8
