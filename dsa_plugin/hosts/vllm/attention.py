"""Sparse MLA of one layer and its indexer, in the place of vLLM's.

No postponed annotations here: torch infers the op's schema from the real ones.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    get_and_maybe_dequant_weights,
)
from vllm.utils.torch_utils import direct_register_custom_op

from dsa_kernels.cache_write import Norm, Rope
from dsa_kernels.dims import INDEX_FP8_BYTES, INDEX_HEAD_DIM, LATENT_DIM, LATENT_FP8_BYTES
from dsa_plugin import attention
from dsa_plugin.env import Env
from dsa_plugin.hosts.vllm.backend import index_cache_is_fp8
from dsa_plugin.hosts.vllm.cache_layer import CacheLayer
from dsa_plugin.hosts.vllm.compat import keep_weight_readable
from dsa_plugin.hosts.vllm.kv_transfer import transferred

if TYPE_CHECKING:
    from dsa_plugin.attention.metadata import DSAMetadata


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

    def forward(self, hidden_states: Tensor, q_latent: Tensor) -> attention.IndexProjections:
        """hidden_states [T, hidden_size], q_latent [T, q_lora_rank], the query's normed latent."""
        k, weights = self.wk_weights_proj(hidden_states)[0].split(
            [INDEX_HEAD_DIM, self.num_heads], dim=-1
        )
        q = self.wq_b(q_latent)[0].view(-1, self.num_heads, INDEX_HEAD_DIM)
        return attention.IndexProjections(q, k, weights)

    def bound(self, cos_sin_cache: Tensor) -> attention.Indexer:
        """What the core needs of it."""
        return attention.Indexer(
            k_norm=Norm(self.k_norm.weight, self.k_norm.eps, self.k_norm.bias),
            rope=Rope(cos_sin_cache, self.interleaved),
            key_cache=self.k_cache.pages,
        )


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
        self.check = attention.layer_check(
            prefix, written_by_us_alone=get_current_vllm_config().kv_transfer_config is None
        )
        keep_weight_readable(self.kv_b_proj)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> attention.MLAWeights:
        """Split kv_b_proj into W_UK and W_UV for the absorbed form, after each load of weights."""
        weight = get_and_maybe_dequant_weights(self.kv_b_proj, out_dtype=act_dtype)
        heads = weight.view(self.num_heads, self.qk_nope_head_dim + self.v_head_dim, -1)
        w_uk, w_uv = heads.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        if self.mla is not None:
            self.mla.reload(w_uk, w_uv.transpose(1, 2))
            return self.mla
        self.mla = attention.MLAWeights(
            softmax_scale=self.softmax_scale,
            kv_norm=Norm(self.kv_a_layernorm.weight, self.kv_a_layernorm.variance_epsilon),
            rope=Rope(self.rotary_emb.cos_sin_cache, interleaved=True),
            w_uk=w_uk.contiguous(),
            w_uv=w_uv.transpose(1, 2).contiguous(),
        )
        return self.mla

    def bound(self, act_dtype: torch.dtype) -> attention.Layer:
        """Weights and caches as they are now: the host may load or allocate either again."""
        # Before 0.30 the host calls this after loading for its own attention classes only.
        mla = self.mla or self.process_weights_after_loading(act_dtype)
        indexer = None if self.indexer is None else self.indexer.bound(mla.rope.cos_sin_cache)
        return attention.Layer(mla, self.pages, indexer, self.check)

    @property
    def caches(self) -> list[CacheLayer]:
        """This layer's latents and, where it has an indexer, its index keys."""
        return [self] if self.indexer is None else [self, self.indexer.k_cache]

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
        index = None if self.indexer is None else self.indexer(hidden_states, q_latent)
        out = q.new_empty(hidden_states.shape[0], self.num_heads, self.v_head_dim)
        torch.ops.vllm.dsa_plugin_attention(
            q,
            kv,
            None if index is None else index.q,
            None if index is None else index.k,
            None if index is None else index.weights,
            positions,
            out,
            self.prefix,
        )
        hidden: Tensor = self.o_proj(out.flatten(1))[0]
        return hidden


@eager_break_during_capture
def _dsa_attention(
    q: Tensor,
    kv: Tensor,
    index_q: Tensor | None,
    index_k: Tensor | None,
    index_weights: Tensor | None,
    positions: Tensor,
    out: Tensor,
    layer_name: str,
) -> None:
    """`attention.forward`, opaque to torch.compile and a break in piecewise CUDA graphs."""
    context = get_forward_context()
    layer = cast(DSAAttention, context.no_compile_layers[layer_name])
    if context.attn_metadata is None:
        # The host's profiling run, which has no cache.
        workspace_bytes = Env.load().logits_workspace_mb << 20
        attention.reserve(q, layer.topk_indices_buffer.shape[1], workspace_bytes)
        out.zero_()
        return
    index = None
    if index_q is not None and index_k is not None and index_weights is not None:
        index = attention.IndexProjections(index_q, index_k, index_weights)
    metadata = cast("dict[str, DSAMetadata]", context.attn_metadata)
    with transferred(layer.caches, metadata):
        attention.forward(
            layer.bound(q.dtype),
            attention.Projections(q, kv, positions, index),
            metadata[layer_name],
            layer.topk_indices_buffer,
            out,
            reuse_selection=layer.skip_topk,
        )


def _fake(*_: object) -> None:
    """Nothing is returned, so there is no shape to tell."""


direct_register_custom_op(
    op_name="dsa_plugin_attention",
    op_func=_dsa_attention,
    mutates_args=["out"],
    fake_impl=_fake,
)
