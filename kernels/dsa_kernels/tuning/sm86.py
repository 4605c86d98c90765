"""sm86: RTX 3090, A10, A40, A6000."""

from __future__ import annotations

from dsa_kernels.tuning import COMPILED, Changes, Source
from dsa_kernels.tuning import LaunchConfig as Config

# On an H100 too, tiles of up to 32 heads multiply by mma.sync. Its warps share the latents of a
# step, eight each, so a BLOCK_K of less than eight a warp repeats products.
H100 = Source(
    "benchmarks/results/h100-sweep.json",
    gpu="NVIDIA H100 80GB HBM3",
    triton="3.6.0",
    inferred=True,
)

CHANGES: Changes = {
    "indexer_logits": {
        ("paged", 16): (Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 8, 3), COMPILED),
        ("paged", 32): (Config({"BLOCK_KEYS": 32, "BLOCK_COLUMNS": 64}, 8, 2), COMPILED),
    },
    "sparse_mla": {
        # 1024 rows of 16 heads there: 850 -> 554 us.
        ("float", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 64}, 8, 2), H100),
        ("masked", 192): (Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 32}, 8, 3), COMPILED),
    },
}
