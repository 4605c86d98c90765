"""What a chip launches where its own module names no other: the values that most chips share.

Not measured: registers, spills and shared memory of the compiled kernels chose them, as
docs/compile_matrix.md lists them.
"""

from __future__ import annotations

from dsa_kernels.tuning import Configs
from dsa_kernels.tuning import LaunchConfig as Config

BASE: Configs = {
    "indexer_logits": {
        ("prefill", 8, 32): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 3),
        ("prefill", 8, 64): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 3),
        ("prefill", 16): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 3),
        ("prefill", 32): Config({"BLOCK_KEYS": 32, "BLOCK_COLUMNS": 64}, 8, 1),
        ("paged", 8, 32): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 3),
        ("paged", 8, 64): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 3),
        ("paged", 16): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 3),
        ("paged", 32): Config({"BLOCK_KEYS": 32, "BLOCK_COLUMNS": 64}, 8, 1),
        "gather": Config({"BLOCK_TOKENS": 32}, 4, 1),
    },
    "topk_select": {
        "select": Config({"BLOCK": 8192}, 4, 1),
        "sift": Config({"TILE": 4096, "SAMPLE": 4096, "ROOM": 4096}, 4, 1),
        "finish": Config({"TILE": 4096, "SAMPLE": 4096, "ROOM": 4096}, 4, 1),
        "slots": Config({"BLOCK": 2048}, 4, 1),
    },
    # BLOCK_H heads of one row, BLOCK_K latents a step.
    "sparse_mla": {
        ("float", 16): Config({"BLOCK_H": 16, "BLOCK_K": 32}, 8, 3),
        ("float", 32): Config({"BLOCK_H": 32, "BLOCK_K": 32}, 8, 2),
        ("float", 64): Config({"BLOCK_H": 32, "BLOCK_K": 32}, 8, 2),
        ("fp8", 16): Config({"BLOCK_H": 16, "BLOCK_K": 32}, 8, 3),
        ("fp8", 32): Config({"BLOCK_H": 32, "BLOCK_K": 32}, 8, 3),
        ("fp8", 64): Config({"BLOCK_H": 32, "BLOCK_K": 32}, 8, 3),
        "float32": Config({"BLOCK_H": 16, "BLOCK_K": 16}, 8, 2),
        "merge": Config({"BLOCK_D": 256, "UNROLL": 8}, 1, 1),
        "gather": Config({"BLOCK_TOKENS": 16}, 4, 1),
        "mask": Config({"WORDS": 256}, 4, 1),
        ("masked", 192): Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 64}, 8, 3),
        ("masked", 256): Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 32}, 8, 2),
        "masked float32": Config({"BLOCK_ROWS": 16, "BLOCK_KEYS": 32}, 8, 2),
    },
    "invariants": {
        "mark": Config({}, 1, 1),
        "check": Config({"BLOCK_TOKENS": 64, "BLOCK_HEADS": 32, "BLOCK_COLUMNS": 2048}, 4, 1),
        "check float32": Config(
            {"BLOCK_TOKENS": 64, "BLOCK_HEADS": 32, "BLOCK_COLUMNS": 2048}, 4, 1
        ),
        "keep": Config({"BLOCK_HEADS": 64}, 8, 1),
    },
    "cache_write": {
        "write": Config({"BLOCK_TOKENS": 2, "BLOCK_HEADS": 4}, 1, 1),
    },
}
