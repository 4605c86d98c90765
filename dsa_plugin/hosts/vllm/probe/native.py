"""What vLLM's own DSA would run on this process's device, or refuses: its own code is asked."""

from __future__ import annotations

import re
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.sparse_attn_indexer import SparseAttnIndexer
from vllm.platforms import current_platform
from vllm.utils import deep_gemm
from vllm.v1.attention.selector import AttentionSelectorConfig

from dsa_plugin.probe.host_kernel import HostKernel, ask_host_code

_CHECKS = "vllm.utils.deep_gemm.is_deep_gemm_supported()"


def native_kernels(config: VllmConfig) -> list[HostKernel]:
    """One a op, in their order."""
    topk = getattr(config.kernel_config, "sparse_indexer_topk_backend", "auto")
    with set_current_vllm_config(config):
        return [
            HostKernel("cache_write", "unchecked", "inside its attention layer"),
            _indexer_logits(config),
            HostKernel("topk_select", "unchecked", f"sparse_indexer_topk_backend {topk}"),
            ask_host_code(
                "sparse_mla", lambda: _sparse_mla(config), NotImplementedError, ValueError
            ),
        ]


def _sparse_mla(config: VllmConfig) -> str:
    """The backend that its layers get when they ask the platform.

    Raises:
        NotImplementedError, ValueError: the platform's refusal.
    """
    text = config.model_config.hf_text_config
    wanted = AttentionSelectorConfig(
        head_size=text.kv_lora_rank + text.qk_rope_head_dim,
        dtype=config.model_config.dtype,
        kv_cache_dtype=config.cache_config.cache_dtype,
        block_size=None,
        use_mla=True,
        use_sparse=True,
    )
    platform: Any = current_platform
    heads = text.num_attention_heads // config.parallel_config.tensor_parallel_size
    try:
        path: str = platform.get_attn_backend_cls(None, wanted, heads)
    except ValueError as refusal:
        raise ValueError(_of_sparse_backends(str(refusal))) from None
    return path.rpartition(".")[2]


def _of_sparse_backends(refusal: str) -> str:
    """A refusal without the configuration that it repeats and the backends of dense MLA."""
    reasons = re.findall(r"\w*SPARSE\w*: \[[^\]]*\]", refusal)
    return ", ".join(reasons) or refusal


def _indexer_logits(config: VllmConfig) -> HostKernel:
    if current_platform.is_cuda():
        return ask_host_code("indexer_logits", lambda: _deep_gemm(config), RuntimeError)
    if current_platform.is_rocm():
        return ask_host_code("indexer_logits", _rocm_indexer, RuntimeError)
    return HostKernel("indexer_logits", "unchecked", "sparse_mla is refused before")


def _deep_gemm(config: VllmConfig) -> str:
    """Raises RuntimeError where the layer refuses, or DeepGEMM is not for the device."""
    text = config.model_config.hf_text_config
    SparseAttnIndexer(
        k_cache=None,
        quant_block_size=text.index_head_dim,
        scale_fmt="ue8m0",
        topk_tokens=text.index_topk,
        head_dim=text.index_head_dim,
        max_model_len=config.model_config.max_model_len,
        max_total_seq_len=config.model_config.max_model_len,
        topk_indices_buffer=torch.empty(0),
    )
    if not deep_gemm.is_deep_gemm_supported():
        raise RuntimeError(f"{_CHECKS} is False")
    return "DeepGEMM"


class _PassedError(Exception):
    """The layer went on to its kernel."""


def _rocm_indexer() -> str:
    """Raises RuntimeError where the layer refuses before it calls its kernel."""

    class Layer(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            raise _PassedError

    op = "rocm_aiter_sparse_attn_indexer"
    with suppress(_PassedError, AttributeError):  # the second where this build has no such op
        layer_class: Any = SparseAttnIndexer
        empty = torch.empty(0)
        layer_class.forward_hip(Layer(use_fp4_cache=False), empty, empty, None, empty)
    return op
