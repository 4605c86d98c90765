"""Queries, expanded keys and values, and the fp64 attention over those that each row selected."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.testing import error
from dsa_testbed.latents import EAGER, RMS, SCALE, fp32_limit


def inputs(
    dtype: torch.dtype, rows: int, keys: int, heads: int, width: int, v_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.randn(heads, keys, width), torch.randn(heads, keys, v_width)
    return torch.randn(rows, heads, width).to(dtype), k.to(dtype), v.to(dtype)


def chosen(selected: Tensor, columns: int) -> Tensor:
    """[T, keys] bool -> [T, columns] int32 indices in any order, -1 padded."""
    indices = torch.full((len(selected), columns), -1, dtype=torch.int32)
    for row, keys in enumerate(selected):
        where = keys.nonzero()[:, 0].int()
        indices[row, : len(where)] = where[torch.randperm(len(where))]
    return indices


def truth(q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Tensor:
    scores = q.double().transpose(0, 1) @ k.double().transpose(1, 2) * SCALE
    weights = scores.masked_fill(~selected, -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ v.double()).transpose(0, 1)


def check(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, form: str = "kernel"
) -> None:
    """At most EAGER of the error of eager attention in that precision, which rounds scores too."""
    expected = truth(q, k, v, selected)
    if q.dtype == torch.float32:
        limit = fp32_limit(q, k, selected.shape[1])
    else:
        scores = (q.transpose(0, 1) @ k.transpose(1, 2) * SCALE).masked_fill(~selected, -torch.inf)
        eager = scores.float().softmax(-1).nan_to_num(0).to(q.dtype) @ v
        limit = min(RMS[q.dtype], EAGER[form] * error(eager.transpose(0, 1), expected).rms)
    assert out.dtype == q.dtype
    assert error(out, expected).rms <= limit
    assert (out[~selected.any(1)] == 0).all()
