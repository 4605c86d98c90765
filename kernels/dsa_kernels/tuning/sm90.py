"""sm90: H100, H200, H20, GH200."""

from __future__ import annotations

from dsa_kernels.tuning import COMPILED, H100_SWEEP, Changes, ChangesByTriton
from dsa_kernels.tuning import LaunchConfig as Config

CHANGES: Changes = {
    "indexer_logits": {
        # 512 rows at 128K: 1,187 -> 1,151 us. 32 requests at 32K: 71.5 -> 59.2.
        ("prefill", 8, 64): (Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 256}, 8, 3), H100_SWEEP),
        ("paged", 8, 64): (Config({"BLOCK_KEYS": 128, "BLOCK_COLUMNS": 128}, 4, 3), H100_SWEEP),
    },
    "sparse_mla": {
        ("float", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 64}, 4, 2), COMPILED),
        ("float", 32): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 3), COMPILED),
        ("float", 64): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 3), COMPILED),
        ("fp8", 16): (Config({"BLOCK_H": 16, "BLOCK_K": 32}, 4, 3), COMPILED),
        ("masked", 256): (Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 32}, 8, 3), COMPILED),
    },
}

# A BLOCK_H of 64 multiplies by wgmma, though scores are computed once in each of two warpgroups. It
# spills 80 bytes a thread with Triton 3.6, and up to 608 with 3.9, which nobody measured.
BY_TRITON: ChangesByTriton = {
    "3.6": {
        "sparse_mla": {
            # 1024 rows, 128 heads: 168 -> 236 TF. Decode of 32 rows: 117 -> 123 us, 15 of them a
            # merge that has been replaced and should take 6. One row, 15 -> 17, has key 32.
            ("float", 64): (Config({"BLOCK_H": 64, "BLOCK_K": 64}, 8, 2), H100_SWEEP),
            # Decode, 128 heads: 128 rows 1183 -> 843 us, 32 302 -> 215, 8 94 -> 72, one 20 -> 17.
            ("fp8", 32): (Config({"BLOCK_H": 32, "BLOCK_K": 64}, 8, 3), H100_SWEEP),
            # The same: 1183 -> 414 us, 302 -> 128, 94 -> 48, 20 -> 17, with bf16 queries, which
            # spill 16 bytes, none of them in the loop. With fp16 112 do: 23 of the loop's 1,750
            # instructions, for 8 warps 46 issue slots of some 11,000 cycles a step. One stage
            # spilled 128 in the sweep and took 3 to 7 % longer; 64 by 32, 8 to 19 %.
            ("fp8", 64): (Config({"BLOCK_H": 64, "BLOCK_K": 64}, 8, 2), H100_SWEEP),
        },
    },
}
