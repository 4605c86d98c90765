"""The grid that is asked: lengths, and at each of them four ways of asking."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

_PAST_CACHES = (1024, 4096, 32768, 131072)
# Neighbours nearer than this tell nothing apart.
_STEP = 1.3
# Tokens that a batch may have together, so that it fits beside other users' requests.
_BATCH_TOKENS = 1 << 18
QUESTION_TOKENS = 64
"""Room for a question and its answer in the longest request."""
SHORTEST = 40


@dataclass(frozen=True)
class Mode:
    """One way of asking.

    Attributes:
        batch: several requests at a time, and not one.
        cached: the same prompt a second time.
    """

    batch: bool
    cached: bool

    @property
    def name(self) -> str:
        return ", ".join(
            ("in a batch" if self.batch else "alone", "cached" if self.cached else "cold")
        )


ALONE_COLD = Mode(batch=False, cached=False)
ALONE_CACHED = Mode(batch=False, cached=True)
BATCH_COLD = Mode(batch=True, cached=False)
BATCH_CACHED = Mode(batch=True, cached=True)
MODES = (ALONE_COLD, ALONE_CACHED, BATCH_COLD, BATCH_CACHED)
"""In the order in which they are asked: each cached one right after its cold one."""


def default_lengths(index_topk: int, chunk: int | None) -> list[int]:
    """Tokens of requests: one within index_topk, the others on both sides of each threshold."""
    within = min(1024, 3 * index_topk // 4)
    wanted = {2 * index_topk, *(length for length in _PAST_CACHES if length > index_topk)}
    if chunk is not None:
        wanted |= {3 * chunk // 2}
        if chunk > 3 * index_topk:
            wanted |= {3 * chunk // 4}
    lengths = [max(SHORTEST, within)]
    for length in sorted(wanted):
        crossed = any(lengths[-1] <= limit < length for limit in (index_topk, chunk or 0))
        if length > _STEP * lengths[-1] or crossed:
            lengths.append(length)
    return lengths


def that_fit(lengths: Sequence[int], max_model_len: int | None) -> list[int]:
    """Lengths whose requests the server takes."""
    if max_model_len is None:
        return list(lengths)
    return [length for length in lengths if length + QUESTION_TOKENS <= max_model_len]


def edges(lengths: Sequence[int], index_topk: int, chunk: int | None) -> list[int]:
    """Positions that part what was asked: thresholds, and middles of lengths without one."""
    limits = [limit for limit in (index_topk, chunk) if limit is not None]
    between = [
        math.isqrt(shorter * longer)
        for shorter, longer in itertools.pairwise(lengths)
        if not any(shorter <= limit < longer for limit in limits)
    ]
    return sorted({*limits, *between})


def concurrency(wanted: int, length: int) -> int:
    """Requests of a length that are asked at once: two at least, for a batch it has to be."""
    return max(2, min(wanted, _BATCH_TOKENS // length))
