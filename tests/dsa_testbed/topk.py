"""The top k by a sort of (score, index) in Python; and smaller programs, to test long rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsa_kernels.arch import Arch
from dsa_kernels.tuning import LaunchConfig

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


def programs_hold(
    patch: pytest.MonkeyPatch, keys: int, *, tile: int | None = None, parts: bool = True
) -> None:
    """A kernel's programs hold `keys` keys: longer rows are sampled, in parts if there may be."""
    from dsa_kernels.topk_select import kernel

    def config(_op: str, _arch: Arch, key: str) -> LaunchConfig:
        if key in ("select", "slots"):
            return LaunchConfig({"BLOCK": keys}, 4, 1)
        return LaunchConfig({"TILE": tile or keys, "SAMPLE": keys, "ROOM": keys}, 4, 1)

    patch.setattr(kernel, "launch_config", config)
    if not parts:
        patch.setattr(kernel, "_PROGRAMS_PER_SM", 0)


def sampled(valid: int, sample: int) -> Tensor:
    """Which of a row's columns the kernel's first sample is of."""
    index = torch.arange(sample)
    somewhere = (index * 0x9E3779B1 & 0xFFFFFFFF) >> 16
    stride, rest = valid // sample, valid % sample
    return index * stride + index * rest // sample + (somewhere * stride >> 16)
