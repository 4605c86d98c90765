"""The way of the data through one layer: projections in, heads' outputs out.

DeepSeek-V3.2-Exp report, section 2.1 (lightning indexer, fine-grained token selection): every head
attends to the same selected latents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsa_plugin.attention import ops
from dsa_plugin.attention.selection import index_query, select
from dsa_plugin.attention.sparse import attend, rotate_decodes
from dsa_plugin.attention.warm_up import warm_up_gpu

if TYPE_CHECKING:
    from torch import Tensor

    from dsa_plugin.attention.layer import Indexer, Layer, Projections
    from dsa_plugin.attention.metadata import DSAMetadata


def forward(
    layer: Layer,
    projections: Projections,
    metadata: DSAMetadata,
    topk_indices: Tensor,
    out: Tensor,
    *,
    reuse_selection: bool,
) -> None:
    """All that a host calls in a pass.

    Args:
        layer: its caches are written and read.
        projections: of T tokens, and padding, whose rows of `out` become 0.
        metadata: the batch; T is its num_tokens.
        topk_indices: [>= T, index_topk] int32, written by a layer that selects, else read.
        out: [>= T, heads, v_head_dim], written.
        reuse_selection: attend to what `topk_indices` holds, of another layer or MTP step. A layer
            with an indexer stores its keys all the same.
    """
    # Its own passes come here, too, and find that it has begun.
    warm_up_gpu(forward, layer, projections, metadata, topk_indices.shape[1])
    tokens = metadata.num_tokens
    projections = projections.first(tokens)
    query = decode_slots = check = None
    if layer.check is not None and tokens:
        keys = None if layer.indexer is None else layer.indexer.key_cache
        check = layer.check.begin(layer.latent_cache, keys, metadata, projections.positions)
    with ops.one_launch():
        write_latents(layer, projections, metadata)
        decode_query = rotate_decodes(layer.mla, projections, metadata)
        if layer.indexer is not None:
            write_index_keys(layer.indexer, projections, metadata)
            if not reuse_selection:
                query = index_query(layer.indexer, projections, metadata, topk_indices.shape[1])
    if layer.indexer is not None and not reuse_selection:
        decode_slots = select(layer.indexer, query, metadata, topk_indices)
        if check is not None:
            check.selected(query)
    rows = out[:tokens]
    attend(layer, projections, metadata, topk_indices, decode_slots, decode_query, rows, check)
    if check is not None:
        check.attended(rows)
    out[tokens:].zero_()


def write_latents(layer: Layer, projections: Projections, metadata: DSAMetadata) -> None:
    """Normalise, rotate and store this pass's latents."""
    ops.latent_cache_write(
        projections.kv,
        layer.mla.kv_norm,
        layer.mla.rope,
        projections.positions,
        layer.latent_cache,
        metadata.slot_mapping,
    )


def write_index_keys(indexer: Indexer, projections: Projections, metadata: DSAMetadata) -> None:
    """Normalise, rotate and store this pass's index keys: also where nothing will be scored.

    A later pass of the same request, or another request with the same prefix, scores them.
    """
    assert projections.index is not None
    ops.index_cache_write(
        projections.index.k,
        indexer.k_norm,
        indexer.rope,
        projections.positions,
        indexer.key_cache,
        metadata.slot_mapping,
        hadamard=indexer.is_fp8,
    )
