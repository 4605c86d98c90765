"""Normalise, rotate, quantise, store: what enters the two caches, and the query that meets it."""

from dsa_kernels.cache_write.api import (
    apply_rope,
    index_cache_write,
    index_query,
    latent_cache_write,
)

__all__ = ["apply_rope", "index_cache_write", "index_query", "latent_cache_write"]
