"""FP8 weights as releases have them: e4m3 beside `weight_scale_inv`, a scale for each block."""

from __future__ import annotations

WEIGHT_BLOCK = 128
"""Rows, and columns, that share a scale."""
SCALE_SUFFIX = "_scale_inv"
"""Of the tensor with a weight's scales, after the weight's own name."""
SCALES = ("weight" + SCALE_SUFFIX, "weight_scale")
"""Names of a module's scales, the releases' first."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a weight of this shape."""
    return tuple(-(-size // WEIGHT_BLOCK) for size in shape)
