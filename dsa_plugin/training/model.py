"""A trainable DSA model with the parameter names and the logits of DeepseekV32ForCausalLM."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsa_plugin.training.attention import Asked, Attention, Told
from dsa_plugin.training.experts import Experts, Mlp
from dsa_plugin.training.rope import Angles, angles, inverse_frequencies
from dsa_plugin.training.sizes import ModelSizes


@dataclass(frozen=True)
class ModelOutput:
    """Hidden states [B, T, hidden] after the final norm, and what each layer told."""

    hidden: Tensor
    told: tuple[Told, ...]


class Layer(nn.Module):
    """Attention and MLP, each behind its norm and added to its input."""

    def __init__(self, sizes: ModelSizes, has_experts: bool) -> None:
        super().__init__()
        self.self_attn = Attention(sizes)
        dense = Mlp(sizes.hidden_size, sizes.intermediate_size) if not has_experts else None
        self.mlp = dense or Experts(sizes)
        self.input_layernorm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)

    def forward(self, x: Tensor, rope: Angles, sparse: bool, asked: Asked) -> tuple[Tensor, Told]:
        """x [B, T, hidden] -> the same; arguments are Attention's."""
        attended, told = self.self_attn(self.input_layernorm(x), rope, sparse, asked)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), told


class Decoder(nn.Module):
    """All but the head; checkpoints call it `model`."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(
            Layer(sizes, sizes.has_experts(layer)) for layer in range(sizes.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)


class DsaModel(nn.Module):
    """DeepSeek-V3.2's model, without its MTP layers."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = Decoder(sizes)
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)
        frequencies = inverse_frequencies(
            sizes.qk_rope_head_dim, sizes.rope_theta, sizes.rope_scaling
        )
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        sparse: bool = False,
        asked: Asked | None = None,
    ) -> ModelOutput:
        """Hidden states of tokens [B, T] at positions [B, T], by default 0, 1, 2, ...

        With ``sparse`` each query attends to its index_topk keys. ``asked`` is put to each
        layer.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        frequencies = self.get_buffer("inverse_frequencies")
        rope = angles(positions.expand_as(tokens), frequencies)
        x, replies = self.model.embed_tokens(tokens), []
        for layer in self.model.layers:
            x, told = layer(x, rope, sparse, asked or Asked())
            replies.append(told)
        return ModelOutput(self.model.norm(x), tuple(replies))

    def attentions(self) -> list[Attention]:
        """The layers' attention, from the first layer on."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def indexer_parameters(self) -> list[nn.Parameter]:
        """What the warm-up trains."""
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def attention_parameters(self) -> list[nn.Parameter]:
        """All others: what pre-training trains; a tied head is there once."""
        return [p for name, p in self.named_parameters() if ".indexer." not in name]
