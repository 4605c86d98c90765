"""One layer of a request as a host calls it: cached pages, prefill chunks, then decodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_kernels.cache_write import Norm, Rope
from dsa_kernels.dims import (
    INDEX_FP8_BYTES,
    INDEX_HEAD_DIM,
    INDEX_PAGE,
    LATENT_DIM,
    LATENT_FP8_BYTES,
)
from dsa_kernels.indexer_logits.reference import gather_index_keys
from dsa_kernels.sparse_mla.reference import gather_latents
from dsa_plugin import attention
from dsa_plugin.attention.forward import write_index_keys, write_latents
from dsa_plugin.attention.metadata import DSAMetadata, split_prefill
from dsa_plugin.config import DSAConfig
from dsa_plugin.env import Env
from dsa_plugin.verification.inputs import Request, split_kv_b
from dsa_plugin.verification.reference import Maths
from dsa_plugin.verification.weights import LayerWeights

PREFILL_ROWS = 16
"""Of each of two chunks."""
DECODES = 2
_KEY_EPS = 1e-6
EARLIER_BY = 37
"""Tokens by which the request that had the pages before differs."""


@dataclass(frozen=True)
class Served:
    """What came out, of R rows, and what the caches hold, of L tokens.

    Attributes:
        topk_indices: [R, index_topk] int32, as the layer left them.
        out: [R, heads, v_head_dim].
        latents: [L, 576] fp32.
        keys: [L, 128] fp32, None without an indexer.
    """

    topk_indices: Tensor
    out: Tensor
    latents: Tensor
    keys: Tensor | None


class Pages:
    """Pages of a request in an order of their own, block 0 kept free as hosts keep it."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.count = -(-length // INDEX_PAGE)
        generator = torch.Generator().manual_seed(length)
        order = torch.randperm(self.count, generator=generator) + 1
        self.table = order.int()[None].to(device)

    def slots(self, positions: Tensor) -> Tensor:
        """[T] int64, where tokens at positions [T] lie."""
        page = self.table[0, positions // INDEX_PAGE].long()
        return page * INDEX_PAGE + positions % INDEX_PAGE


def rows_of(length: int, device: torch.device) -> Tensor:
    """Positions that are looked at in a request of so many tokens."""
    first = max(0, length - 2 * PREFILL_ROWS - DECODES)
    return torch.arange(first, length, device=device)


def bind(
    weights: LayerWeights, dsa: DSAConfig, maths: Maths, table: Tensor, dtype: torch.dtype
) -> tuple[attention.MLAWeights, attention.Indexer | None]:
    """A layer's weights as a host keeps them, its index cache empty.

    Args:
        weights: of the layer.
        dsa: its model's.
        maths: what config.json declares.
        table: of cosines and sines.
        dtype: the model's.
    """
    w_uk, w_uv = (part.to(dtype).contiguous() for part in split_kv_b(weights.kv_b_proj, dsa))
    mla = attention.MLAWeights(
        softmax_scale=maths.softmax_scale,
        kv_norm=Norm(weights.kv_a_layernorm.to(dtype), maths.rms_norm_eps),
        rope=Rope(table, interleaved=True),
        w_uk=w_uk,
        w_uv=w_uv,
    )
    if weights.indexer is None:
        return mla, None
    indexer = attention.Indexer(
        k_norm=Norm(weights.indexer.k_norm, _KEY_EPS, weights.indexer.k_norm_bias),
        rope=Rope(table, interleaved=dsa.indexer_rope_interleave),
        key_cache=table.new_empty(0),
    )
    return mla, indexer


def serve(
    mla: attention.MLAWeights,
    indexer: attention.Indexer | None,
    request: Request,
    index_topk: int,
    fp8: bool,
    shared: Tensor | None = None,
) -> Served:
    """Run the rows of a request, all tokens before them cached by earlier passes.

    Every page was another request's before, so that what is not written anew is seen.

    Args:
        mla, indexer: of `bind`.
        request: in the model's dtype.
        index_topk: keys that a row selects.
        fp8: whether both caches are fp8.
        shared: [R, index_topk] int32 that another layer selected; it is not written to.
    """
    length, device = len(request.kv), request.kv.device
    pages = Pages(length, device)
    layer = _layer(mla, indexer, pages, request.kv, fp8)
    first = int(request.rows[0])
    earlier = torch.arange(length, device=device).roll(EARLIER_BY)
    _write(layer, _parts(request, earlier), pages, length)
    _write(layer, _parts(request, torch.arange(first, device=device)), pages, first)

    indices = torch.full((len(request.rows), index_topk), -1, dtype=torch.int32, device=device)
    if shared is not None:
        indices.copy_(shared)
    heads, value_dim = mla.w_uv.shape[0], mla.w_uv.shape[2]
    out = request.q.new_empty(len(request.rows), heads, value_dim)
    for rows, decode in _passes(len(request.rows)):
        attention.forward(
            layer,
            _projections(request, rows),
            _metadata(pages, request.rows[rows], decode=decode),
            indices[rows],
            out[rows],
            reuse_selection=indexer is None,
        )
    return _read(layer, pages, length, indices, out)


def _layer(
    mla: attention.MLAWeights,
    indexer: attention.Indexer | None,
    pages: Pages,
    like: Tensor,
    fp8: bool,
) -> attention.Layer:
    def cache(width: int, fp8_bytes: int) -> Tensor:
        dtype = torch.uint8 if fp8 else like.dtype
        shape = (pages.count + 1, INDEX_PAGE, fp8_bytes if fp8 else width)
        return torch.zeros(shape, dtype=dtype, device=like.device)

    latent_cache = cache(LATENT_DIM, LATENT_FP8_BYTES)
    if indexer is not None:
        keys = cache(INDEX_HEAD_DIM, INDEX_FP8_BYTES)
        indexer = attention.Indexer(indexer.k_norm, indexer.rope, keys)
    return attention.Layer(mla, latent_cache, indexer)


def _parts(request: Request, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    return request.kv[tokens], None if request.keys is None else request.keys[tokens]


def _write(
    layer: attention.Layer, parts: tuple[Tensor, Tensor | None], pages: Pages, count: int
) -> None:
    """The first tokens of a request into its pages, as any pass writes them."""
    kv, keys = parts
    positions = torch.arange(count, device=kv.device)
    none = kv.new_empty(count, 0, 0)  # nothing is asked
    index = None
    if keys is not None:
        index = attention.IndexProjections(none, keys, none.flatten(1))
    projections = attention.Projections(none, kv, positions, index)
    metadata = _metadata(pages, positions, decode=False)
    write_latents(layer, projections, metadata)
    if layer.indexer is not None:
        write_index_keys(layer.indexer, projections, metadata)


def _passes(rows: int) -> Iterator[tuple[slice, bool]]:
    """Rows of each pass, and whether it is a decode: two chunks, then one row at a time."""
    prefilled = max(0, rows - DECODES)
    half = prefilled // 2
    yield from (
        (slice(*ends), False) for ends in ((0, half), (half, prefilled)) if ends[0] < ends[1]
    )
    yield from ((slice(row, row + 1), True) for row in range(prefilled, rows))


def _projections(request: Request, rows: slice) -> attention.Projections:
    at = request.rows[rows]
    index = None
    if request.keys is not None:
        assert request.index_q is not None
        assert request.index_weights is not None
        index = attention.IndexProjections(
            request.index_q[rows], request.keys[at], request.index_weights[rows]
        )
    return attention.Projections(request.q[rows], request.kv[at], at, index)


def _metadata(pages: Pages, positions: Tensor, *, decode: bool) -> DSAMetadata:
    rows, device = len(positions), positions.device
    context = int(positions[-1]) + 1 if rows else 0
    workspace = Env.load().logits_workspace_mb << 20
    return DSAMetadata(
        num_tokens=rows,
        num_decodes=int(decode),
        decode_query_len=1,
        max_decode_context_len=context if decode else 0,
        prefill_chunks=() if decode else split_prefill([0, rows], [context], 0, workspace),
        request_ids=torch.zeros(rows, dtype=torch.int32, device=device),
        context_lens=positions.int() + 1,
        block_table=pages.table,
        slot_mapping=pages.slots(positions),
        block_size=INDEX_PAGE,
        workspace_bytes=workspace,
    )


def _read(
    layer: attention.Layer, pages: Pages, length: int, indices: Tensor, out: Tensor
) -> Served:
    table = pages.table[0]
    keys = None
    if layer.indexer is not None:
        stored, scale = gather_index_keys(layer.indexer.key_cache, table, length)
        keys = stored.float() if scale is None else stored.float() * scale[:, None]
    latents = gather_latents(layer.latent_cache, table, length, torch.float32)
    return Served(indices, out, latents, keys)
