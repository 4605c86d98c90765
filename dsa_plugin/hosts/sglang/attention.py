"""Sparse MLA of one layer and its indexer, in the place of SGLang's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
    AttnForwardMethod,
)
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from dsa_kernels.cache_write import Norm, Rope
from dsa_kernels.dims import INDEX_HEAD_DIM, LATENT_DIM
from dsa_plugin import attention
from dsa_plugin.config import DSAConfig
from dsa_plugin.hosts.sglang.backend import DSABackend
from dsa_plugin.hosts.sglang.compat import attn_tp_context, record_selection


class DSAIndexer(nn.Module):
    """The lightning indexer's projections, under the host's parameter names.

    Takes the arguments of the host's Indexer, and what later versions add.
    """

    def __init__(
        self,
        hidden_size: int,
        index_n_heads: int,
        q_lora_rank: int,
        config: Any,
        quant_config: Any = None,
        prefix: str = "",
        **host_kwargs: Any,
    ) -> None:
        super().__init__()
        self.num_heads = index_n_heads
        dsa = DSAConfig.from_hf(config)
        self.index_topk = dsa.index_topk
        self.interleaved = dsa.indexer_rope_interleave
        self.wq_b = ReplicatedLinear(
            q_lora_rank,
            index_n_heads * INDEX_HEAD_DIM,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("wq_b", prefix),
        )
        # As the host fuses them on CUDA: unquantised, whatever the model's quantisation.
        self.wk_weights_proj = ReplicatedLinear(
            hidden_size,
            INDEX_HEAD_DIM + index_n_heads,
            bias=False,
            prefix=add_prefix("wk_weights_proj", prefix),
        )
        self.k_norm = nn.LayerNorm(INDEX_HEAD_DIM, eps=1e-6, dtype=torch.float32)

    def forward(self, hidden_states: Tensor, q_latent: Tensor) -> attention.IndexProjections:
        """hidden_states [T, hidden_size], q_latent [T, q_lora_rank], the query's normed latent."""
        q = self.wq_b(q_latent)[0].view(-1, self.num_heads, INDEX_HEAD_DIM)
        k, weights = self.wk_weights_proj(hidden_states)[0].split(
            [INDEX_HEAD_DIM, self.num_heads], dim=-1
        )
        return attention.IndexProjections(q, k, weights)

    def weight_of(self, projection: str) -> Tensor:
        """The rows of `wk_weights_proj` that are `wk` or `weights_proj`: [rows, hidden_size]."""
        weight = cast(Tensor, self.wk_weights_proj.weight).data
        return weight[:INDEX_HEAD_DIM] if projection == "wk" else weight[INDEX_HEAD_DIM:]

    def bound(self, cos_sin_cache: Tensor, key_cache: Tensor) -> attention.Indexer:
        """What the core needs of it."""
        return attention.Indexer(
            k_norm=Norm(self.k_norm.weight, self.k_norm.eps, self.k_norm.bias),
            rope=Rope(cos_sin_cache, self.interleaved),
            key_cache=key_cache,
        )


class DSAAttention(DeepseekV2AttentionMLA):
    """The host's layer with its forward replaced from the latents on.

    Projections, their sharding and the hand-over of topk_indices from layer to layer and from one
    MTP step to the next are the host's.
    """

    indexer: DSAIndexer | None
    mla: attention.MLAWeights | None = None
    check: attention.LayerCheck | None = None

    def read_weights(self) -> None:
        """Take the absorbed weights that the host made of kv_b_proj, after each load of weights."""
        assert self.w_kc is not None
        assert self.w_vc is not None
        assert self.rotary_emb is not None
        dtype = self.kv_a_layernorm.weight.dtype
        w_uk, w_uv = (self._unquantised(weight, dtype) for weight in (self.w_kc, self.w_vc))
        if self.mla is not None:
            self.mla.reload(w_uk, w_uv)
            return
        name = f"{self.layer_id} of the draft" if self.is_nextn else str(self.layer_id)
        self.check = attention.layer_check(name, written_by_us_alone=True)
        self.mla = attention.MLAWeights(
            softmax_scale=self.scaling,
            kv_norm=Norm(self.kv_a_layernorm.weight, self.kv_a_layernorm.variance_epsilon),
            rope=Rope(self.rotary_emb.cos_sin_cache, interleaved=True),
            w_uk=w_uk,
            w_uv=w_uv,
        )

    def bound(self, backend: DSABackend) -> attention.Layer:
        """Weights and caches as they are now: the host may allocate caches again."""
        assert self.mla is not None
        assert self.rotary_emb is not None
        if self.mla.rope.cos_sin_cache is not self.rotary_emb.cos_sin_cache:
            # After the load the host lengthens its table for the context that it will accept.
            rope = Rope(self.rotary_emb.cos_sin_cache, interleaved=True)
            self.mla = replace(self.mla, rope=rope)
        indexer = None
        if self.indexer is not None:
            cache = backend.index_cache(self.layer_id)
            indexer = self.indexer.bound(self.mla.rope.cos_sin_cache, cache)
        latents = backend.latent_cache(self.layer_id)
        return attention.Layer(self.mla, latents, indexer, self.check)

    def _unquantised(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The host makes per-tensor fp8 of some kv_b_proj; our products are not fp8."""
        return weight if weight.dtype == dtype else weight.to(dtype) * self.w_scale

    def dispatch_attn_forward_method(self, forward_batch: Any) -> AttnForwardMethod:
        """Absorbed, always: the host would run a prefill without prefix as dense MHA."""
        return AttnForwardMethod.MLA

    def forward_absorb_prepare(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: Any,
        zero_allocator: Any,
        llama_4_scaling: Tensor | None = None,
        prev_topk_indices: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Projections; the result is `forward_absorb_core`'s arguments."""
        latents = attn_tp_context().fetch_qkv_latent()
        q_latent, kv = latents.split([self.q_lora_rank, LATENT_DIM], dim=-1)
        q_latent = self.q_a_layernorm(q_latent)
        q = self.q_b_proj_forward(q_latent)
        index = None if self.indexer is None else self.indexer(hidden_states, q_latent)
        return q, kv, index, positions, forward_batch, prev_topk_indices

    def forward_absorb_core(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q: Tensor,
        kv: Tensor,
        index: attention.IndexProjections | None,
        positions: Tensor,
        forward_batch: Any,
        prev_topk_indices: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention and output projection -> hidden states, and topk_indices for who shares them.

        topk_indices are [T, index_topk] int32, positions within the row's request: the same for
        every rank, page table and step.
        """
        backend = cast(DSABackend, get_attn_backend())
        reuse = not self.should_run_indexer(prev_topk_indices)
        topk_indices = prev_topk_indices
        if not reuse:
            assert self.indexer is not None
            topk_indices = torch.full(
                (q.shape[0], self.indexer.index_topk), -1, dtype=torch.int32, device=q.device
            )
        if topk_indices is None:
            raise RuntimeError(
                f"layer {self.layer_id} reuses the selection of a layer below it, but the host "
                "handed none on"
            )
        out = q.new_empty(q.shape[0], self.num_local_heads, self.v_head_dim)
        attention.forward(
            self.bound(backend),
            attention.Projections(q, kv, positions, index),
            backend.batch(forward_batch, positions, self.layer_id),
            topk_indices,
            out,
            reuse_selection=reuse,
        )
        record_selection(self.layer_id, topk_indices)
        hidden = self.o_proj(out.flatten(1))[0]
        return hidden, topk_indices if self.next_skip_topk else None
