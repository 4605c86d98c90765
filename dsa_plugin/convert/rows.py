"""Tensors read from their files piece by piece, so that memory does not grow with their size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO, cast

import torch
from torch import Tensor

from dsa_plugin.convert.numbers import dequantise
from dsa_plugin.convert.source import TORCH_DTYPES, Stored
from dsa_plugin.fp8_weights import WEIGHT_BLOCK

PIECE_BYTES = 4 << 20
"""Of what is read at once, and of a weight's rows in fp32; at least 128 rows."""


def read_bytes(tensor: Stored) -> Iterator[bytearray]:
    """A tensor's bytes in pieces."""
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        for begin in range(0, tensor.nbytes, PIECE_BYTES):
            yield _read(file, tensor, min(PIECE_BYTES, tensor.nbytes - begin))


def rows_at_once(columns: int) -> int:
    """Rows of a piece of a weight [N, columns]: whole blocks."""
    return max(1, PIECE_BYTES // (4 * max(columns, 1)) // WEIGHT_BLOCK) * WEIGHT_BLOCK


def read_pieces(matrix: Stored, step: int) -> Iterator[Tensor]:
    """A matrix [N, K] in its own dtype, `step` rows at a time: [n, K]."""
    rows, columns = matrix.shape
    dtype = TORCH_DTYPES[matrix.dtype]
    with matrix.path.open("rb", buffering=0) as file:
        file.seek(matrix.start)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            data = _read(file, matrix, count * columns * dtype.itemsize)
            yield _as_tensor(data, dtype).view(count, columns)


def read_cut(tensor: Stored, where: tuple[slice, ...], step: int) -> Iterator[Tensor]:
    """Rows, and of these columns, in the tensor's own dtype, `step` rows at a time: [n, k]."""
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    start, stop, _ = where[0].indices(rows)
    row_bytes = columns * TORCH_DTYPES[tensor.dtype].itemsize
    band = replace(
        tensor,
        shape=(stop - start, columns),
        start=tensor.start + start * row_bytes,
        nbytes=(stop - start) * row_bytes,
    )
    for piece in read_pieces(band, step):
        yield piece[:, where[1]] if len(where) > 1 else piece


def read_rows(weight: Stored, scale: Stored | None) -> Iterator[Tensor]:
    """A weight in fp32, rows_at_once() rows at a time: [n, K].

    Args:
        weight: [N, K]; FP8 with `scale`, else of any float dtype.
        scale: [ceil(N / 128), ceil(K / 128)] of an FP8 weight.
    """
    step = rows_at_once(weight.shape[1])
    if scale is None:
        for values in read_pieces(weight, step):
            yield values.float()
        return
    factors = _read_whole(scale).float().split(step // WEIGHT_BLOCK)
    for values, scales in zip(read_pieces(weight, step), factors, strict=True):
        yield dequantise(values, scales)


def _read_whole(tensor: Stored) -> Tensor:
    data = bytearray().join(read_bytes(tensor))
    return _as_tensor(data, TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


def _as_tensor(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _read(file: BinaryIO, tensor: Stored, count: int) -> bytearray:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = cast(int, file.readinto(view[done:]))  # type: ignore[attr-defined]
        if not got:
            raise ValueError(f"{tensor.path} ends within {tensor.name}; it was changed meanwhile")
        done += got
    return data
