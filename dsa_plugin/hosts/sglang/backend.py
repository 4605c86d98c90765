"""Our attention backend: it builds metadata and hands out caches; attention is the layer's.

Ready for CUDA graphs: a captured decode pass reads block table and rows from buffers allocated
once, and everything that changes within the graph from the host's own static tensors.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.runtime_context import get_spec
from torch import Tensor

from dsa_kernels.dims import INDEX_FP8_BYTES, INDEX_HEAD_DIM, INDEX_PAGE
from dsa_plugin.attention import pass_record, warm_up_cpu
from dsa_plugin.attention.metadata import DSAMetadata
from dsa_plugin.env import Env
from dsa_plugin.hosts.sglang.metadata import (
    PreparedBatch,
    block_table,
    prepare,
    prepare_uniform,
)
from dsa_plugin.hosts.sglang.names import BACKEND


class DSABackend(AttentionBackend):
    """One runner's backend: the target's, the MTP draft's, or one step of the draft's.

    Attributes:
        req_to_token_pool, token_to_kv_pool: where the host's forward context looks for them.
        prepared: the coming pass's batch.
    """

    prepared: PreparedBatch

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.device = runner.device
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self._draft_tokens = get_spec().speculative_num_draft_tokens or 0
        self._workspace_bytes = Env.load().logits_workspace_mb << 20
        self._record = pass_record(torch.device(self.device))
        # Built after the caches and before the server answers.
        index_dtype = self.token_to_kv_pool.index_k_with_scale_buffer_dtype
        warm_up_cpu(torch.device(self.device), index_dtype)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self._begin_pass(forward_batch)
        self.prepared = prepare(
            forward_batch,
            self.req_to_token_pool.req_to_token,
            self._draft_tokens,
            self._workspace_bytes,
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        tokens = self.req_to_token_pool.req_to_token
        pages = -(-tokens.shape[1] // INDEX_PAGE)
        self._block_table = torch.zeros(max_bs, pages, dtype=torch.int32, device=tokens.device)
        self._rows = torch.arange(max_num_tokens, dtype=torch.int32, device=tokens.device)
        self._request_ids: dict[int, Tensor] = {}  # by rows of each request

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self._begin_pass(forward_batch)
        tokens = self.req_to_token_pool.req_to_token
        requests = forward_batch.batch_size
        table = self._block_table[:requests]
        pool_indices = forward_batch.req_pool_indices[:requests]
        table.copy_(block_table(tokens, pool_indices, tokens.shape[1]))
        rows = forward_batch.positions.shape[0]
        query_len = max(rows // max(requests, 1), 1)
        if query_len not in self._request_ids:
            self._request_ids[query_len] = self._rows // query_len
        self.prepared = prepare_uniform(
            table, self._request_ids[query_len][:rows], requests, self._workspace_bytes
        )

    def _begin_pass(self, forward_batch: Any) -> None:
        if self._record is not None:
            self._record.begin_pass(forward_batch.rids or ())

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def batch(self, forward_batch: Any, positions: Tensor, layer: int) -> DSAMetadata:
        """The pass's metadata; computed by its first layer, in the graph if there is one."""
        if layer == self.token_to_kv_pool.start_layer:
            self._batch = self.prepared.at(positions, forward_batch.out_cache_loc)
        return self._batch

    def latent_cache(self, layer: int) -> Tensor:
        """[pages, 64, 576], or [pages, 64, 656] uint8."""
        cache: Tensor = self.token_to_kv_pool.get_key_buffer(layer)
        if cache.dtype.itemsize == 1:
            cache = cache.view(torch.uint8)
        return cache.view(-1, INDEX_PAGE, cache.shape[-1])

    def index_cache(self, layer: int) -> Tensor:
        """[pages, 64, 132] uint8, or [pages, 64, 128] in the model's dtype."""
        cache: Tensor = self.token_to_kv_pool.get_index_k_with_scale_buffer(layer)
        width = INDEX_FP8_BYTES if cache.dtype == torch.uint8 else INDEX_HEAD_DIM
        return cache.view(-1, INDEX_PAGE, width)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"attention backend {BACKEND} serves DeepSeek Sparse Attention alone; a speculative "
            "draft with another attention needs --speculative-draft-attention-backend"
        )


class DSADraftBackend:
    """The steps of an MTP draft after its first: one backend each, since graphs read theirs."""

    needs_cpu_seq_lens = True

    def __init__(self, runner: Any, steps: int) -> None:
        self.attn_backends = [DSABackend(runner) for _ in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Nothing: `DSABackend.batch` does it within the pass."""


register_attention_backend(BACKEND)(DSABackend)
