"""sm120: RTX 5090, RTX PRO 6000, GB10.

Not measured. Chosen by registers, spills and shared memory of the compiled kernels, as
docs/compile_matrix.md lists them.
"""

from __future__ import annotations

from dsa_kernels.launch import LaunchConfig as Config

INDEXER_LOGITS = {
    ("prefill", 8): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 3),
    ("prefill", 16): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 3),
    ("prefill", 32): Config({"BLOCK_KEYS": 32, "BLOCK_COLUMNS": 64}, 8, 1),
    ("paged", 8): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 3),
    ("paged", 16): Config({"BLOCK_KEYS": 64, "BLOCK_COLUMNS": 128}, 4, 3),
    ("paged", 32): Config({"BLOCK_KEYS": 32, "BLOCK_COLUMNS": 64}, 8, 1),
}
