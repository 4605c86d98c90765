"""sm120: RTX 5090, RTX PRO 6000, GB10."""

from __future__ import annotations

from dsa_kernels.tuning import COMPILED, Changes
from dsa_kernels.tuning import LaunchConfig as Config

CHANGES: Changes = {
    "indexer_logits": {
        ("paged", 16): (Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 8, 2), COMPILED),
        ("paged", 32): (Config({"BLOCK_KEYS": 32, "BLOCK_COLUMNS": 64}, 8, 2), COMPILED),
    },
    "sparse_mla": {
        ("masked", 192): (Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 64}, 8, 2), COMPILED),
    },
}
