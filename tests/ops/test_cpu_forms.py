"""What only the forms for a CPU have: tiles, which bound their memory and change no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_kernels import workspace
from dsa_kernels.sparse_mla import cpu as sparse_cpu
from dsa_testbed.latents import SCALE, filled_cache, random_slots

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows, a tile's buffers stay within the budget."""
    largest = 0
    create = workspace.scratch

    def measured(*args: Any) -> Tensor:
        nonlocal largest
        tensor = create(*args)
        largest = max(largest, tensor.nbytes)
        return tensor

    monkeypatch.setattr(sparse_cpu, "scratch", measured)
    used = torch.arange(640)
    cache, _ = filled_cache(torch.bfloat16, 10, 64, used)
    q = torch.randn(200, 4, 576).bfloat16()
    out, lse = torch.empty(200, 4, 512).bfloat16(), torch.empty(200, 4)
    sparse_cpu.sparse_mla(q, cache, random_slots(200, 300, used), None, SCALE, out, lse)
    assert 1 << 20 < largest <= workspace.TILE_BYTES
