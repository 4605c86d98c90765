"""gfx950: MI350X, MI355X.

Not measured. Chosen by registers, spills and shared memory of the compiled kernels, as
docs/compile_matrix.md lists them.
"""

from __future__ import annotations

from dsa_kernels.launch import LaunchConfig as Config

INDEXER_LOGITS = {
    ("prefill", 8): Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 8, 2),
    ("prefill", 16): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 2),
    ("prefill", 32): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 64}, 4, 1),
    ("paged", 8): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 2),
    ("paged", 16): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 2),
    ("paged", 32): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 64}, 4, 1),
    "gather": Config({"BLOCK_TOKENS": 32}, 4, 1),
}

TOPK_SELECT = {
    "select": Config({"BLOCK": 8192}, 8, 1),
    "slots": Config({"BLOCK": 2048}, 4, 1),
}

# BLOCK_H heads of one row, BLOCK_K latents a step.
SPARSE_MLA = {
    ("float", 16): Config({"BLOCK_H": 16, "BLOCK_K": 16}, 4, 1),
    ("float", 32): Config({"BLOCK_H": 32, "BLOCK_K": 16}, 4, 1),
    ("float", 64): Config({"BLOCK_H": 64, "BLOCK_K": 16}, 4, 1),
    ("fp8", 16): Config({"BLOCK_H": 16, "BLOCK_K": 16}, 4, 1),
    ("fp8", 32): Config({"BLOCK_H": 32, "BLOCK_K": 16}, 4, 1),
    ("fp8", 64): Config({"BLOCK_H": 64, "BLOCK_K": 16}, 4, 1),
    "float32": Config({"BLOCK_H": 16, "BLOCK_K": 16}, 4, 1),
    "merge": Config({"BLOCK_D": 128}, 4, 1),
    "gather": Config({"BLOCK_TOKENS": 16}, 4, 1),
    "mask": Config({"SEGMENT": 2048}, 4, 1),
    ("masked", 192): Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 64}, 4, 2),
    ("masked", 256): Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 32}, 4, 2),
    "masked float32": Config({"BLOCK_ROWS": 16, "BLOCK_KEYS": 32}, 4, 1),
}

CACHE_WRITE = {
    "latent": Config({}, 4, 1),
    "index": Config({"BLOCK_TOKENS": 16}, 4, 1),
    "query": Config({"BLOCK_ROWS": 64}, 8, 1),
}
