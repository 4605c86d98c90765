"""The host's batch -> DSAMetadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_kernels.dims import INDEX_PAGE
from dsa_plugin.attention.metadata import DSAMetadata, PrefillChunk, split_prefill


def is_uniform(forward_batch: Any) -> bool:
    """Whether every request has the same number of rows: decode, MTP's verify and draft extend."""
    mode = forward_batch.forward_mode
    return bool(mode.is_decode_or_idle() or mode.is_target_verify() or mode.is_draft_extend_v2())


@dataclass(frozen=True)
class PreparedBatch:
    """What of a pass does not change with its layers or its position in a captured graph.

    Attributes: those of DSAMetadata.
    """

    num_tokens: int
    request_ids: Tensor
    block_table: Tensor
    workspace_bytes: int
    num_decodes: int = 0
    decode_query_len: int = 0
    max_decode_context_len: int = 0
    prefill_chunks: tuple[PrefillChunk, ...] = ()

    def at(self, positions: Tensor, out_cache_loc: Tensor) -> DSAMetadata:
        """With its rows, read where the pass runs: in a captured graph, in each MTP draft step."""
        return DSAMetadata(
            num_tokens=self.num_tokens,
            num_decodes=self.num_decodes,
            decode_query_len=self.decode_query_len,
            max_decode_context_len=self.max_decode_context_len,
            prefill_chunks=self.prefill_chunks,
            request_ids=self.request_ids,
            context_lens=(positions[: self.num_tokens] + 1).to(torch.int32),
            block_table=self.block_table,
            slot_mapping=out_cache_loc[: self.num_tokens],
            block_size=INDEX_PAGE,
            workspace_bytes=self.workspace_bytes,
        )


def prepare(
    forward_batch: Any, req_to_token: Tensor, draft_tokens: int, workspace_bytes: int
) -> PreparedBatch:
    """Only host integers are read.

    Args:
        forward_batch: the host's.
        req_to_token: [requests, tokens] int32, slot of each token of each request.
        draft_tokens: how far a pass may reach beyond `seq_lens_cpu`.
        workspace_bytes: most bytes that one call's logits may take.
    """
    if is_uniform(forward_batch):
        requests, rows = forward_batch.batch_size, forward_batch.positions.shape[0]
        longest = _longest(forward_batch.seq_lens_cpu, req_to_token.shape[1] - draft_tokens)
        ids = torch.arange(rows, dtype=torch.int32, device=req_to_token.device)
        return prepare_uniform(
            block_table(req_to_token, forward_batch.req_pool_indices, longest + draft_tokens),
            ids // max(rows // max(requests, 1), 1),
            requests,
            workspace_bytes,
        )
    extend_lens = list(forward_batch.extend_seq_lens_cpu)
    lens = [
        prefix + new
        for prefix, new in zip(forward_batch.extend_prefix_lens_cpu, extend_lens, strict=True)
    ]
    starts = [0]
    for new in extend_lens:
        starts.append(starts[-1] + new)
    ids = torch.arange(len(lens), dtype=torch.int32)
    request_ids = ids.repeat_interleave(torch.tensor(extend_lens), output_size=starts[-1])
    return PreparedBatch(
        num_tokens=starts[-1],
        prefill_chunks=split_prefill(starts, lens, 0, workspace_bytes),
        request_ids=request_ids.to(req_to_token.device, non_blocking=True),
        block_table=block_table(
            req_to_token, forward_batch.req_pool_indices[: len(lens)], max(lens, default=0)
        ),
        workspace_bytes=workspace_bytes,
    )


def prepare_uniform(
    table: Tensor, request_ids: Tensor, requests: int, workspace_bytes: int
) -> PreparedBatch:
    """Of `requests` requests with as many rows each; `request_ids` [T] int32."""
    rows = request_ids.shape[0]
    return PreparedBatch(
        num_tokens=rows,
        num_decodes=requests,
        decode_query_len=rows // max(requests, 1),
        max_decode_context_len=table.shape[1] * INDEX_PAGE,
        request_ids=request_ids,
        block_table=table,
        workspace_bytes=workspace_bytes,
    )


def block_table(req_to_token: Tensor, requests: Tensor, longest: int) -> Tensor:
    """[requests, pages] int32: the page of every 64th token is that of the 63 after it."""
    return req_to_token[requests, :longest:INDEX_PAGE] // INDEX_PAGE


def _longest(seq_lens_cpu: Tensor | None, limit: int) -> int:
    """The longest context, or the limit where the host keeps no copy of the lengths."""
    return limit if seq_lens_cpu is None else max(seq_lens_cpu.tolist(), default=0)
