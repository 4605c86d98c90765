"""Launch each kernel once on a GPU, so that no later request waits until Triton has compiled it.

The first pass that has caches does it: one before the capture of CUDA graphs, or the first request.
Which kernels a model's batches need follows from their shapes: the parts that a selection is split
into, the rows that a program scores, the rounds that a long row is selected from in. Batches of
such shapes go through `attention.forward` over the model's own caches, of which they write nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dsa_kernels.dims import LATENT_DIM
from dsa_kernels.dispatch import use_triton
from dsa_plugin.attention import layer as attention
from dsa_plugin.attention.metadata import DSAMetadata, PrefillChunk

_logger = logging.getLogger(__name__)
_done: set[Hashable] = set()

_REQUESTS = [1 << n for n in range(9)]  # of a decode; more fill no chip that 256 do not fill
_ROWS = [1 << n for n in range(5)]  # of a prefill; a program scores no more of them
_TIMES_TOPK = (1, 2, 4, 8)  # contexts: the last is selected from in rounds


def warm_up_once(
    mla: attention.MLAWeights,
    q: Tensor,
    indexer: attention.Indexer,
    inputs: attention.IndexerInputs,
    latent_cache: Tensor,
    index_cache: Tensor,
    metadata: DSAMetadata,
    index_topk: int,
) -> None:
    """For the first layer of its kind, on a GPU, unless a CUDA graph is being captured."""
    if not q.is_cuda or not use_triton(q.device) or torch.cuda.is_current_stream_capturing():
        return
    kind = (q.dtype, q.shape[1:], latent_cache.dtype, index_cache.dtype, index_topk)
    key = (*kind, q.device, metadata.decode_query_len)
    if key in _done:
        return
    _done.add(key)
    began = time.perf_counter()
    warm_up(mla, q, indexer, inputs, latent_cache, index_cache, metadata, index_topk)
    _logger.info("compiled DSA's kernels in %.1f s", time.perf_counter() - began)


def warm_up(
    mla: attention.MLAWeights,
    q: Tensor,
    indexer: attention.Indexer,
    inputs: attention.IndexerInputs,
    latent_cache: Tensor,
    index_cache: Tensor,
    metadata: DSAMetadata,
    index_topk: int,
) -> None:
    """Arguments as `attention.forward` takes them: of q, inputs and metadata only the kind."""
    for batch in _batches(metadata, index_topk):
        rows = batch.num_tokens
        queries = q.new_zeros(rows, *q.shape[1:])
        out = q.new_empty(rows, q.shape[1], mla.w_uv.shape[2])
        topk_indices = batch.request_ids.new_zeros(rows, index_topk)
        attention.forward(
            mla,
            queries,
            q.new_zeros(rows, LATENT_DIM),
            indexer,
            attention.IndexerInputs(
                inputs.q.new_zeros(rows, *inputs.q.shape[1:]),
                inputs.k.new_zeros(rows, *inputs.k.shape[1:]),
                inputs.weights.new_zeros(rows, *inputs.weights.shape[1:]),
            ),
            batch.slot_mapping.new_zeros(rows),
            latent_cache,
            index_cache,
            batch,
            topk_indices,
            out,
            reuse_selection=False,
        )
        for chunk in batch.prefill_chunks:
            attention.attend_masked(mla, queries, latent_cache, batch, chunk, topk_indices, out)


def _batches(like: DSAMetadata, index_topk: int) -> Iterator[DSAMetadata]:
    """Decodes of each number of requests, prefills of few rows, and both of each context."""
    contexts = [times * index_topk + 1 for times in _TIMES_TOPK]
    for requests in _REQUESTS:
        yield _decode(like, requests, contexts[0])
    for rows in _ROWS:
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
