"""DeepSeek-V3.2's and GLM-5's model, with the parameter names of their checkpoints.

Widths are one rank's: heads, MLP columns, experts and vocabulary are split, the rest is whole.
Rows are the tokens of one batch, of however many requests: [T, ...].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_kernels.cache_write import Norm, Rope
from dsa_kernels.dims import INDEX_HEAD_DIM, LATENT_DIM
from dsa_plugin import attention
from dsa_plugin.generate.caches import Batch, LayerCache
from dsa_plugin.generate.config import ModelConfig
from dsa_plugin.generate.ranks import Ranks
from dsa_plugin.training.experts import Mlp, Router

INDEX_NORM_EPS = 1e-6  # in no config.json


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Indexer(nn.Module):
    """The lightning indexer's projections; the same on every rank, so that all select alike."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.sizes
        self.heads, self.interleaved = sizes.index_n_heads, config.attention.indexer_rope_interleave
        self.wq_b = linear(sizes.q_lora_rank, self.heads * INDEX_HEAD_DIM)
        self.wk = linear(sizes.hidden_size, INDEX_HEAD_DIM)
        self.k_norm = nn.LayerNorm(INDEX_HEAD_DIM, INDEX_NORM_EPS)
        self.weights_proj = linear(sizes.hidden_size, self.heads)

    def forward(self, x: Tensor, q_latent: Tensor) -> attention.IndexProjections:
        """x [T, hidden], q_latent [T, q_lora_rank]."""
        q = self.wq_b(q_latent).unflatten(-1, (self.heads, INDEX_HEAD_DIM))
        return attention.IndexProjections(q, self.wk(x), self.weights_proj(x))

    def bound(self, cos_sin: Tensor, key_cache: Tensor) -> attention.Indexer:
        """What the attention core needs of it."""
        norm = Norm(self.k_norm.weight, INDEX_NORM_EPS, self.k_norm.bias)
        return attention.Indexer(norm, Rope(cos_sin, self.interleaved), key_cache)


class Attention(nn.Module):
    """Multi-head latent attention over the keys that the indexer, or a layer below, selected."""

    def __init__(self, config: ModelConfig, layer: int, ranks: Ranks) -> None:
        super().__init__()
        sizes = config.sizes
        self.sizes, self.heads = sizes, ranks.share(sizes.num_attention_heads)
        self.q_a_proj = linear(sizes.hidden_size, sizes.q_lora_rank)
        self.q_a_layernorm = nn.RMSNorm(sizes.q_lora_rank, sizes.rms_norm_eps)
        self.q_b_proj = linear(sizes.q_lora_rank, self.heads * sizes.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(sizes.hidden_size, LATENT_DIM)
        self.kv_a_layernorm = nn.RMSNorm(sizes.kv_lora_rank, sizes.rms_norm_eps)
        kv_dim = sizes.qk_nope_head_dim + sizes.v_head_dim
        self.kv_b_proj = linear(sizes.kv_lora_rank, self.heads * kv_dim)
        self.o_proj = linear(self.heads * sizes.v_head_dim, sizes.hidden_size)
        self.indexer = Indexer(config) if config.attention.has_indexer(layer) else None

    def forward(self, x: Tensor, batch: Batch, cos_sin: Tensor, cache: LayerCache) -> Tensor:
        """x [T, hidden] -> this rank's heads' part of the output, [T, hidden]."""
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        projections = attention.Projections(
            q=self.q_b_proj(q_latent).unflatten(-1, (self.heads, -1)),
            kv=self.kv_a_proj_with_mqa(x),
            positions=batch.positions,
            index=None if self.indexer is None else self.indexer(x, q_latent),
        )
        out = x.new_empty(len(x), self.heads, self.sizes.v_head_dim)
        attention.forward(
            self._bound(cos_sin, cache),
            projections,
            batch.metadata,
            batch.topk_indices,
            out,
            reuse_selection=self.indexer is None,
        )
        attended: Tensor = self.o_proj(out.flatten(1))
        return attended

    def _bound(self, cos_sin: Tensor, cache: LayerCache) -> attention.Layer:
        sizes = self.sizes
        up = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        w_uk, w_uv = up.split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=1)
        mla = attention.MLAWeights(
            softmax_scale=sizes.softmax_scale,
            kv_norm=Norm(self.kv_a_layernorm.weight, sizes.rms_norm_eps),
            rope=Rope(cos_sin, interleaved=True),
            w_uk=w_uk,
            w_uv=w_uv.transpose(1, 2),
        )
        indexer = None
        if self.indexer is not None and cache.index_keys is not None:
            indexer = self.indexer.bound(cos_sin, cache.index_keys)
        return attention.Layer(mla, cache.latents, indexer)


