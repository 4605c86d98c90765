"""Paged caches, and the batches that are read and written through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsa_kernels.dims import INDEX_FP8_BYTES, INDEX_HEAD_DIM, LATENT_DIM
from dsa_plugin.attention.metadata import DSAMetadata, PrefillChunk, split_prefill
from dsa_plugin.config import DSAConfig

PAGE = 64  # tokens


@dataclass(frozen=True)
class LayerCache:
    """One layer's pages: latents [pages, 64, 576], and index keys where it has an indexer."""

    latents: Tensor
    index_keys: Tensor | None


@dataclass(frozen=True)
class Batch:
    """One pass of T tokens.

    Attributes:
        tokens: [T] int64.
        positions: [T] int64, of each in its request.
        metadata: where their requests' cache entries lie.
        topk_indices: [T, index_topk] int32, written by layers that select, read by all.
        last_rows: whose logits are wanted.
    """

    tokens: Tensor
    positions: Tensor
    metadata: DSAMetadata
    topk_indices: Tensor
    last_rows: Tensor


class PagedRequests:
    """Requests of known greatest lengths, each with pages of its own from one pool."""

    def __init__(
        self, config: DSAConfig, lengths: Sequence[int], device: torch.device, workspace_bytes: int
    ) -> None:
        """lengths: of each request, the most tokens that its caches will hold."""
        self.index_topk, self.device = config.index_topk, device
        self.workspace_bytes = workspace_bytes
        counts = [-(-length // PAGE) for length in lengths]
        self.num_pages = sum(counts)
        self.block_table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=device)
        first = 0
        for request, count in enumerate(counts):
            self.block_table[request, :count] = torch.arange(first, first + count)
            first += count

    def caches(self, config: DSAConfig, dtype: torch.dtype, *, fp8_keys: bool) -> list[LayerCache]:
        """The pool, for each layer; latents are kept in the model's dtype."""
        key_width = INDEX_FP8_BYTES if fp8_keys else INDEX_HEAD_DIM
        key_dtype = torch.uint8 if fp8_keys else dtype
        return [
            LayerCache(
                self._pages(LATENT_DIM, dtype),
                self._pages(key_width, key_dtype) if config.has_indexer(layer) else None,
            )
            for layer in range(config.num_hidden_layers)
        ]

    def prefill(self, request: int, tokens: Sequence[int], start: int) -> Batch:
        """Some more of one request's prompt, of which `start` tokens were read before."""
        rows, end = len(tokens), start + len(tokens)
        chunks = split_prefill([0, rows], [end], 0, self.workspace_bytes)
        # A chunk names its request by its row of the block table.
        chunks = tuple(replace(chunk, request=request) for chunk in chunks)
        return self._batch([request] * rows, tokens, range(start, end), chunks)

    def decode(
        self, requests: Sequence[int], tokens: Sequence[int], starts: Sequence[int]
    ) -> Batch:
        """One more token of each request, of which `starts` tokens were read before."""
        return self._batch(requests, tokens, starts, ())

    def _batch(
        self,
        requests: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        chunks: tuple[PrefillChunk, ...],
    ) -> Batch:
        rows = len(tokens)
        owner, position = self._integers(requests), self._integers(positions)
        # The core takes a decode's request i from row i of the table.
        table = self.block_table if chunks else self.block_table[owner]
        page = self.block_table[owner, position // PAGE].long()
        metadata = DSAMetadata(
            num_tokens=rows,
            num_decodes=0 if chunks else rows,
            decode_query_len=1,
            max_decode_context_len=0 if chunks else max(positions) + 1,
            prefill_chunks=chunks,
            request_ids=(owner if chunks else torch.arange(rows, device=self.device)).int(),
            context_lens=(position + 1).int(),
            block_table=table,
            slot_mapping=page * PAGE + position % PAGE,
            block_size=PAGE,
            workspace_bytes=self.workspace_bytes,
        )
        wanted = range(rows - 1, rows) if chunks else range(rows)
        return Batch(
            tokens=self._integers(tokens),
            positions=position,
            metadata=metadata,
            topk_indices=table.new_empty(rows, self.index_topk),
            last_rows=self._integers(wanted),
        )

    def _integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _pages(self, width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.num_pages, PAGE, width, dtype=dtype, device=self.device)
