"""What the first request would otherwise wait for: on a CPU a compiled function, on a GPU kernels.

On a GPU each kernel is launched once by the first pass that has caches, one before the capture of
CUDA graphs or the first request, so that none waits later until Triton has compiled it.
Which kernels a model's batches need follows from their shapes: the parts that a selection is split
into, the rows that a program scores, the parts that a long row is selected from in. Batches of
such shapes go through `attention.forward` over the model's own caches, of which they write nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dsa_kernels.dispatch import use_triton
from dsa_kernels.indexer_logits import warm_up_indexer
from dsa_plugin.attention.layer import IndexProjections, Layer, Projections
from dsa_plugin.attention.metadata import DSAMetadata, PrefillChunk
from dsa_plugin.attention.sparse import attend_decoded, attend_masked

Forward = Callable[..., None]
"""`attention.forward`."""

_logger = logging.getLogger(__name__)
_done: set[Hashable] = set()

_REQUESTS = [1 << n for n in range(9)]  # of a decode; more fill no chip that 256 do not fill
_ROWS = [1 << n for n in range(5)]  # of a prefill; a program scores no more of them
_MANY_ROWS = _REQUESTS[-1]  # of a prefill, whose selections are not split
_TIMES_TOPK = (1, 2, 4, 8)  # contexts: the last is selected from in parts


def warm_up_cpu(device: torch.device, index_cache_dtype: torch.dtype) -> None:
    """Compile what a CPU's first request would wait for; a host calls it before it serves."""
    warm_up_indexer(device, index_cache_dtype)


def warm_up_gpu(
    forward: Forward,
    layer: Layer,
    projections: Projections,
    metadata: DSAMetadata,
    index_topk: int,
) -> None:
    """Compile what a GPU's kernels need, in the first pass of an indexer's layer of each kind.

    Not while a CUDA graph is captured. Arguments are those of `attention.forward`, and that.
    """
    q = projections.q
    if not q.is_cuda or not use_triton(q.device) or torch.cuda.is_current_stream_capturing():
        return
    if layer.indexer is None:
        return
    caches = (layer.latent_cache.dtype, layer.indexer.key_cache.dtype)
    kind = (q.device, q.dtype, q.shape[1:], *caches, index_topk, metadata.decode_query_len)
    if kind in _done:
        return
    _done.add(kind)
    began = time.perf_counter()
    launch_all(forward, layer, projections, metadata, index_topk)
    _logger.info("compiled DSA's kernels in %.1f s", time.perf_counter() - began)


def launch_all(
    forward: Forward,
    layer: Layer,
    like: Projections,
    metadata: DSAMetadata,
    index_topk: int,
) -> None:
    """Every kernel that batches of such projections and metadata can need."""
    layer = replace(layer, check=None)  # what these batches read was written by nobody
    for number, batch in enumerate(_batches(metadata, index_topk)):
        projections = _zeros(like, batch.num_tokens)
        out = like.q.new_empty(*projections.q.shape[:2], layer.mla.w_uv.shape[2])
        topk_indices = batch.request_ids.new_zeros(batch.num_tokens, index_topk)
        forward(layer, projections, batch, topk_indices, out, reuse_selection=False)
        if number == 0:
            # What is written in one launch without index queries, and without index keys.
            for each in (layer, replace(layer, indexer=None)):
                forward(each, projections, batch, topk_indices, out, reuse_selection=True)
        for chunk in batch.prefill_chunks:
            attend_masked(layer, projections, batch, chunk, topk_indices, out)
            if layer.latent_cache.dtype == torch.uint8:
                attend_decoded(layer, projections, batch, chunk, topk_indices, out)


def _zeros(like: Projections, rows: int) -> Projections:
    def zeros(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(rows, *tensor.shape[1:])

    index = like.index and IndexProjections(
        zeros(like.index.q), zeros(like.index.k), zeros(like.index.weights)
    )
    return Projections(zeros(like.q), zeros(like.kv), zeros(like.positions), index)


def _batches(like: DSAMetadata, index_topk: int) -> Iterator[DSAMetadata]:
    """Decodes of each number of requests, prefills of few and many rows, both of each context."""
    contexts = [times * index_topk + 1 for times in _TIMES_TOPK]
    for requests in _REQUESTS:
        yield _decode(like, requests, contexts[0])
    for rows in (*_ROWS, _MANY_ROWS):
        yield _prefill(like, rows, contexts[0])
    for context in contexts[1:]:
        yield _decode(like, 1, context)
        yield _prefill(like, _ROWS[-1], context)


def _decode(like: DSAMetadata, requests: int, context: int) -> DSAMetadata:
    rows = requests * like.decode_query_len
    return replace(
        _batch(like, requests, rows, context),
        num_decodes=requests,
        max_decode_context_len=context,
    )


def _prefill(like: DSAMetadata, rows: int, context: int) -> DSAMetadata:
    chunk = PrefillChunk(request=0, start=0, end=rows, num_keys=context)
    return replace(_batch(like, 1, rows, context), prefill_chunks=(chunk,))


def _batch(like: DSAMetadata, requests: int, rows: int, context: int) -> DSAMetadata:
    """Rows that see the first page of the cache over and over, and whose own goes nowhere."""
    blocks = -(-context // like.block_size)
    return replace(
        like,
        num_tokens=rows,
        num_decodes=0,
        max_decode_context_len=0,
        prefill_chunks=(),
        request_ids=like.request_ids.new_zeros(rows),
        context_lens=like.context_lens.new_full((rows,), context),
        block_table=like.block_table.new_zeros(requests, blocks),
        slot_mapping=like.slot_mapping.new_full((rows,), -1),
    )
