"""Which of an op's kernels does some work: times of one form are not those of another."""

from __future__ import annotations

import re

from dsa_plugin.planning.sizes import CacheDtype

PIECE = 8 * 1024  # columns that a program of topk_select holds, on every chip


def sparse_mla_form(latents: CacheDtype, heads: int) -> str:
    """By what it reads, and how many heads share a program."""
    return f"{latents}, {next((n for n in (16, 32) if heads <= n), 64)} heads"


def masked_mha_form(width: int) -> str:
    return f"heads of {width}"


def indexer_logits_form(stage: str, keys: CacheDtype, heads: int) -> str:
    return f"{stage}, {keys}, {heads} heads"


def topk_select_form(columns: float) -> str:
    """By the columns that its launches are for, which a CUDA graph fixes.

    A longer row's best are found among candidates that a sample suggests.
    """
    return "one piece" if columns <= PIECE else "sample"


def read_form(op: str, case: str) -> tuple[str, str]:
    """Op and form of a case of benchmarks/kernels.py, "decode 32K, 8 rows, 128 heads, fp8"."""
    dtype: CacheDtype = "bf16" if "bf16" in case else "fp8"
    heads, keys = (re.search(unit, case) for unit in (r"(\d+) heads", r"(\d+)K"))
    stage = "decode" if "decode" in case else "prefill"
    if op == "sparse_mla" and heads:
        return op, sparse_mla_form(dtype, int(heads[1]))
    if op == "masked_mha":
        width = re.search(r"heads of (\d+)", case)
        return op, masked_mha_form(int(width[1]) if width else 192)
    if op == "indexer_logits" and heads:
        return op, indexer_logits_form(stage, dtype, int(heads[1]))
    if op == "topk_select" and keys:
        return op, topk_select_form(int(keys[1]) * 1024)
    return op, dtype
