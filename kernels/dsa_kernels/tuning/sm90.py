"""sm90: H100, H200, H20, GH200."""

from __future__ import annotations

from dsa_kernels.tuning import COMPILED, Changes, Source
from dsa_kernels.tuning import LaunchConfig as Config

SWEEP = Source("benchmarks/results/h100-sweep.json", gpu="NVIDIA H100 80GB HBM3", triton="3.6.0")

CHANGES: Changes = {
    "indexer_logits": {
        # 512 rows at 128K: 1,187 -> 1,151 us. 32 requests at 32K: 71.5 -> 59.2.
        ("prefill", 8, 64): (Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 256}, 8, 3), SWEEP),
        ("paged", 8, 64): (Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 4, 3), SWEEP),
    },
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
}
