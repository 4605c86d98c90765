"""Our attention as one custom op, opaque to torch.compile and a break in piecewise CUDA graphs.

No postponed annotations here: torch infers the op's schema from the real ones.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from dsa_plugin.attention import layer as attention
from dsa_plugin.attention.warm_up import warm_up_once
from dsa_plugin.env import Env

if TYPE_CHECKING:
    from dsa_plugin.attention.metadata import DSAMetadata
    from dsa_plugin.hosts.vllm.model import DSAAttention


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
    context = get_forward_context()
    layer = cast("DSAAttention", context.no_compile_layers[layer_name])
    if context.attn_metadata is None:
        # The host's profiling run, which has no cache.
        workspace_bytes = Env.load().logits_workspace_mb << 20
        attention.reserve(q, layer.topk_indices_buffer.shape[1], workspace_bytes)
        out.zero_()
        return
    metadata = cast("dict[str, DSAMetadata]", context.attn_metadata)[layer_name]
    # Before 0.30 the host calls this after loading for its own attention classes only.
    mla = layer.mla or layer.process_weights_after_loading(q.dtype)
    indexer = inputs = index_cache = None
    if layer.indexer is not None:
        assert index_q is not None
        assert index_k is not None
        assert index_weights is not None
        inputs = attention.IndexerInputs(index_q, index_k, index_weights)
        indexer, index_cache = layer.indexer.constants, layer.indexer.k_cache.kv_cache
        topk = layer.topk_indices_buffer.shape[1]
        warm_up_once(mla, q, indexer, inputs, layer.kv_cache, index_cache, metadata, topk)
    attention.forward(
        mla,
        q,
        kv,
        indexer,
        inputs,
        positions,
        layer.kv_cache,
        index_cache,
        metadata,
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
dsa_attention = torch.ops.vllm.dsa_plugin_attention
