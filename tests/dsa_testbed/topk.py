"""The top k by a sort of (score, index) in Python."""

from __future__ import annotations

import torch
from torch import Tensor

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def int32(values: list[int] | list[list[int]] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


def expected_rows(logits: Tensor, k: int, start: Tensor | None, end: Tensor) -> Tensor:
    starts = [0] * len(logits) if start is None else start.tolist()
    rows = []
    for scores, first, last in zip(logits.tolist(), starts, end.tolist(), strict=True):
        columns = range(max(first, 0), min(last, logits.shape[1]))
        best = sorted(columns, key=lambda column: (-scores[column], column))[:k]
        chosen = sorted(column - first for column in best)
        rows.append(chosen + [-1] * (k - len(chosen)))
    return torch.tensor(rows, dtype=torch.int32).view(len(rows), k)
