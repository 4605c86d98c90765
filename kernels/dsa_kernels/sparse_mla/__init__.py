"""Multi-head latent attention over selected tokens: gathered, or masked in a whole context."""

from dsa_kernels.sparse_mla.api import gather_latents, masked_is_faster, masked_mha, sparse_mla

__all__ = ["gather_latents", "masked_is_faster", "masked_mha", "sparse_mla"]
