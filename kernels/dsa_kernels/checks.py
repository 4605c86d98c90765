"""Validation that the ops share: shapes, dtypes and devices only, never values (no device sync)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Raise ValueError unless `tensor` has the shape; a str names a dimension of any size."""
    shape = tensor.shape
    if len(shape) == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, shape, strict=True)
    ):
        return
    raise ValueError(
        f"{name}: shape {tuple(shape)}; it must be [{', '.join(str(size) for size in expected)}]"
    )


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless `tensor` has one of the dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name}: dtype {tensor.dtype} is not supported; use {names}")


def check_devices(name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless every other tensor lies on the device of `tensor`."""
    for other, value in others.items():
        if value is not None and value.device != tensor.device:
            raise ValueError(
                f"{other} is on {value.device} but {name} is on {tensor.device}; "
                "move them to one device"
            )
