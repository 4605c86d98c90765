"""A converted checkpoint beside its source: how far each tensor is off, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dsa_plugin.convert.companions import CONFIG
from dsa_plugin.convert.manifest import Manifest, sha256_of
from dsa_plugin.convert.numbers import unpack
from dsa_plugin.convert.rows import read_bytes, read_pieces, read_rows, rows_at_once
from dsa_plugin.convert.source import (
    TORCH_DTYPES,
    Stored,
    open_folder,
    open_source,
)
from dsa_plugin.fp8_weights import SCALE_SUFFIX
from dsa_plugin.packed_weights import GROUP

Item = TypeVar("Item")
_BF16_ROUNDING = 2.0**-8
"""Largest relative error of a value rounded to bf16."""
_SCALE_ROUNDING = 1 + 2.0**-7
"""Of a scale rounded up to bf16, the most that it grows."""
_FP32_ROUNDING = 1 + 2.0**-16
"""Of the quotients that are rounded to integers."""


@dataclass(frozen=True)
class Compared:
    """A tensor of the source and what became of it.

    form: how it is stored now: `same` bytes, `bf16`, `int8` or `int4`; `missing` or `shape` where
        nothing can be compared.
    max_error: the largest difference of two elements.
    relative_error: the differences' norm by the source's.
    of_allowed: the largest share of what an element may be off; above 1 the tensor is wrong.
    """

    name: str
    form: str
    max_error: float
    relative_error: float
    of_allowed: float

    @property
    def wrong(self) -> bool:
        """Whether it is further off than its form allows."""
        return not self.of_allowed <= 1


def compare(source: Path, converted: Path, workers: int) -> Iterator[Compared]:
    """Compare each tensor of a source with what was made of it, and look for others.

    Raises:
        ValueError: either folder holds no whole checkpoint.
    """
    check_finished(converted)
    old, new = open_source(source).tensors, open_folder(converted).tensors
    names = [name for name in old if not name.endswith(SCALE_SUFFIX)]
    yield from in_threads(lambda name: _compared(old, new, name), names, workers)
    made = {name for stem in names for name in (stem, *_packed_names(stem))}
    yield from (unknown(name, "not of the source") for name in sorted(new.keys() - made))


def check_finished(converted: Path) -> None:
    """Raises ValueError where a folder's conversion was stopped."""
    if Manifest.load(converted) and not (converted / CONFIG).exists():
        raise ValueError(f"{converted} is not finished; run its conversion again, it goes on")


def in_threads(
    compared: Callable[[Item], Compared], items: Iterable[Item], workers: int
) -> Iterator[Compared]:
    """Of each item, by so many threads, in their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(compared, items)
    finally:
        torch.set_num_threads(threads)


def damaged_files(converted: Path, workers: int) -> list[str]:
    """Files that are not as the conversion's manifest has them, where it has one."""
    manifest = Manifest.load(converted)
    if manifest is None:
        return []

    def differs(name: str) -> bool:
        path = converted / name
        return not path.is_file() or sha256_of(path) != manifest.files[name].sha256

    with ThreadPoolExecutor(workers) as pool:
        names = sorted(manifest.files)
        return [name for name, wrong in zip(names, pool.map(differs, names), strict=True) if wrong]


def _compared(old: Mapping[str, Stored], new: Mapping[str, Stored], name: str) -> Compared:
    weight, plain = old[name], new.get(name)
    packed, scale, _ = (new.get(part) for part in _packed_names(name))
    if plain is None and packed is not None and scale is not None:
        bits = packed.shape[-1] * 32 // max(1, weight.shape[-1])
        expected = (weight.shape[0], weight.shape[-1] * bits // 32)
        if bits not in (4, 8) or packed.shape != expected:
            return unknown(name, f"packed {list(packed.shape)}")
        return measured(name, f"int{bits}", _of_packed(weight, old, packed, scale, bits))
    if plain is None:
        return unknown(name, "missing")
    if plain.shape != weight.shape:
        return unknown(name, f"shape {list(plain.shape)}")
    if plain.dtype == weight.dtype:
        return measured(name, "same", _of_copy(weight, plain))
    if weight.dtype == "F8_E4M3" and plain.dtype == "BF16":
        return measured(name, "bf16", _of_bf16(weight, old, plain))
    return unknown(name, f"dtype {plain.dtype}")


Piece = tuple[Tensor, Tensor, Tensor]
"""Elements before, after, and how far they may be apart; fp32 or wider."""


def _of_copy(weight: Stored, plain: Stored) -> Iterator[Piece]:
    dtype = TORCH_DTYPES[weight.dtype]
    for before, after in zip(read_bytes(weight), read_bytes(plain), strict=True):
        if before != after:
            pair = [torch.frombuffer(data, dtype=dtype).double() for data in (before, after)]
            yield pair[0], pair[1], torch.zeros(())


def _of_bf16(weight: Stored, old: Mapping[str, Stored], plain: Stored) -> Iterator[Piece]:
    rows = read_rows(weight, old[weight.name + SCALE_SUFFIX])
    for before, after in zip(rows, read_rows(plain, None), strict=True):
        yield before, after, before.abs() * _BF16_ROUNDING


def _of_packed(
    weight: Stored, old: Mapping[str, Stored], packed: Stored, scale: Stored, bits: int
) -> Iterator[Piece]:
    step = rows_at_once(weight.shape[1])
    pieces = zip(
        read_rows(weight, old.get(weight.name + SCALE_SUFFIX)),
        read_pieces(packed, step),
        read_pieces(scale, step),
        strict=True,
    )
    for before, integers, scales in pieces:
        largest = before.unflatten(1, (-1, GROUP)).abs().amax(2, keepdim=True)
        # Half a step, of 2^bits - 1 steps between the largest value and its opposite.
        allowed = largest / ((1 << bits) - 1) * _SCALE_ROUNDING * _FP32_ROUNDING
        after = unpack(integers, scales, bits)
        yield before, after, allowed.expand(-1, -1, GROUP).flatten(1)


def measured(name: str, form: str, pieces: Iterator[Piece]) -> Compared:
    """How far a tensor is off, by pieces of it."""
    largest = share = squares = total = 0.0
    for before, after, allowed in pieces:
        same = (before == after) | (before.isnan() & after.isnan())
        error = torch.where(same, 0.0, (before - after).abs()).nan_to_num(nan=math.inf)
        shares = torch.where(same, 0.0, error / allowed).nan_to_num(nan=math.inf, posinf=math.inf)
        largest = max(largest, error.max().item())
        share = max(share, shares.max().item())
        squares += error.square().sum(dtype=torch.float64).item()
        total += before.square().sum(dtype=torch.float64).item()
    relative = math.sqrt(squares / total) if total else squares and math.inf
    return Compared(name, form, largest, relative, share)


def _packed_names(name: str) -> tuple[str, str, str]:
    return f"{name}_packed", f"{name}_scale", f"{name}_shape"


def unknown(name: str, form: str) -> Compared:
    """Of a tensor that cannot be compared; `form` says why."""
    return Compared(name, form, math.inf, math.inf, math.inf)
