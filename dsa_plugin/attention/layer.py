"""DeepSeek Sparse Attention of one layer: the way of the data from projections to heads' outputs.

DeepSeek-V3.2-Exp report, section 2.1 (lightning indexer, fine-grained token selection), under MLA
in its absorbed (MQA) form: every head attends to the same selected latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_kernels.cache_write import Norm, Rope, apply_rope, index_cache_write, index_query, latent_cache_write
from dsa_kernels.dims import KV_LORA_RANK, LATENT_DIM, ROPE_DIM
from dsa_kernels.indexer_logits import (
    gather_index_keys,
    indexer_logits,
    indexer_logits_paged,
    warm_up_indexer,
)
from dsa_kernels.sparse_mla import gather_latents, masked_is_faster, masked_mha, sparse_mla
from dsa_kernels.topk_select import topk_select, topk_select_slots, topk_slots
from dsa_plugin.attention.metadata import DSAMetadata, PrefillChunk
from dsa_plugin.attention.op_counts import count


@dataclass
class MLAWeights:
    """What one layer's sparse MLA is made of, per tensor-parallel rank.

    Attributes:
        softmax_scale: of the queries' q.k, YaRN's mscale^2 included.
        kv_norm: RMSNorm of the latent, 512 values.
        w_uk: [heads, qk_nope_head_dim, 512], absorbs the key's up-projection into the query.
        w_uv: [heads, 512, v_head_dim], the value's up-projection.
        rope: of queries and latents, interleaved.
    """

    softmax_scale: float
    kv_norm: Norm
    w_uk: Tensor
    w_uv: Tensor
    rope: Rope


@dataclass
class Indexer:
    """The lightning indexer's constants of one layer.

    Attributes:
        k_norm: LayerNorm of the index key, 128 values.
        rope: of index queries and keys, interleaved or not as the model's indexer is.
    """

    k_norm: Norm
    rope: Rope


@dataclass
class IndexerInputs:
    """One layer's projections of this pass: q [T, heads, 128], k [T, 128], weights [T, heads]."""

    q: Tensor
    k: Tensor
    weights: Tensor


def warm_up(device: torch.device, index_cache_dtype: torch.dtype) -> None:
    """Prepare what a CPU's first requests would otherwise wait for; hosts call it before serving.

    What a GPU's would is in `kernel_warm_up`.
    """
    warm_up_indexer(device, index_cache_dtype)


def reserve(q: Tensor, index_topk: int, workspace_bytes: int) -> None:
    """Take what `forward` takes at most for itself, and give it back: for a host that measures it.

    That is the workspace, and each row's slots, absorbed query, and what it attended to with its
    lse; the masked form takes less than these.

    Args:
        q: [T, heads, qk_nope_head_dim + 64], as `forward` takes it.
        index_topk: slots of a row.
        workspace_bytes: of the metadata.
    """
    rows, heads, _ = q.shape
    head_bytes = (LATENT_DIM + KV_LORA_RANK) * q.itemsize + torch.float32.itemsize
    row_bytes = index_topk * torch.int64.itemsize + heads * head_bytes
    torch.empty(workspace_bytes + rows * row_bytes, dtype=torch.uint8, device=q.device)


def forward(
    mla: MLAWeights,
    q: Tensor,
    kv: Tensor,
    indexer: Indexer | None,
    inputs: IndexerInputs | None,
    positions: Tensor,
    latent_cache: Tensor,
    index_cache: Tensor | None,
    metadata: DSAMetadata,
    topk_indices: Tensor,
    out: Tensor,
    *,
    reuse_selection: bool,
) -> None:
    """One layer, from projections to heads' outputs: everything a host calls.

    Tensors of the pass may be padded beyond `metadata.num_tokens`; those rows of `out` become 0.

    Args:
        mla: the layer.
        q: [>= T, heads, qk_nope_head_dim + 64], before RoPE.
        kv: [>= T, 576], before norm and RoPE.
        indexer, inputs, index_cache: all None in a layer without an indexer.
        positions: [>= T] int64.
        latent_cache: written and read.
        metadata: the batch; T is its num_tokens.
        topk_indices: [>= T, index_topk] int32, written by a layer that selects, else read.
        out: [>= T, heads, v_head_dim], written.
        reuse_selection: attend to what `topk_indices` holds, of another layer or MTP step. A layer
            with an indexer stores its keys all the same.
    """
    tokens = metadata.num_tokens
    positions = positions[:tokens]
    write_latent(mla, kv[:tokens], positions, latent_cache, metadata)
    decode_slots = None
    if indexer is not None and inputs is not None and index_cache is not None:
        write_index_key(indexer, inputs.k[:tokens], positions, index_cache, metadata)
        if not reuse_selection:
            rows = IndexerInputs(inputs.q[:tokens], inputs.k[:tokens], inputs.weights[:tokens])
            decode_slots = select(indexer, rows, positions, index_cache, metadata, topk_indices)
    attend(
        mla, q[:tokens], positions, latent_cache, metadata, topk_indices, decode_slots, out[:tokens]
    )
    out[tokens:].zero_()


