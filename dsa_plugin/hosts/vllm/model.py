"""vLLM's DeepSeek-V3.2 / GLM-5 models with the attention swapped for ours.

The host builds everything it builds for these models: embeddings, norms, MoE, every projection of
the attention and of the MTP draft, with its own parameter names, quantisation and sharding.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    get_and_maybe_dequant_weights,
)
from vllm.model_executor.models.deepseek_mtp import DeepSeekMTP
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM

from dsa_kernels.cache_write import Norm, Rope
from dsa_kernels.dims import INDEX_FP8_BYTES, INDEX_HEAD_DIM, LATENT_DIM, LATENT_FP8_BYTES
from dsa_plugin.attention import layer as attention
from dsa_plugin.hosts.vllm.attention_op import dsa_attention
from dsa_plugin.hosts.vllm.backend import DSABackend
from dsa_plugin.hosts.vllm.compat import attention_classes, cache_spec, keep_weight_readable
from dsa_plugin.hosts.vllm.config_hook import index_cache_is_fp8


class DSAForCausalLM(DeepseekV2ForCausalLM):
    """DeepseekV32ForCausalLM and GlmMoeDsaForCausalLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with _our_attention():
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class DSAMTP(DeepSeekMTP):
    """The multi-token-prediction draft; before 0.30 its architecture name covers dense V3 too."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        dsa = hasattr(vllm_config.model_config.hf_config, "index_topk")
        with _our_attention() if dsa else nullcontext():
            super().__init__(vllm_config=vllm_config, prefix=prefix)


def _our_attention() -> AbstractContextManager[None]:
    return attention_classes(Indexer=DSAIndexer, MultiHeadLatentAttentionWrapper=DSAAttention)


class CacheLayer(nn.Module, AttentionLayerBase):
    """One paged cache of one layer; the host allocates, shares and evicts its pages.

    Attributes:
        kv_cache: [num_blocks, block_size, head_size], a strided view into the host's buffer.
    """

    def __init__(
        self,
        prefix: str,
        head_size: int,
        dtype: torch.dtype,
        block_size: int,
        *,
        index_keys: bool,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.head_size = head_size
        self.dtype = dtype
        self.block_size = block_size
        self.index_keys = index_keys
        self.kv_cache = torch.tensor([])
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache.squeeze(1) if kv_cache.ndim == 4 else kv_cache

    def get_attn_backend(self) -> type[DSABackend]:
        return DSABackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        return cache_spec(
            vllm_config.cache_config.block_size,
            self.head_size,
            self.dtype,
            indexer=self.index_keys,
        )


class DSAIndexer(nn.Module):
    """The lightning indexer's projections and key cache, under the host's parameter names.

    Takes the arguments of the host's Indexer, and what later versions add.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: Any,
        hidden_size: int,
        q_lora_rank: int,
        quant_config: Any,
        cache_config: CacheConfig,
        topk_indices_buffer: Tensor,
        prefix: str = "",
        **host_kwargs: Any,
    ) -> None:
        super().__init__()
        self.constants: attention.Indexer
        self.num_heads = config.index_n_heads
        self.interleaved = bool(config.indexer_rope_interleave)
        self.wq_b = ReplicatedLinear(
            q_lora_rank,
            self.num_heads * INDEX_HEAD_DIM,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.wq_b",
        )
        # One projection of both, unquantised, as the host's load_weights expects.
        self.wk_weights_proj = MergedColumnParallelLinear(
            hidden_size,
            [INDEX_HEAD_DIM, self.num_heads],
            bias=False,
            quant_config=None,
            disable_tp=True,
            prefix=f"{prefix}.wk_weights_proj",
        )
        self.k_norm = nn.LayerNorm(INDEX_HEAD_DIM, eps=1e-6, dtype=torch.float32)
        fp8 = index_cache_is_fp8()
        self.k_cache = CacheLayer(
            f"{prefix}.k_cache",
            INDEX_FP8_BYTES if fp8 else INDEX_HEAD_DIM,
            torch.uint8 if fp8 else vllm_config.model_config.dtype,
            cache_config.block_size,
            index_keys=True,
        )

    def forward(self, hidden_states: Tensor, q_latent: Tensor) -> attention.IndexerInputs:
        """hidden_states [T, hidden_size], q_latent [T, q_lora_rank], the query's normed latent."""
        k, weights = self.wk_weights_proj(hidden_states)[0].split(
            [INDEX_HEAD_DIM, self.num_heads], dim=-1
        )
        q = self.wq_b(q_latent)[0].view(-1, self.num_heads, INDEX_HEAD_DIM)
        return attention.IndexerInputs(q, k, weights)


