"""A host of two requests and two layers, small enough to plant a fault in any part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsa_kernels.cache_write import Norm, Rope
from dsa_kernels.testing import make_cos_sin_cache, make_index_cache, make_latent_cache
from dsa_plugin import attention
from dsa_plugin.attention.metadata import DSAMetadata, split_prefill
from dsa_plugin.attention.violation import Record

HEADS, NOPE, V_HEAD_DIM, INDEX_HEADS, TOPK, BLOCKS, LONGEST = 2, 32, 32, 4, 16, 24, 512


@dataclass
class Host:
    """Two requests, a and b, of one layer: pages are handed out as a host does, and may be taken.

    Attributes:
        lens: tokens that each has in the caches.
        pages: of each.
        padding: rows, as of a captured graph, that come after each decode.
    """

    record: Record
    cache_dtype: torch.dtype = torch.float32
    block_size: int = 16
    query_len: int = 1
    padding: tuple[int, ...] = ()
    written_by_us_alone: bool = True
    workspace_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        table = make_cos_sin_cache(LONGEST)
        mla = attention.MLAWeights(
            softmax_scale=0.1,
            kv_norm=Norm(torch.ones(512), 1e-6),
            rope=Rope(table, interleaved=True),
            w_uk=torch.randn(HEADS, NOPE, 512) / 23,
            w_uv=torch.randn(HEADS, 512, V_HEAD_DIM) / 23,
        )
        self.indexer = attention.Indexer(
            k_norm=Norm(torch.ones(128), 1e-6, torch.zeros(128)),
            rope=Rope(table, interleaved=False),
            key_cache=make_index_cache(self.cache_dtype, BLOCKS, self.block_size, gap=64),
        )
        self.layer = attention.Layer(
            mla,
            make_latent_cache(self.cache_dtype, BLOCKS, self.block_size, gap=64),
            self.indexer,
            attention.layer_check("under test", written_by_us_alone=self.written_by_us_alone),
        )
        self.sharing = replace(
            self.layer,
            latent_cache=make_latent_cache(self.cache_dtype, BLOCKS, self.block_size),
            indexer=None,
            check=attention.layer_check("sharing", written_by_us_alone=self.written_by_us_alone),
        )
        self.free = torch.randperm(BLOCKS - 1).add(1).tolist()
        self.lens: list[int] = [0, 0]
        self.pages: list[list[int]] = [[], []]
        self.spoil: Callable[[attention.Projections], None] = lambda _projections: None

    def prefill(self, *tokens: int) -> None:
        """So many more of each request, as prefills."""
        self._pass(list(tokens), decode=False)

    def decode(self, times: int = 1) -> None:
        for _ in range(times):
            self._pass([self.query_len] * len(self.lens), decode=True)

    def end(self, request: int) -> None:
        """The request's pages go to others."""
        self.free += self.pages[request]
        self.lens[request], self.pages[request] = 0, []

    def metadata(self, new: list[int], *, decode: bool) -> tuple[DSAMetadata, Tensor]:
        """With the positions of its rows."""
        for request, more in enumerate(new):
            self.lens[request] += more
            while len(self.pages[request]) * self.block_size < self.lens[request]:
                self.pages[request].append(self.free.pop(0))
        table = torch.zeros(len(new), LONGEST // self.block_size, dtype=torch.int32)
        for request, owned in enumerate(self.pages):
            table[request, : len(owned)] = torch.tensor(owned, dtype=torch.int32)
        ids = torch.arange(len(new)).repeat_interleave(torch.tensor(new))
        spans = zip(self.lens, new, strict=True)
        positions = torch.cat([torch.arange(end - more, end) for end, more in spans])
        pages = table[ids, positions // self.block_size].long()
        slots = pages * self.block_size + positions % self.block_size
        starts = torch.tensor([0, *new]).cumsum(0).tolist()
        chunks = () if decode else split_prefill(starts, self.lens, 0, self.workspace_bytes)
        metadata = DSAMetadata(
            num_tokens=len(ids),
            num_decodes=len(new) if decode else 0,
            decode_query_len=self.query_len,
            max_decode_context_len=max(self.lens) if decode else 0,
            prefill_chunks=chunks,
            request_ids=ids.int(),
            context_lens=positions.int() + 1,
            block_table=table,
            slot_mapping=slots,
            block_size=self.block_size,
            workspace_bytes=self.workspace_bytes,
        )
        return metadata, positions

    def _pass(self, new: list[int], *, decode: bool) -> None:
        metadata, positions = self.metadata(new, decode=decode)
        if decode and self.padding:
            metadata, positions = padded(metadata, positions, self.padding)
        self.run(metadata, positions)

    def run(self, metadata: DSAMetadata, positions: Tensor) -> None:
        """Through both layers."""
        self.record.begin_pass(["a", "b"])
        rows = len(positions)
        topk_indices = torch.full((rows, TOPK), -7, dtype=torch.int32)
        for layer in (self.layer, self.sharing):
            projections = attention.Projections(
                torch.randn(rows, HEADS, NOPE + 64),
                torch.randn(rows, 576),
                positions,
                None
                if layer.indexer is None
                else attention.IndexProjections(
                    torch.randn(rows, INDEX_HEADS, 128),
                    torch.randn(rows, 128),
                    torch.randn(rows, INDEX_HEADS),
                ),
            )
            if layer.indexer is not None:
                self.spoil(projections)
            attention.forward(
                layer,
                projections,
                metadata,
                topk_indices,
                torch.empty(rows, HEADS, V_HEAD_DIM),
                reuse_selection=layer.indexer is None,
            )


def padded(
    metadata: DSAMetadata, positions: Tensor, slots: tuple[int, ...]
) -> tuple[DSAMetadata, Tensor]:
    """Requests more, whose rows go to `slots`: -1, without a context, or block 0, of one token."""
    query_len = metadata.decode_query_len
    more = torch.tensor(slots).repeat_interleave(query_len)
    requests = len(metadata.block_table) + torch.arange(len(slots))
    wide = replace(
        metadata,
        num_tokens=metadata.num_tokens + len(more),
        num_decodes=metadata.num_decodes + len(slots),
        request_ids=torch.cat((metadata.request_ids, requests.repeat_interleave(query_len).int())),
        context_lens=torch.cat((metadata.context_lens, (more >= 0).int())),
        block_table=torch.cat(
            (metadata.block_table, metadata.block_table[:1].expand(len(slots), -1))
        ),
        slot_mapping=torch.cat((metadata.slot_mapping, more)),
    )
    return wide, torch.cat((positions, torch.zeros_like(more)))
