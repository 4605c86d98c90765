"""Entries of either cache as bits: filled with what no writer writes, and read back.

Each value of the filling is all ones, which is a NaN in every dtype of both layouts, and another
one than arithmetic makes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_kernels.dims import INDEX_FP8_BYTES
from dsa_kernels.layout import index_fp8_views, latent_fp8_views

_FILLING = -1
_E4M3_NAN = 0x7F
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def fill(cache: Tensor, blocks: Tensor, offsets: Tensor, chosen: Tensor) -> None:
    """Fill the chosen ones of T entries; the others keep what they hold. Nothing syncs.

    Args:
        cache: of latents or index keys. Layouts: `dsa_kernels.layout`.
        blocks, offsets: [T] int, inside the cache.
        chosen: [T] bool.
    """
    dense = cache.dtype != torch.uint8 or cache.shape[2] != INDEX_FP8_BYTES
    for part in (cache,) if dense else _parts(cache):
        bits = part.view(_BITS[part.itemsize])
        bits[blocks, offsets] = bits[blocks, offsets].masked_fill(chosen[:, None], _FILLING)


def unwritten_and_nan(cache: Tensor, blocks: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Which of T entries are still filled, and which hold a NaN: both [T] bool."""
    filled, nan = [], []
    for part in _parts(cache):
        bits = part.view(_BITS[part.itemsize])[blocks, offsets]
        filled.append((bits == _FILLING).all(-1))
        nan.append(_is_nan(bits, part.dtype))
    return torch.stack(filled).all(0), torch.stack(nan).any(0)


def nan_in_blocks(cache: Tensor, blocks: Tensor) -> Tensor:
    """[N, block_size] bool of N blocks: which of their entries hold a NaN."""
    nan = [_is_nan(p.view(_BITS[p.itemsize])[blocks], p.dtype) for p in _parts(cache)]
    return torch.stack(nan).any(0)


def any_nan(rows: Tensor) -> Tensor:
    """[T] bool: which rows of a tensor [T, ...] of any dtype hold a NaN."""
    rows = rows.flatten(1)
    return _is_nan(rows.view(_BITS[rows.itemsize]), rows.dtype)


def _is_nan(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the last dimension's values, which lie in `bits`."""
    if dtype == torch.float8_e4m3fn:
        return ((bits & _E4M3_NAN) == _E4M3_NAN).any(-1)
    return bits.view(dtype).isnan().any(-1)


def _parts(cache: Tensor) -> tuple[Tensor, ...]:
    """Views [blocks, block_size, _] of one dtype each, which together are the entries."""
    if cache.dtype != torch.uint8:
        return (cache,)
    if cache.shape[2] == INDEX_FP8_BYTES:
        keys, scales = index_fp8_views(cache)
        return keys, scales[..., None]
    return latent_fp8_views(cache)
