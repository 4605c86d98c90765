"""Multi-head latent attention (MLA), dense or over the keys that the indexer selects."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_plugin.training.indexer import MASKED, Indexer
from dsa_plugin.training.rope import Angles, rotate_interleaved
from dsa_plugin.training.sizes import ModelSizes

# Heads of a layer that may be taught where to look; the others find their own use.
COPY_HEADS = 2


@dataclass(frozen=True)
class IndexerFit:
    """How near a layer's indexer is to its attention, over some rows of queries.

    ``kl`` is the divergence that trains the indexer, in nats, the mean over rows. ``recall`` is the
    share of dense attention that lies on the top-k keys, over rows with more keys than that, and
    ``recall_rows`` how many those are.
    """

    kl: Tensor
    recall: Tensor
    recall_rows: int


@dataclass(frozen=True)
class Asked:
    """What layers are asked beside their output.

    ``rows`` [n]: the queries at which indexer and attention are compared. ``copies`` [n, 3]: (row
    of the batch, query, key) where the query is to attend to the key.
    """

    rows: Tensor | None = None
    copies: Tensor | None = None


@dataclass(frozen=True)
class Told:
    """A layer's replies; ``copy_loss`` is -log of the attention at `copies`, in nats, its mean."""

    fit: IndexerFit | None = None
    copy_loss: Tensor | None = None


class Attention(nn.Module):
    """MLA in its unabsorbed form, as in training and short prefills."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.sizes, self.heads = sizes, sizes.num_attention_heads
        eps, hidden = sizes.rms_norm_eps, sizes.hidden_size
        self.q_a_proj = nn.Linear(hidden, sizes.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(sizes.q_lora_rank, eps)
        self.q_b_proj = nn.Linear(sizes.q_lora_rank, self.heads * sizes.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden, sizes.kv_lora_rank + sizes.qk_rope_head_dim, bias=False
        )
        self.kv_a_layernorm = nn.RMSNorm(sizes.kv_lora_rank, eps)
        self.kv_b_proj = nn.Linear(
            sizes.kv_lora_rank,
            self.heads * (sizes.qk_nope_head_dim + sizes.v_head_dim),
            bias=False,
        )
        self.o_proj = nn.Linear(self.heads * sizes.v_head_dim, hidden, bias=False)
        self.scale = sizes.softmax_scale
        self.indexer = Indexer(sizes)

    def forward(self, x: Tensor, rope: Angles, sparse: bool, asked: Asked) -> tuple[Tensor, Told]:
        """Attention's output [B, T, hidden] of x [B, T, hidden], and what is asked of it.

        The indexer reads x detached, so its loss trains nothing but the indexer (section 2.1.1).
        """
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q, k, v = self._heads(x, q_latent, rope)
        mask = None
        if sparse and x.shape[1] > self.sizes.index_topk:
            mask = self.indexer.selected(x.detach(), q_latent.detach(), rope)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask.unsqueeze(1),
            is_causal=mask is None,
            scale=self.scale,
        )
        fit = None
        if asked.rows is not None:
            q_and_k = (q.detach(), k.detach())
            fit = self._fit(x.detach(), q_latent.detach(), rope, q_and_k, mask, asked.rows)
        copies = asked.copies
        copy_loss = None if copies is None else self._copy_loss(q, k, copies)
        return self.o_proj(out.transpose(1, 2).flatten(2)), Told(fit, copy_loss)

    def _copy_loss(self, q: Tensor, k: Tensor, copies: Tensor) -> Tensor:
        """-log of dense attention that the first COPY_HEADS heads give to (row, query, key)."""
        losses = []
        for row in copies[:, 0].unique().tolist():
            queries, keys = copies[copies[:, 0] == row, 1:].T
            logits = q[row, :COPY_HEADS, queries] @ k[row, :COPY_HEADS].transpose(-1, -2)
            later = torch.arange(k.shape[2], device=k.device) > queries.unsqueeze(-1)
            logits = (logits * self.scale).masked_fill(later, MASKED)
            wanted = keys.expand(COPY_HEADS, -1).unsqueeze(-1)
            losses.append(-logits.log_softmax(-1).gather(-1, wanted).flatten())
        return torch.cat(losses).mean()

    def _heads(self, x: Tensor, q_latent: Tensor, rope: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, H, T, nope + rope] and v [B, H, T, v_head_dim]."""
        sizes, (cos, sin) = self.sizes, (angle.unsqueeze(1) for angle in rope)
        nope, width = sizes.qk_nope_head_dim, sizes.qk_head_dim
        q = self.q_b_proj(q_latent).unflatten(-1, (self.heads, width)).transpose(1, 2)
        latent = self.kv_a_proj_with_mqa(x)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent[..., : sizes.kv_lora_rank]))
        kv = kv.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_pe = rotate_interleaved(latent[..., sizes.kv_lora_rank :].unsqueeze(1), cos, sin)
        q = torch.cat((q[..., :nope], rotate_interleaved(q[..., nope:], cos, sin)), dim=-1)
        k = torch.cat((kv[..., :nope], k_pe.expand(-1, self.heads, -1, -1)), dim=-1)
        return q, k, kv[..., nope:]

    def _fit(
        self,
        x: Tensor,
        q_latent: Tensor,
        rope: Angles,
        q_and_k: tuple[Tensor, Tensor],
        mask: Tensor | None,
        rows: Tensor,
    ) -> IndexerFit:
        """KL(attention summed over heads, L1-normalised || softmax of index scores) at `rows`.

        Over all earlier keys, or, with the sparse stage's mask, over the selected ones.
        """
        q, k = q_and_k
        causal = torch.arange(x.shape[1], device=x.device) <= rows.unsqueeze(-1)
        with torch.no_grad():
            logits = (q[:, :, rows] @ k.transpose(-1, -2)) * self.scale
            attention = logits.masked_fill(~causal, MASKED).softmax(-1).mean(1)
        scores = self.indexer.scores(
            x[:, rows],
            q_latent[:, rows],
            (rope[0][:, rows], rope[1][:, rows]),
            self.indexer.keys(x, rope),
        ).masked_fill(~causal, MASKED)
        topk = min(self.sizes.index_topk, x.shape[1])
        with torch.no_grad():
            long = rows >= topk
            recall = attention.gather(-1, scores.topk(topk, dim=-1).indices).sum(-1)[:, long]
            target = attention
            if mask is not None:
                kept = logits.masked_fill(~mask[:, rows].unsqueeze(1), MASKED)
                target = kept.softmax(-1).mean(1)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, rows], MASKED)
        # Where the target is 0 the score may be -inf; 0 * -inf would be NaN.
        log_score = scores.log_softmax(-1).masked_fill(target == 0, 0.0)
        kl = (torch.xlogy(target, target) - target * log_score).sum(-1).mean()
        return IndexerFit(kl, recall.mean() if long.any() else recall.sum(), int(long.sum()))
