"""gfx950: MI350X, MI355X."""

from __future__ import annotations

from dsa_kernels.tuning import COMPILED, Changes
from dsa_kernels.tuning import LaunchConfig as Config

CHANGES: Changes = {
    "indexer_logits": {
        ("prefill", 8, 32): (Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 8, 2), COMPILED),
        ("prefill", 8, 64): (Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 8, 2), COMPILED),
        ("prefill", 16): (Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 2), COMPILED),
        ("prefill", 32): (Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 64}, 4, 1), COMPILED),
        ("paged", 8, 32): (Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 2), COMPILED),
        ("paged", 8, 64): (Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 2), COMPILED),
        ("paged", 16): (Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 2), COMPILED),
        ("paged", 32): (Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 64}, 4, 1), COMPILED),
    },
    "topk_select": {
        "select": (Config({"BLOCK": 8192}, 8, 1), COMPILED),
    },
    "sparse_mla": {
        ("float", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 16}, 4, 1), COMPILED),
        ("float", 32): (Config({"BLOCK_H": 32, "BLOCK_K": 16}, 4, 1), COMPILED),
        ("float", 64): (Config({"BLOCK_H": 64, "BLOCK_K": 16}, 4, 1), COMPILED),
        ("fp8", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 16}, 4, 1), COMPILED),
        ("fp8", 32): (Config({"BLOCK_H": 32, "BLOCK_K": 16}, 4, 1), COMPILED),
        ("fp8", 64): (Config({"BLOCK_H": 64, "BLOCK_K": 16}, 4, 1), COMPILED),
        "float32": (Config({"BLOCK_H": 16, "BLOCK_K": 16}, 4, 1), COMPILED),
        ("masked", 192): (Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 64}, 4, 2), COMPILED),
        ("masked", 256): (Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 32}, 4, 2), COMPILED),
        "masked float32": (Config({"BLOCK_ROWS": 16, "BLOCK_KEYS": 32}, 4, 1), COMPILED),
    },
}
