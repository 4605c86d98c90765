"""Which of its forms a prefill's attention takes on a GPU: numbers alone, as plans need them.

By times of an H100 (docs/measured.md), whose relation other GPUs are taken to share.
"""

from __future__ import annotations

from dsa_kernels.dims import KV_LORA_RANK, LATENT_DIM, ROPE_DIM

# Multiply-adds a ns of products with weights, of masked_mha and of sparse_mla; ns of a gathered
# latent, of a row's mask, of a decoded latent; launches of about ten kernels.
_WEIGHTS, _MASKED, _SPARSE = 300_000, 165_000, 118_000
_GATHER, _MASK, _DECODE, _LAUNCHES = 0.23, 30, 0.7, 50_000


def is_masked_faster(
    rows: int, keys: int, topk: int, *, heads: int, width: int, v_width: int
) -> bool:
    """As `dsa_kernels.sparse_mla.masked_is_faster`."""
    weights = heads * KV_LORA_RANK * (width - ROPE_DIM + v_width) / _WEIGHTS
    pairs = rows * (keys - (rows - 1) / 2)
    masked = _LAUNCHES + keys * (_DECODE + weights)
    masked += rows * _MASK + pairs * heads * (width + v_width) / _MASKED
    latent = max(_GATHER, heads * (LATENT_DIM + KV_LORA_RANK) / _SPARSE)
    return masked <= rows * weights + selected_keys(rows, keys, topk) * latent


def is_decoding_first_faster(rows: int, keys: int, topk: int) -> bool:
    """As `dsa_kernels.sparse_mla.decoding_first_is_faster`, of an fp8 cache."""
    return 5 * (keys + 4096) <= 2 * rows * min(topk, keys)


def selected_keys(rows: int, keys: int, topk: int) -> float:
    """Keys that causal rows select, the last of which sees `keys`."""
    first = keys - rows + 1
    short = min(rows, max(0, topk - first))  # rows that see fewer than topk
    return (rows - short) * topk + short * (2 * first + short - 1) / 2
