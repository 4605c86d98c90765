"""sm89: RTX 4090, L4, L40S."""

from __future__ import annotations

from dsa_kernels.tuning import COMPILED, INFERRED, Changes
from dsa_kernels.tuning import LaunchConfig as Config

CHANGES: Changes = {
    "indexer_logits": {
        ("paged", 16): (Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 8, 3), COMPILED),
        ("paged", 32): (Config({"BLOCK_KEYS": 32, "BLOCK_COLUMNS": 64}, 8, 2), COMPILED),
    },
    "invariants": {
        # With 4 warps some spill 8 bytes.
        "check float32": (
            Config({"BLOCK_TOKENS": 64, "BLOCK_HEADS": 32, "BLOCK_COLUMNS": 2048}, 8, 1),
            COMPILED,
        ),
    },
    "sparse_mla": {
        # 1024 rows of 16 heads on an H100: 850 -> 554 us; decode of 32 rows with fp8: 75 -> 70.
        ("float", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 64}, 8, 2), INFERRED),
        ("fp8", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 32}, 4, 3), INFERRED),
        ("masked", 192): (Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 32}, 8, 3), COMPILED),
    },
}