class Experts(nn.Module):
    """Every rank routes all tokens, and runs its own experts and its part of the shared ones."""

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        super().__init__()
        sizes = config.sizes
        self.gate = Router(sizes)
        mine = range(ranks.rank, sizes.n_routed_experts, ranks.size)
        self.experts = nn.ModuleDict(
            {str(n): Mlp(sizes.hidden_size, sizes.moe_intermediate_size) for n in mine}
        )
        width = sizes.moe_intermediate_size * sizes.n_shared_experts
        self.shared_experts = Mlp(sizes.hidden_size, ranks.share(width)) if width else None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> this rank's part of the output, [T, hidden]."""
        weights, chosen = self.gate(x)
        out = torch.zeros_like(x) if self.shared_experts is None else self.shared_experts(x)
        for number, expert in self.experts.items():
            tokens, place = (chosen == int(number)).nonzero(as_tuple=True)
            if len(tokens):
                share = weights[tokens, place].unsqueeze(-1).to(x.dtype)
                out.index_add_(0, tokens, expert(x[tokens]) * share)
        return out


class Layer(nn.Module):
    """Attention and MLP, each behind its norm and added to its input."""

    def __init__(self, config: ModelConfig, layer: int, ranks: Ranks) -> None:
        super().__init__()
        sizes = config.sizes
        self.ranks = ranks
        self.self_attn = Attention(config, layer, ranks)
        self.mlp = (
            Experts(config, ranks)
            if sizes.has_experts(layer)
            else Mlp(sizes.hidden_size, ranks.share(sizes.intermediate_size))
        )
        self.input_layernorm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)

    def forward(self, x: Tensor, batch: Batch, cos_sin: Tensor, cache: LayerCache) -> Tensor:
        """x [T, hidden] -> the same."""
        x = x + self.ranks.sum(self.self_attn(self.input_layernorm(x), batch, cos_sin, cache))
        return x + self.ranks.sum(self.mlp(self.post_attention_layernorm(x)))


class Embedding(nn.Module):
    """A rank's part of the vocabulary; other tokens are zeros there, and summed over ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, ranks: Ranks) -> None:
        super().__init__()
        self.ranks, self.rows = ranks, ranks.share(vocab_size)
        self.weight = nn.Parameter(torch.empty(self.rows, hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T] -> [T, hidden]."""
        row = tokens - self.ranks.rank * self.rows
        mine = (row >= 0) & (row < self.rows)
        found = F.embedding(row.where(mine, 0), self.weight)
        return self.ranks.sum(found.masked_fill(~mine[:, None], 0))


class Decoder(nn.Module):
    """All but the head; checkpoints call it `model`."""

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        super().__init__()
        sizes = config.sizes
        self.embed_tokens = Embedding(sizes.vocab_size, sizes.hidden_size, ranks)
        self.layers = nn.ModuleList(
            Layer(config, layer, ranks) for layer in range(sizes.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)


class Model(nn.Module):
    """The whole model, without its MTP layers."""

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks
        self.model = Decoder(config, ranks)
        self.lm_head = linear(config.sizes.hidden_size, ranks.share(config.sizes.vocab_size))

    def forward(self, batch: Batch, cos_sin: Tensor, caches: list[LayerCache]) -> Tensor:
        """Logits [n, vocab] in fp32 of the batch's `last_rows`.

        Args:
            batch: tokens, and where their cache entries lie.
            cos_sin: RoPE's cosines and sines, [positions, 64].
            caches: of each layer.
        """
        x = self.model.embed_tokens(batch.tokens)
        for layer, cache in zip(self.model.layers, caches, strict=True):
            x = layer(x, batch, cos_sin, cache)
        return self.ranks.concatenate(self.lm_head(self.model.norm(x[batch.last_rows])).float())
