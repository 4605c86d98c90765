"""MLA over the selected latents: gathered, from fp8 perhaps decoded before, or masked in all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsa_kernels.dims import KV_LORA_RANK, LATENT_DIM, ROPE_DIM
from dsa_kernels.sparse_mla import decoding_first_is_faster, masked_is_faster
from dsa_plugin.attention import ops

if TYPE_CHECKING:
    from torch import Tensor

    from dsa_plugin.attention.invariants import PassCheck
    from dsa_plugin.attention.layer import Layer, MLAWeights, Projections
    from dsa_plugin.attention.metadata import DSAMetadata, PrefillChunk


def rotate_decodes(mla: MLAWeights, projections: Projections, metadata: DSAMetadata) -> Tensor:
    """The decode rows' absorbed queries [decode tokens, heads, 576], as yet only their last 64.

    The rest is `attend`'s; these can be made along with what is written to the caches.
    """
    rows = metadata.num_decode_tokens
    q = projections.q[:rows]
    query = q.new_empty(*q.shape[:2], LATENT_DIM)
    _rotate_into(query, mla, q, projections.positions[:rows])
    return query


def attend(
    layer: Layer,
    projections: Projections,
    metadata: DSAMetadata,
    topk_indices: Tensor,
    decode_slots: Tensor | None,
    decode_query: Tensor,
    out: Tensor,
    check: PassCheck | None = None,
) -> None:
    """Each row over its selection, in the fastest of three forms.

    Chunks of short prefills are expanded and masked; of longer ones an fp8 cache is decoded first,
    once for all rows; all other rows gather what they selected.

    Args:
        layer: its latent cache is read.
        projections: of T tokens.
        metadata: the batch; T is its num_tokens.
        topk_indices: [>= T, index_topk] int32, positions within each row's request.
        decode_slots: of the decode rows, from `select`; None: they are looked up.
        decode_query: of `rotate_decodes`; the rest of it is written.
        out: [T, heads, v_head_dim], written.
        check: is shown what each row goes by.
    """
    index_topk = topk_indices.shape[1]
    done = []
    for chunk in metadata.prefill_chunks:
        if _masked_is_faster(layer, chunk, index_topk):
            attend_masked(layer, projections, metadata, chunk, topk_indices, out)
        elif _decoding_first_is_faster(layer, metadata, chunk, index_topk):
            attend_decoded(layer, projections, metadata, chunk, topk_indices, out)
        else:
            continue
        done.append(chunk)
        if check is not None:
            check.used(topk_indices, slice(chunk.start, chunk.end), None)
    decodes = slice(0, metadata.num_decode_tokens)
    for rows in _other_rows(done, metadata):
        if rows == decodes:
            query, slots = decode_query, decode_slots
            _absorb_into(query, layer.mla, projections.q[rows])
        else:
            query, slots = _absorbed(layer.mla, projections, rows), None
        if slots is None:
            slots = ops.topk_slots(
                topk_indices[rows],
                metadata.block_table,
                metadata.request_ids[rows],
                metadata.block_size,
            )
        if check is not None:
            check.used(topk_indices, rows, slots)
        _attend_gathered(layer.mla, query, metadata, rows, layer.latent_cache, slots, out)


def attend_masked(
    layer: Layer,
    projections: Projections,
    metadata: DSAMetadata,
    chunk: PrefillChunk,
    topk_indices: Tensor,
    out: Tensor,
) -> None:
    """A chunk's rows in the expanded form, as many heads at a time as the workspace has room for.

    Arguments are those of `attend`, and one of the batch's chunks.
    """
    mla, rows = layer.mla, slice(chunk.start, chunk.end)
    query = _rotated(mla, projections.q[rows], projections.positions[rows])
    topk_indices, out = topk_indices[rows], out[rows]
    table = metadata.block_table[chunk.request]
    latent = ops.gather_latents(layer.latent_cache, table, chunk.num_keys, query.dtype)
    head_bytes = chunk.num_keys * (query.shape[2] + out.shape[2]) * query.itemsize
    step = max(1, metadata.workspace_bytes // head_bytes)
    for first in range(0, query.shape[1], step):
        heads = slice(first, first + step)
        k, v = _expand(latent, mla.w_uk[heads], mla.w_uv[heads])
        ops.masked_mha(query[:, heads], k, v, topk_indices, mla.softmax_scale, out=out[:, heads])


def attend_decoded(
    layer: Layer,
    projections: Projections,
    metadata: DSAMetadata,
    chunk: PrefillChunk,
    topk_indices: Tensor,
    out: Tensor,
) -> None:
    """A chunk's rows over its request's latents in q's dtype, decoded once for all of them.

    Arguments are those of `attend`, and one of the batch's chunks.
    """
    rows, page = slice(chunk.start, chunk.end), metadata.block_size
    table, dtype = metadata.block_table[chunk.request], projections.q.dtype
    # Whole pages, as the kernel is compiled for their size; the tail, never selected, may be NaN.
    latents = ops.gather_latents(layer.latent_cache, table, _pages(chunk, page) * page, dtype)
    pages, slots = latents.unflatten(0, (-1, page)), topk_indices[rows]
    query = _absorbed(layer.mla, projections, rows)
    _attend_gathered(layer.mla, query, metadata, rows, pages, slots, out)


def reserve(q: Tensor, index_topk: int, workspace_bytes: int) -> None:
    """Take what `forward` takes at most for itself, and give it back: for a host that measures it.

    That is the workspace, and each row's slots, absorbed query, and what it attended to with its
    lse; the masked form takes less than these, and decoded latents lie in the workspace.

    Args:
        q: [T, heads, qk_nope_head_dim + 64], as `forward` takes it.
        index_topk: slots of a row.
        workspace_bytes: of the metadata.
    """
    rows, heads, _ = q.shape
    head_bytes = (LATENT_DIM + KV_LORA_RANK) * q.itemsize + torch.float32.itemsize
    row_bytes = index_topk * torch.int64.itemsize + heads * head_bytes
    torch.empty(workspace_bytes + rows * row_bytes, dtype=torch.uint8, device=q.device)


def _masked_is_faster(layer: Layer, chunk: PrefillChunk, index_topk: int) -> bool:
    heads, nope, _ = layer.mla.w_uk.shape
    return masked_is_faster(
        layer.latent_cache.device,
        chunk.end - chunk.start,
        chunk.num_keys,
        index_topk,
        heads=heads,
        width=nope + ROPE_DIM,
        v_width=layer.mla.w_uv.shape[2],
    )


def _decoding_first_is_faster(
    layer: Layer, metadata: DSAMetadata, chunk: PrefillChunk, index_topk: int
) -> bool:
    """And there is room for all latents of the request."""
    keys = _pages(chunk, metadata.block_size) * metadata.block_size
    itemsize = layer.mla.w_uk.itemsize
    if keys * LATENT_DIM * itemsize > metadata.workspace_bytes:
        return False
    rows = chunk.end - chunk.start
    return decoding_first_is_faster(layer.latent_cache, rows, keys, index_topk)


def _pages(chunk: PrefillChunk, block_size: int) -> int:
    return -(-chunk.num_keys // block_size)


def _attend_gathered(
    mla: MLAWeights,
    query: Tensor,
    metadata: DSAMetadata,
    rows: slice,
    cache: Tensor,
    slots: Tensor,
    out: Tensor,
) -> None:
    """Rows over the entries of `cache` that `slots` [rows, index_topk] name, into `out[rows]`."""
    lens = metadata.context_lens[rows]
    attended, _ = ops.sparse_mla(query, cache, slots, mla.softmax_scale, topk_length=lens)
    torch.bmm(attended.transpose(0, 1), mla.w_uv, out=out[rows].transpose(0, 1))


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


def _absorbed(mla: MLAWeights, projections: Projections, rows: slice) -> Tensor:
    """[rows, heads, 576]: nope through W_UK, the last 64 rotated."""
    q = projections.q[rows]
    query = q.new_empty(*q.shape[:2], LATENT_DIM)
    _absorb_into(query, mla, q)
    _rotate_into(query, mla, q, projections.positions[rows])
    return query


def _absorb_into(query: Tensor, mla: MLAWeights, q: Tensor) -> None:
    q_nope, out = q[..., :-ROPE_DIM], query[..., :KV_LORA_RANK]
    torch.bmm(q_nope.transpose(0, 1), mla.w_uk, out=out.transpose(0, 1))


def _rotate_into(query: Tensor, mla: MLAWeights, q: Tensor, positions: Tensor) -> None:
    q_pe, out = q[..., -ROPE_DIM:], query[..., -ROPE_DIM:]
    ops.apply_rope(q_pe, mla.rope, positions, out=out)
