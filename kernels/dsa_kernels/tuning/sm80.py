"""sm80: A100, A800, A30."""

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
    "sparse_mla": {
        # 1024 rows there: 16 heads 592 -> 490 us, 128 heads 5708 -> 3928.
        ("float", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 64}, 4, 2), H100),
        ("float", 32): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 2), H100),
        ("float", 64): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 2), H100),
        # Decode of 32 rows there: 75 -> 64 us.
        ("fp8", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 64}, 8, 2), H100),
        ("masked", 256): (Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 64}, 8, 2), COMPILED),
    },
}
