"""Tensors whose rows lie so far apart that int32 does not hold the third's offset."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dsa_testbed.kernel_runs import DEVICE


def far_apart(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Zeros [3, *shape] of each shape, their rows 2^30 values apart, side by side in one storage.

    On a CPU what is not written is never touched, so it takes no memory; on a GPU it takes
    gigabytes.
    """
    row = 2**30 + 64
    sizes = [math.prod(shape) for shape in shapes]
    nbytes = (2 * row + sum(sizes)) * dtype.itemsize
    if DEVICE.type == "cuda":
        storage = torch.zeros(nbytes, dtype=torch.uint8)
    else:
        # numpy maps fresh pages, which are zero; torch's own may be the test's poisoned ones.
        storage = torch.from_numpy(np.zeros(nbytes, np.uint8))
    tensors = []
    for number, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        rows = storage.view(dtype).as_strided((3, size), (row, 1), sum(sizes[:number]))
        tensors.append(rows.unflatten(1, shape))
    return tensors
