"""Make a launching function an operator of torch, so that torch.compile sees one opaque call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("dsa_kernels", "DEF")


def register(function: Callable[..., None], *, writes: tuple[str, ...]) -> Callable[..., None]:
    """torch.ops.dsa_kernels.<name>: an op that writes tensors its caller gave and returns nothing.

    `torch.library.custom_op` does the same for several times the host time a call.

    Args:
        function: annotated with Tensor, int, float, bool and their Optionals.
        writes: its arguments that are written.

    Returns:
        The op, to be called instead of `function`.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=writes)
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsa_kernels::{name}", _nothing, lib=_LIBRARY)
    op: Callable[..., None] = getattr(torch.ops.dsa_kernels, name).default
    return op


def _nothing(*_arguments: Any, **_keywords: Any) -> None:
    """What tracing needs to know of the result: there is none."""
