"""sm90: H100, H200, H20, GH200."""

from __future__ import annotations

from dsa_kernels.tuning import COMPILED, Changes
from dsa_kernels.tuning import LaunchConfig as Config

CHANGES: Changes = {
    # A BLOCK_H of 64 would multiply by wgmma, but Triton 3.9 computes its scores once in each of
    # two warpgroups, and spills 656 bytes a thread at BLOCK_K 64, 192 at 32. To be decided by
    # measurement.
    "sparse_mla": {
        ("float", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 64}, 4, 2), COMPILED),
        ("float", 32): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 3), COMPILED),
        ("float", 64): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 3), COMPILED),
        ("fp8", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 32}, 4, 3), COMPILED),
        ("masked", 256): (Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 32}, 8, 3), COMPILED),
    },
    "cache_write": {
        "index": (Config({"BLOCK_TOKENS": 16}, 8, 1), COMPILED),
    },
}