def write_latent(
    mla: MLAWeights, kv: Tensor, positions: Tensor, cache: Tensor, metadata: DSAMetadata
) -> None:
    """Normalise, rotate and store this pass's latents; kv [T, 576] comes from the projection."""
    count("latent_cache_write")
    latent_cache_write(kv, mla.kv_norm, mla.rope, positions, cache, metadata.slot_mapping)


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
        indexer.rope,
        positions,
        cache,
        metadata.slot_mapping,
        hadamard=_is_fp8(cache),
    )


def select(
    indexer: Indexer,
    inputs: IndexerInputs,
    positions: Tensor,
    cache: Tensor,
    metadata: DSAMetadata,
    topk_indices: Tensor,
) -> Tensor | None:
    """Choose each row's tokens: writes `topk_indices[:T]`, [T, index_topk] int32, -1 padded.

    Returns:
        Slots of the decode rows, [decode tokens, index_topk] int64, where they were scored.
    """
    topk = topk_indices.shape[1]
    decodes = metadata.num_decode_tokens
    score_decodes = decodes > 0 and metadata.max_decode_context_len > topk
    scored = [chunk for chunk in metadata.prefill_chunks if chunk.num_keys > topk]
    if not score_decodes and not scored:
        _select_all(metadata.context_lens, topk_indices[: metadata.num_tokens])
        return None

    count("index_query")
    q, weights = index_query(
        inputs.q,
        inputs.weights,
        indexer.rope,
        positions,
        hadamard=_is_fp8(cache),
        fp8=_is_fp8(cache),
    )
    decode_slots = None
    if score_decodes:
        decode_slots = _select_decodes(
            q[:decodes], weights[:decodes], cache, metadata, topk_indices[:decodes]
        )
    else:
        _select_all(metadata.context_lens[:decodes], topk_indices[:decodes])
    for chunk in metadata.prefill_chunks:
        rows = slice(chunk.start, chunk.end)
        if chunk.num_keys > topk:
            _select_chunk(q[rows], weights[rows], cache, metadata, chunk, topk_indices[rows])
        else:
            _select_all(metadata.context_lens[rows], topk_indices[rows])
    return decode_slots


def attend(
    mla: MLAWeights,
    q: Tensor,
    positions: Tensor,
    cache: Tensor,
    metadata: DSAMetadata,
    topk_indices: Tensor,
    decode_slots: Tensor | None,
    out: Tensor,
) -> None:
    """MLA over the selected latents: of short prefills expanded and masked, else gathered.

    Args:
        mla: the layer.
        q: [T, heads, qk_nope_head_dim + 64], before RoPE.
        positions: [T] int64.
        cache: latent cache.
        metadata: the batch; T is its num_tokens.
        topk_indices: [>= T, index_topk] int32, positions within each row's request.
        decode_slots: of the decode rows, from `select`; None: they are looked up.
        out: [T, heads, v_head_dim], written.
    """
    heads, nope, _ = mla.w_uk.shape
    masked = [
        chunk
        for chunk in metadata.prefill_chunks
        if masked_is_faster(
            q.device,
            chunk.end - chunk.start,
            chunk.num_keys,
            topk_indices.shape[1],
            heads=heads,
            width=nope + ROPE_DIM,
            v_width=mla.w_uv.shape[2],
            latent_bytes=cache.shape[2] * cache.itemsize,
        )
    ]
    for chunk in masked:
        rows = slice(chunk.start, chunk.end)
        query = _rotated(mla, q[rows], positions[rows])
        attend_masked(mla, query, cache, metadata, chunk, topk_indices[rows], out[rows])
    decodes = slice(0, metadata.num_decode_tokens)
    for rows in _other_rows(masked, metadata):
        if rows == decodes and decode_slots is not None:
            slots = decode_slots
        else:
            count("topk_slots")
            slots = topk_slots(
                topk_indices[rows],
                metadata.block_table,
                metadata.request_ids[rows],
                metadata.block_size,
            )
        count("sparse_mla")
        query = _absorbed(mla, q[rows], positions[rows])
        attended, _ = sparse_mla(
            query, cache, slots, mla.softmax_scale, topk_length=metadata.context_lens[rows]
        )
        torch.bmm(attended.transpose(0, 1), mla.w_uv, out=out[rows].transpose(0, 1))


