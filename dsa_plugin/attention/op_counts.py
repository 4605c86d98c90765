"""How often each op of ours ran, for whoever asks with `DSA_OP_COUNTS`.

The counts live in a memory-mapped text file, one `name count` line an op, so that a reader sees
them at any time and nothing is lost however the process ends.
"""

from __future__ import annotations

import itertools
import mmap
import os
from functools import cache
from pathlib import Path

from dsa_plugin.env import Env

OPS = (
    "latent_cache_write",
    "index_cache_write",
    "index_query",
    "indexer_logits",
    "indexer_logits_paged",
    "topk_select",
    "topk_slots",
    "masked_mha",
    "sparse_mla",
)
_WIDTH = 12


class OpCounts:
    """Counters in the file `path`; the line of an op is rewritten in place."""

    def __init__(self, path: Path) -> None:
        text = "".join(f"{op} {0:>{_WIDTH}}\n" for op in OPS).encode()
        path.write_bytes(text)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), len(text))
        lengths = itertools.accumulate(len(op) + _WIDTH + 2 for op in OPS)
        self._ends: dict[str, int] = {
            op: length - 1 for op, length in zip(OPS, lengths, strict=True)
        }
        self._counts: dict[str, int] = dict.fromkeys(OPS, 0)

    def add(self, op: str) -> None:
        self._counts[op] += 1
        end = self._ends[op]
        self._map[end - _WIDTH : end] = f"{self._counts[op]:>{_WIDTH}}".encode()


@cache
def _counts() -> OpCounts | None:
    path = Env.load().op_counts
    return None if path is None else OpCounts(Path(f"{path}.{os.getpid()}"))


def count(op: str) -> None:
    """Note one call of `op`, one of `OPS`; costs a lookup where nobody asked for counts."""
    counts = _counts()
    if counts is not None:
        counts.add(op)
