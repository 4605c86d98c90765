"""The host's batch -> DSAMetadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from dsa_plugin.attention import pass_record, warm_up_cpu
from dsa_plugin.attention.metadata import DSAMetadata, PrefillChunk, split_prefill
from dsa_plugin.env import Env
from dsa_plugin.hosts.vllm.compat import host_side_seq_lens

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


class DSAMetadataBuilder(AttentionMetadataBuilder[DSAMetadata]):
    """Builds one batch's metadata; per-row tensors live in buffers allocated once.

    A captured decode graph reads `request_ids` and `context_lens` from these buffers and the rest
    from the host's own, so replaying it with a new batch only needs the buffers refilled.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._rows = torch.arange(max_tokens, dtype=torch.int32, device=device)
        self._request_ids = torch.empty(max_tokens, dtype=torch.int32, device=device)
        self._context_lens = torch.empty(max_tokens, dtype=torch.int32, device=device)
        self._workspace_bytes = Env.load().logits_workspace_mb << 20
        self._record = pass_record(device)
        # Built before the server answers; the profiling run is one that CPUs do without.
        warm_up_cpu(device, kv_cache_spec.dtype)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DSAMetadata:
        if self._record is not None:
            self._record.begin_pass()
        batch = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            batch, decode_threshold=self.reorder_batch_threshold or 1, require_uniform=True
        )
        num_tokens, num_reqs = batch.num_actual_tokens, batch.num_reqs
        query_start = batch.query_start_loc[: num_reqs + 1]
        seq_lens = batch.seq_lens[:num_reqs]

        # Row t belongs to the last request that starts at or before it; it sees the context up to
        # and including itself.
        request_ids = self._request_ids[:num_tokens]
        request_ids.copy_(
            torch.searchsorted(query_start[1:], self._rows[:num_tokens], right=True).clamp_(
                max=num_reqs - 1
            )
        )
        after = query_start[1:][request_ids] - self._rows[:num_tokens] - 1
        context_lens = self._context_lens[:num_tokens]
        # Rows that only pad a captured graph have no context.
        context_lens.copy_((seq_lens[request_ids] - after.clamp_(min=0)).clamp_(min=0))

        max_decode_context_len = batch.max_seq_len
        prefill_chunks: tuple[PrefillChunk, ...] = ()
        if num_prefills:
            host_seq_lens = host_side_seq_lens(batch)
            max_decode_context_len = max(host_seq_lens[:num_decodes], default=0)
            prefill_chunks = split_prefill(
                batch.query_start_loc_cpu[: num_reqs + 1].tolist(),
                host_seq_lens,
                num_decodes,
                self._workspace_bytes,
            )
        return DSAMetadata(
            num_tokens=num_tokens,
            num_decodes=num_decodes,
            decode_query_len=num_decode_tokens // max(num_decodes, 1),
            max_decode_context_len=max_decode_context_len,
            prefill_chunks=prefill_chunks,
            request_ids=request_ids,
            context_lens=context_lens,
            block_table=batch.block_table_tensor,
            slot_mapping=batch.slot_mapping[:num_tokens],
            block_size=self.kv_cache_spec.block_size,
            workspace_bytes=self._workspace_bytes,
        )
