"""The MLPs of DeepSeek-V3: one SwiGLU, or experts that a router picks by groups."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_plugin.training.sizes import ModelSizes


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Router(nn.Module):
    """Picks experts: the best groups by their two best experts, then the best experts of these."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sizes.n_routed_experts, sizes.hidden_size))
        # Balances the experts while picking; what they add up to does not depend on it.
        self.register_buffer("e_score_correction_bias", torch.zeros(sizes.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices [n, num_experts_per_tok] of the experts of x [n, hidden]; in fp32."""
        sizes = self.sizes
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        bias = self.get_buffer("e_score_correction_bias")
        by_group = (scores + bias.float()).unflatten(-1, (sizes.n_group, -1))
        best = by_group.topk(2, dim=-1).values.sum(-1).topk(sizes.topk_group, dim=-1).indices
        chosen = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, True)
        allowed = by_group.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(-2)
        indices = allowed.topk(sizes.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, indices)
        if sizes.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * sizes.routed_scaling_factor, indices


class Experts(nn.Module):
    """Routed experts, and shared ones that see all tokens."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        width = sizes.moe_intermediate_size
        self.gate = Router(sizes)
        self.experts = nn.ModuleList(
            Mlp(sizes.hidden_size, width) for _ in range(sizes.n_routed_experts)
        )
        self.shared_experts = Mlp(sizes.hidden_size, width * sizes.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        flat = x.flatten(0, -2)
        weights, indices = self.gate(flat)
        out: Tensor = self.shared_experts(flat)
        for number, expert in enumerate(self.experts):
            tokens, place = (indices == number).nonzero(as_tuple=True)
            if len(tokens):
                share = weights[tokens, place].unsqueeze(-1).to(x.dtype)
                out = out.index_add(0, tokens, expert(flat[tokens]) * share)
        return out.view_as(x)
