"""The lightning indexer of DeepSeek-V3.2-Exp (section 2.1), trainable.

Score of key s for query t: sum over heads h of weight[t, h] * relu(q[t, h] . k[s]). Unlike the
served one it keeps all in the model's dtype; rounding to fp8 is the server's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_plugin.training.rope import Angles, rotate_half_split
from dsa_plugin.training.sizes import ModelSizes

# Rows of the score matrix that are held at once.
CHUNK = 512
MASKED = float("-inf")


class Indexer(nn.Module):
    """Names and layouts of the parameters are those of published checkpoints."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.heads, self.dim = sizes.index_n_heads, sizes.index_head_dim
        self.rope_dim, self.topk = sizes.qk_rope_head_dim, sizes.index_topk
        self.wq_b = nn.Linear(sizes.q_lora_rank, self.heads * self.dim, bias=False)
        self.wk = nn.Linear(sizes.hidden_size, self.dim, bias=False)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = nn.Linear(sizes.hidden_size, self.heads, bias=False)

    def keys(self, x: Tensor, rope: Angles) -> Tensor:
        """Index keys [B, T, 128] of hidden states x [B, T, hidden]; RoPE is on the first rows."""
        k = self.k_norm(self.wk(x))
        return torch.cat(
            (rotate_half_split(k[..., : self.rope_dim], *rope), k[..., self.rope_dim :]), dim=-1
        )

    def scores(self, x: Tensor, q_latent: Tensor, rope: Angles, keys: Tensor) -> Tensor:
        """Scores [B, rows, T] of all keys, without a causal mask.

        x [B, rows, hidden], q_latent [B, rows, q_lora_rank] and rope are those of the queries.
        """
        q = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim))
        cos, sin = (angle.unsqueeze(-2) for angle in rope)
        q = torch.cat(
            (rotate_half_split(q[..., : self.rope_dim], cos, sin), q[..., self.rope_dim :]), dim=-1
        )
        weights = self.weights_proj(x) * (self.heads * self.dim) ** -0.5
        transposed = keys.transpose(-1, -2)
        total: Tensor = weights[..., :1] * F.relu(q[:, :, 0] @ transposed)
        for head in range(1, self.heads):
            total = total + weights[..., head, None] * F.relu(q[:, :, head] @ transposed)
        return total

    @torch.no_grad()
    def selected(self, x: Tensor, q_latent: Tensor, rope: Angles) -> Tensor:
        """Mask [B, T, T], True at the index_topk keys of each query, none of them later than it."""
        batch, length, _ = x.shape
        keys = self.keys(x, rope)
        mask = torch.zeros(batch, length, length, dtype=torch.bool, device=x.device)
        for start in range(0, length, CHUNK):
            end = min(length, start + CHUNK)
            rows = slice(start, end)
            scores = self.scores(
                x[:, rows], q_latent[:, rows], (rope[0][:, rows], rope[1][:, rows]), keys[:, :end]
            )
            later = torch.arange(end, device=x.device) > torch.arange(
                start, end, device=x.device
            ).unsqueeze(-1)
            chosen = scores.masked_fill(later, MASKED).topk(min(self.topk, end), dim=-1).indices
            mask[:, rows, :end] = mask[:, rows, :end].scatter(-1, chosen, True) & ~later
        return mask
