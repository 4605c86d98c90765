"""torch.compile of vLLM's model takes the attention for one op, and never looks into ours.

SGLang's --enable-torch-compile is refused: tests/serving/test_bad_input.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, HEADS, NOPE, V_HEAD_DIM, Q_LORA = 32, 2, 8, 8, 16


class Linear(nn.Module):
    """The host's return a pair."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x.new_ones(len(x), self.width), None


def built(kind: type[nn.Module], **parts: Any) -> Any:
    """A module of these parts, without a host's configuration."""
    module: Any = object.__new__(kind)
    nn.Module.__init__(module)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def test_a_layer_s_attention_is_one_op() -> None:
    """Without a break, between the projections; the op itself is not run."""
    from dsa_plugin.hosts.vllm.attention import DSAAttention, DSAIndexer

    indexer = built(DSAIndexer, num_heads=4, wk_weights_proj=Linear(128 + 4), wq_b=Linear(4 * 128))
    layer = built(
        DSAAttention,
        num_heads=HEADS,
        q_lora_rank=Q_LORA,
        v_head_dim=V_HEAD_DIM,
        prefix="model.layers.0.attn",
        indexer=indexer,
        fused_qkv_a_proj=Linear(Q_LORA + 576),
        q_a_layernorm=nn.Identity(),
        q_b_proj=Linear(HEADS * (NOPE + 64)),
        o_proj=Linear(HIDDEN),
    )
    calls: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Callable[..., Any]:
        calls.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return lambda *_: (torch.zeros(3, HIDDEN),)

    compiled: Any = torch.compile(layer.forward, fullgraph=True, backend=backend)
    compiled(torch.arange(3), torch.zeros(3, HIDDEN))
    assert calls.count(torch.ops.vllm.dsa_plugin_attention) == 1
    # What Dynamo would see of our forward.
    assert not any("bmm" in str(call) for call in calls)
