"""One paged cache of one layer, as the host allocates it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from dsa_plugin.hosts.vllm.backend import DSABackend
from dsa_plugin.hosts.vllm.compat import cache_spec


class CacheLayer(nn.Module, AttentionLayerBase):
    """The host allocates, shares and evicts its pages.

    Attributes:
        kv_cache: as the host hands it out, a strided view into its buffer; connectors expect
            its shape: [num_blocks, 1, block_size, head_size] since 0.30, without the 1 before.
        pages: the same as [num_blocks, block_size, head_size].
    """

    def __init__(
        self,
        prefix: str,
        head_size: int,
        dtype: torch.dtype,
        block_size: int,
        *,
        index_keys: bool,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.head_size = head_size
        self.dtype = dtype
        self.block_size = block_size
        self.index_keys = index_keys
        self.kv_cache = self.pages = torch.tensor([])
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache
        self.pages = kv_cache.squeeze(1) if kv_cache.ndim == 4 else kv_cache

    def get_attn_backend(self) -> type[DSABackend]:
        return DSABackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        return cache_spec(
            vllm_config.cache_config.block_size,
            self.head_size,
            self.dtype,
            indexer=self.index_keys,
        )
