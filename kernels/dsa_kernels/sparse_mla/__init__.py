"""Absorbed multi-head latent attention over selected tokens."""

from dsa_kernels.sparse_mla.api import sparse_mla

__all__ = ["sparse_mla"]
