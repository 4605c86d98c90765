"""Normalise, rotate, quantise, store: what enters the two caches, and the query that meets it."""

from dsa_kernels.cache_write.api import (
    apply_rope,
    index_cache_write,
    index_query,
    latent_cache_write,
)
from dsa_kernels.cache_write.one_launch import one_launch
from dsa_kernels.norm_and_rope import Norm, Rope

__all__ = [
    "Norm",
    "Rope",
    "apply_rope",
    "index_cache_write",
    "index_query",
    "latent_cache_write",
    "one_launch",
]
