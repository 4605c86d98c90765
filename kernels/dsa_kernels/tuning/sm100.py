"""sm100: B200, GB200, B300."""

from __future__ import annotations

from dsa_kernels.tuning import COMPILED, Changes
from dsa_kernels.tuning import LaunchConfig as Config

CHANGES: Changes = {
    "indexer_logits": {
        ("prefill", 8, 32): (Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 8, 3), COMPILED),
        ("prefill", 8, 64): (Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 8, 3), COMPILED),
        ("prefill", 16): (Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 8, 3), COMPILED),
    },
    # A BLOCK_H of 64 should multiply by tcgen05, but Triton 3.9 compiles it to a kernel that does
    # nothing: ci/compile finds no tcgen05 in it.
    "sparse_mla": {
        ("float", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 64}, 4, 2), COMPILED),
        ("float", 32): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 3), COMPILED),
        ("float", 64): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 3), COMPILED),
        ("fp8", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 32}, 4, 3), COMPILED),
        ("masked", 256): (Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 32}, 8, 3), COMPILED),
    },
}