def attend_masked(
    mla: MLAWeights,
    query: Tensor,
    cache: Tensor,
    metadata: DSAMetadata,
    chunk: PrefillChunk,
    topk_indices: Tensor,
    out: Tensor,
) -> None:
    """A chunk in the expanded form, as many heads at a time as the workspace has room for.

    Args:
        mla: the layer.
        query: [T, heads, qk_nope_head_dim + 64], its last 64 rotated; T rows of the chunk.
        cache: latent cache.
        metadata: the batch.
        chunk: the rows.
        topk_indices: [T, index_topk] int32.
        out: [T, heads, v_head_dim], written.
    """
    latent = gather_latents(cache, metadata.block_table[chunk.request], chunk.num_keys, query.dtype)
    head_bytes = chunk.num_keys * (query.shape[2] + out.shape[2]) * query.itemsize
    step = max(1, metadata.workspace_bytes // head_bytes)
    for first in range(0, query.shape[1], step):
        heads = slice(first, first + step)
        k, v = _expand(latent, mla.w_uk[heads], mla.w_uv[heads])
        count("masked_mha")
        masked_mha(query[:, heads], k, v, topk_indices, mla.softmax_scale, out=out[:, heads])


def _other_rows(chunks: list[PrefillChunk], metadata: DSAMetadata) -> list[slice]:
    """The decodes' rows, and those before, between and after chunks of the prefills."""
    decodes = metadata.num_decode_tokens
    starts = [0, decodes, *(chunk.end for chunk in chunks)]
    ends = [decodes, *(chunk.start for chunk in chunks), metadata.num_tokens]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def _expand(latent: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 576] -> k [heads, N, nope + 64] and v [heads, N, v_head_dim]."""
    heads, nope, _ = w_uk.shape
    latent, k_pe = latent.split([KV_LORA_RANK, ROPE_DIM], dim=-1)
    latents = latent.expand(heads, -1, -1)
    k = latent.new_empty(heads, len(latent), nope + ROPE_DIM)
    torch.bmm(latents, w_uk.transpose(1, 2), out=k[..., :nope])
    k[..., nope:] = k_pe
    return k, torch.bmm(latents, w_uv)


def _rotated(mla: MLAWeights, q: Tensor, positions: Tensor) -> Tensor:
    """[T, heads, nope + 64] with its last 64 rotated."""
    rotated = q.clone()
    _rotate_into(rotated, mla, q, positions)
    return rotated


def _absorbed(mla: MLAWeights, q: Tensor, positions: Tensor) -> Tensor:
    """[T, heads, nope + 64] -> [T, heads, 576]: nope through W_UK, the last 64 rotated."""
    absorbed = q.new_empty(*q.shape[:2], LATENT_DIM)
    q_nope = q[..., :-ROPE_DIM].transpose(0, 1)
    torch.bmm(q_nope, mla.w_uk, out=absorbed[..., :KV_LORA_RANK].transpose(0, 1))
    _rotate_into(absorbed, mla, q, positions)
    return absorbed


def _rotate_into(query: Tensor, mla: MLAWeights, q: Tensor, positions: Tensor) -> None:
    q_pe, out = q[..., -ROPE_DIM:], query[..., -ROPE_DIM:]
    apply_rope(q_pe, mla.rope, positions, out=out)


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
        topk_select_slots(
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
    k, k_scale = gather_index_keys(cache, metadata.block_table[chunk.request], chunk.num_keys)
    row_end = metadata.context_lens[chunk.start : chunk.end]
    count("indexer_logits")
    logits = indexer_logits(q, weights, k, torch.zeros_like(row_end), row_end, k_scale=k_scale)
    count("topk_select")
    topk_select(logits, topk_indices.shape[1], None, row_end, out=topk_indices)


def _is_fp8(index_cache: Tensor) -> bool:
    """The fp8 index cache is bytes; DeepSeek's reference rotates q and k (Hadamard) only for it."""
    return index_cache.dtype == torch.uint8
