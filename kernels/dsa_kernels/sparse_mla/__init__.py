"""Multi-head latent attention over selected tokens: gathered, or masked in a whole context."""

from dsa_kernels.sparse_mla.api import (
    decoding_first_is_faster,
    gather_latents,
    masked_is_faster,
    masked_mha,
    sparse_mla,
)

__all__ = [
    "decoding_first_is_faster",
    "gather_latents",
    "masked_is_faster",
    "masked_mha",
    "sparse_mla",
]
