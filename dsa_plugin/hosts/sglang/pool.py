"""An index cache in the model's dtype, for `DSA_INDEX_CACHE_DTYPE=model`.

In fp8 the host's own pool is used as it is: its pages have our fp8 layout (dsa_kernels.layout), so
radix sharing, eviction, sizing, HiCache and PD transfer know them. This one replaces the pages of
the index keys and nothing else; HiCache and PD, refused for either, count on 132 bytes a token.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any, cast

import torch

from dsa_kernels.dims import INDEX_FP8_BYTES, INDEX_HEAD_DIM, index_bytes_per_token
from dsa_plugin.env import Env
from dsa_plugin.hosts.sglang.names import BACKEND


def pool_class() -> type | None:
    """The pool of this run; None where the host's own is right, or serves the model."""
    from sglang.srt.runtime_context import attention_backends, get_device

    if BACKEND not in attention_backends():
        return None
    fp8 = Env.load().index_cache_is_fp8(torch.device(get_device().device).type)
    return None if fp8 else _model_dtype_pool()


@cache
def _model_dtype_pool() -> type:
    from sglang.srt.mem_cache.index_key_cache import IndexKeyCache
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    class ModelDtypeIndexKeyCache(IndexKeyCache):
        """Pages [64, 128] of keys, no scales."""

        def _buffer_shape(self, num_pages: int) -> tuple[int, int]:
            return num_pages, self.pool.page_size * INDEX_HEAD_DIM

        def move(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
            for index_k in self.buffer:
                if index_k.shape[0]:
                    keys = index_k.view(-1, INDEX_HEAD_DIM)
                    keys[tgt_loc.view(-1).long()] = keys[src_loc.view(-1).long()]

    class ModelDtypeDSATokenToKVPool(DSATokenToKVPool):
        """The host's pool with such index keys."""

        def _create_index_key_cache(self) -> Any:
            self.index_k_with_scale_buffer_dtype = _model_dtype()
            return ModelDtypeIndexKeyCache(self, cast(int, self.index_buf_size))

    return ModelDtypeDSATokenToKVPool


def _model_dtype() -> torch.dtype:
    from sglang.srt.runtime_context import process_model_config

    dtype: torch.dtype = process_model_config().dtype
    return dtype


def size_index_cache() -> None:
    """Count the bytes of that cache when the host divides its memory into tokens.

    What: scales the result of _compute_dsa_indexer_cell_size. Why: it has fp8's 132 bytes a token
    written in. Upstream: model_executor/pool_configurator.py. Remove when: it asks the pool class.
    """
    from sglang.srt.model_executor import pool_configurator

    for cls in vars(pool_configurator).values():
        original = getattr(cls, "__dict__", {}).get("_compute_dsa_indexer_cell_size")
        if original is None:
            continue

        @wraps(original)
        def sized(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> int:
            fp8_bytes: int = _original(self, *args, **kwargs)
            if pool_class() is None:
                return fp8_bytes
            return fp8_bytes // INDEX_FP8_BYTES * index_bytes_per_token(_model_dtype().itemsize)

        cls._compute_dsa_indexer_cell_size = sized
