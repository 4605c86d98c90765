"""How often each op of ours ran, for whoever asks with `DSA_OP_COUNTS`.

The counts live in a memory-mapped text file, one `name count` line an op, so that a reader sees
them at any time and nothing is lost however the process ends.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from dsa_plugin.env import Env

_P = ParamSpec("_P")
_R = TypeVar("_R")

OPS: list[str] = []
"""Names of the ops that are counted: `dsa_plugin.attention.ops` lists them."""
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


def counted(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """The op, noting each call; costs a lookup where nobody asked for counts."""
    OPS.append(name := op.__name__)

    @wraps(op)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        counts = _counts()
        if counts is not None:
            counts.add(name)
        return op(*args, **kwargs)

    return call
