"""The normalisation and the rotation that projections pass through before anything is stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """RMSNorm (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450) where it has a bias.

    x / sqrt(mean(x^2) + eps) * weight, and with a bias x - mean(x) in the place of x, + bias.

    Attributes:
        weight: [D] float: 512 of a latent, 128 of an index key.
        eps: added to the mean square or the variance.
        bias: [D] float, of a LayerNorm.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of 64 values.

    A pair (a, b) at an angle's cosine c and sine s becomes (a c - b s, b c + a s).

    Attributes:
        cos_sin_cache: [max_position, 64] float, 32 cosines then 32 sines, YaRN's scaling included.
        interleaved: pairs are (2i, 2i+1) if true (GPT-J; every MLA, GLM-5's indexer), halves
            (i, i+32) if not (NeoX; DeepSeek-V3.2's indexer).
    """

    cos_sin_cache: Tensor
    interleaved: bool
