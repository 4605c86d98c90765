"""The attention backend that our cache layers name: it only builds metadata."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from dsa_plugin.env import Env
from dsa_plugin.hosts.vllm.metadata import DSAMetadataBuilder


def index_cache_is_fp8() -> bool:
    """`DSA_INDEX_CACHE_DTYPE`; auto is fp8 on an accelerator, the model's dtype on a CPU."""
    from vllm.platforms import current_platform

    return Env.load().index_cache_is_fp8("cpu" if current_platform.is_cpu() else "cuda")


class DSABackend(AttentionBackend):
    """Backend of both cache layers; attention itself is one op of the layer (`attention.py`)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]

    @staticmethod
    def get_name() -> str:
        return "DSA_PLUGIN"

    @staticmethod
    def get_impl_cls() -> Any:
        raise RuntimeError(
            "dsa_plugin's layers run an attention op of their own and have no AttentionImpl"
        )

    @staticmethod
    def get_builder_cls() -> type[DSAMetadataBuilder]:
        return DSAMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Cache shape, asked for by vLLM 0.26 and 0.28; later ones hand out views."""
        return (num_blocks, block_size, head_size)
