"""Our attention as one custom op, opaque to torch.compile and a break in piecewise CUDA graphs.

No postponed annotations here: torch infers the op's schema from the real ones.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from dsa_plugin import attention
from dsa_plugin.env import Env

if TYPE_CHECKING:
    from dsa_plugin.hosts.vllm.model import DSAAttention
    from dsa_plugin.metadata import DSAMetadata


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
        _profile(layer, q, out)
        return
    batch = cast("dict[str, DSAMetadata]", context.attn_metadata)
    metadata = batch[layer_name]
    tokens = metadata.num_tokens
    positions = positions[:tokens]
    # Before 0.30 the host calls this after loading for its own attention classes only.
    mla = layer.mla or layer.process_weights_after_loading(q.dtype)

    attention.write_latent(mla, kv[:tokens], positions, layer.kv_cache, metadata)
    if index_q is not None and index_k is not None and index_weights is not None:
        assert layer.indexer is not None
        indexer, cache = layer.indexer.constants, layer.indexer.k_cache.kv_cache
        attention.write_index_key(indexer, index_k[:tokens], positions, cache, metadata)
        if not layer.skip_topk:
            inputs = attention.IndexerInputs(
                index_q[:tokens], index_k[:tokens], index_weights[:tokens]
            )
            attention.select(indexer, inputs, positions, cache, metadata, layer.topk_indices_buffer)
    attention.attend(
        mla,
        q[:tokens],
        positions,
        layer.kv_cache,
        metadata,
        layer.topk_indices_buffer,
        out[:tokens],
    )
    out[tokens:].zero_()


def _profile(layer: "DSAAttention", q: Tensor, out: Tensor) -> None:
    """The host's profiling run has no cache: show it the logits workspace, and prepare the ops."""
    if layer.indexer is not None:
        attention.warm_up(q.device, layer.indexer.k_cache.dtype)
    torch.empty(Env.load().logits_workspace_mb << 20, dtype=torch.uint8, device=q.device)
    out.zero_()


def _fake(*_: object) -> None:
    """Nothing is returned, so there is no shape to tell."""


direct_register_custom_op(
    op_name="dsa_plugin_attention",
    op_func=_dsa_attention,
    mutates_args=["out"],
    fake_impl=_fake,
)
dsa_attention = torch.ops.vllm.dsa_plugin_attention
