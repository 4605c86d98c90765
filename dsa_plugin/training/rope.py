"""Rotary position embedding in the two layouts of DeepSeek-V3.2.

MLA pairs neighbouring rows, (x0, x1), (x2, x3), ...; the indexer pairs row i with row i + dim / 2.
Swapping the two costs accuracy without an error, so each has a function of its own.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]


def inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """[dim / 2] radians a position, fp32; `scaling` is config.json's of YaRN (arXiv 2309.00071)."""
    plain: Tensor = theta ** -(torch.arange(0, dim, 2, dtype=torch.float) / dim)
    if scaling is None:
        return plain
    if scaling.get("mscale", 1.0) != scaling.get("mscale_all_dim", 1.0):
        raise ValueError("YaRN's mscale and mscale_all_dim differ in config.json; they must agree")

    def pair_that_turns(times: float) -> float:
        """The pair of rows that turns so often within the original context."""
        context = scaling["original_max_position_embeddings"]
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow", 1))), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    scaled: Tensor = plain / scaling["factor"] * stretched + plain * (1 - stretched)
    return scaled


def angles(positions: Tensor, frequencies: Tensor) -> Angles:
    """(cos, sin), each [..., rope_dim / 2] in fp32, of positions [...]."""
    phase = positions[..., None].float() * frequencies
    return phase.cos(), phase.sin()


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., rope_dim] of MLA; the result has all first rows of pairs, then all second.

    Queries and keys are permuted alike, so their products are those of the interleaved layout.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., rope_dim] of the indexer."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
