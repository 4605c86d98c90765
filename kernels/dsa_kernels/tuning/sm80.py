"""sm80: A100, A800, A30."""

from __future__ import annotations

from dsa_kernels.tuning import COMPILED, Changes
from dsa_kernels.tuning import LaunchConfig as Config

CHANGES: Changes = {
    "sparse_mla": {
        ("float", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 32}, 4, 3), COMPILED),
        ("float", 32): (Config({"BLOCK_H": 32, "BLOCK_K": 32}, 8, 3), COMPILED),
        ("float", 64): (Config({"BLOCK_H": 32, "BLOCK_K": 32}, 8, 3), COMPILED),
        ("masked", 256): (Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 64}, 8, 2), COMPILED),
    },
}
