"""sm80: A100, A800, A30."""

from __future__ import annotations

from dsa_kernels.tuning import COMPILED, INFERRED, Changes
from dsa_kernels.tuning import LaunchConfig as Config

CHANGES: Changes = {
    "invariants": {
        # With 4 warps some spill 8 bytes.
        "check": (
            Config({"BLOCK_TOKENS": 64, "BLOCK_HEADS": 32, "BLOCK_COLUMNS": 2048}, 8, 1),
            COMPILED,
        ),
        "check float32": (
            Config({"BLOCK_TOKENS": 64, "BLOCK_HEADS": 32, "BLOCK_COLUMNS": 2048}, 8, 1),
            COMPILED,
        ),
    },
    "sparse_mla": {
        # 1024 rows on an H100: 16 heads 592 -> 490 us, 128 heads 5708 -> 3928.
        ("float", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 64}, 4, 2), INFERRED),
        ("float", 32): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 2), INFERRED),
        ("float", 64): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 2), INFERRED),
        # Decode of 32 rows on an H100: 75 -> 64 us.
        ("fp8", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 64}, 8, 2), INFERRED),
        ("masked", 256): (Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 64}, 8, 2), COMPILED),
    },
}