class DSAAttention(CacheLayer):
    """Sparse MLA of one layer, in the place of the host's MultiHeadLatentAttentionWrapper.

    Takes that class's arguments, and what later versions add. The host's `mla_attn` attribute names
    this object; its MTP proposer sets `skip_topk` and reads `topk_indices_buffer` through it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        scale: float,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int,
        kv_lora_rank: int,
        mla_modules: Any,
        cache_config: CacheConfig,
        quant_config: Any = None,
        prefix: str = "",
        skip_topk: bool = False,
        **host_kwargs: Any,
    ) -> None:
        model_dtype = get_current_vllm_config().model_config.dtype
        fp8 = cache_config.cache_dtype == "fp8_ds_mla"
        super().__init__(
            f"{prefix}.attn",
            LATENT_FP8_BYTES if fp8 else LATENT_DIM,
            torch.uint8 if fp8 else model_dtype,
            cache_config.block_size,
            index_keys=False,
        )
        self.num_heads = num_heads
        self.softmax_scale = scale
        self.q_lora_rank = q_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.v_head_dim = v_head_dim
        self.fused_qkv_a_proj = mla_modules.fused_qkv_a_proj
        self.q_a_layernorm = mla_modules.q_a_layernorm
        self.q_b_proj = mla_modules.q_b_proj
        self.kv_a_layernorm = mla_modules.kv_a_layernorm
        self.kv_b_proj = mla_modules.kv_b_proj
        self.rotary_emb = mla_modules.rotary_emb
        self.o_proj = mla_modules.o_proj
        self.indexer: DSAIndexer | None = mla_modules.indexer
        self.topk_indices_buffer: Tensor = mla_modules.topk_indices_buffer
        self.skip_topk = skip_topk
        self.mla: attention.MLAWeights | None = None
        keep_weight_readable(self.kv_b_proj)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> attention.MLAWeights:
        """Split kv_b_proj into W_UK and W_UV for the absorbed form."""
        weight = get_and_maybe_dequant_weights(self.kv_b_proj, out_dtype=act_dtype)
        heads = weight.view(self.num_heads, self.qk_nope_head_dim + self.v_head_dim, -1)
        w_uk, w_uv = heads.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        cos_sin_cache = self.rotary_emb.cos_sin_cache
        self.mla = attention.MLAWeights(
            softmax_scale=self.softmax_scale,
            kv_norm=Norm(self.kv_a_layernorm.weight, self.kv_a_layernorm.variance_epsilon),
            w_uk=w_uk.contiguous(),
            w_uv=w_uv.transpose(1, 2).contiguous(),
            rope=Rope(cos_sin_cache, interleaved=True),
        )
        if self.indexer is not None:
            norm = self.indexer.k_norm
            self.indexer.constants = attention.Indexer(
                Norm(norm.weight, norm.eps, norm.bias),
                Rope(cos_sin_cache, self.indexer.interleaved),
            )
        return self.mla

    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        llama_4_scaling: Tensor | None = None,
    ) -> Tensor:
        """positions [T] int64, hidden_states [T, hidden_size] -> [T, hidden_size]."""
        q_latent, kv = self.fused_qkv_a_proj(hidden_states)[0].split(
            [self.q_lora_rank, LATENT_DIM], dim=-1
        )
        q_latent = self.q_a_layernorm(q_latent)
        q = self.q_b_proj(q_latent)[0].view(hidden_states.shape[0], self.num_heads, -1)
        indexer = None if self.indexer is None else self.indexer(hidden_states, q_latent)
        out = q.new_empty(hidden_states.shape[0], self.num_heads, self.v_head_dim)
        dsa_attention(
            q,
            kv,
            None if indexer is None else indexer.q,
            None if indexer is None else indexer.k,
            None if indexer is None else indexer.weights,
            positions,
            out,
            self.prefix,
        )
        hidden: Tensor = self.o_proj(out.flatten(1))[0]
        return hidden
