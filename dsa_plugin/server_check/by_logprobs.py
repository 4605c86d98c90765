"""Faults by how far log-probabilities lie from transformers', by position and way of asking.

Tokens are the prompt's own and those that the server generated itself, each after what stands
before it: teacher-forced. Positions are those of the token whose probability it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsa_plugin.server_check.faults import Fault, Finding, onset
from dsa_plugin.server_check.grid import ALONE_COLD, Mode

BY = "log-probabilities"
Errors = Sequence[tuple[int, float]]
"""Positions and distances in nats."""
# One token that goes another way says as much as ten that are a little off.
_CLIP = 0.5
# Two right implementations in fp32 are nearer than this; index_topk - 1 is 1e-3 off.
_FP32 = 1e-4
# Of bf16's rounding: what a server may add, fp8 caches included, and what one is doubtful from.
_EVERYWHERE, _ELSEWHERE, _DOUBTFUL = 3.0, 2.0, 1.2
_FEWEST = 8
# The first token attends to itself alone: what the second one's probability is off by is rounding.
_AFTER_FIRST, _ENOUGH_FIRST = 1, 3


@dataclass(frozen=True)
class Band:
    """Tokens of one stretch of positions, asked in one way.

    Attributes:
        start: first position.
        end: the one after the last; None: no end.
        mode: how they were asked.
        tokens: that were compared.
        mean: of the distances, each at most 0.5 nats.
        largest: of the distances.
        usual: mean that rounding explains.
        allowed: mean that it may have.
    """

    start: int
    end: int | None
    mode: Mode
    tokens: int
    mean: float
    largest: float
    usual: float
    allowed: float

    @property
    def is_wrong(self) -> bool:
        return self.tokens >= _FEWEST and self.mean > self.allowed

    @property
    def text(self) -> str:
        return (
            f"{self.mean:.2g} nats off on average at positions {self.positions}, "
            f"{self.mode.name} ({self.allowed:.2g} allowed, {self.tokens:,} tokens)"
        )

    @property
    def positions(self) -> str:
        """In words."""
        return f"{self.start:,} to {self.end:,}" if self.end else f"from {self.start:,} on"


def bands(
    errors: Mapping[Mode, Errors], rounding: Errors, index_topk: int, edges: Sequence[int]
) -> list[Band]:
    """Errors by stretches of positions.

    Args:
        errors: of the server, by way of asking.
        rounding: of bf16 on the same or like tokens.
        index_topk: the model's; up to it DSA selects everything, and only rounding is left.
        edges: thresholds, index_topk among them.
    """
    limits = sorted({0, *edges})
    noise = {start: _mean(_between(rounding, start, end)) for start, end in _stretches(limits)}
    alone = _between(errors.get(ALONE_COLD, ()), 0, index_topk)
    scale = _mean(alone) / noise[0] if len(alone) >= _FEWEST and noise[0] else 1.0
    everywhere = 0.0 if _is_fp32(alone) else _EVERYWHERE
    found = []
    for mode, those in errors.items():
        for start, end in _stretches(limits):
            here = _between(those, start, end)
            if not here:
                continue
            # Rounding hardly depends on the position; a stretch without its own takes the first's.
            rounded = noise[start] or noise[0]
            usual = max(_FP32, min(scale, _EVERYWHERE) * rounded)
            limit = _ELSEWHERE * usual if start else max(_FP32, everywhere * rounded)
            # A mean of few tokens says less.
            allowed = limit * (1 + 4 / math.sqrt(len(here)))
            largest = max(error for _, error in here)
            band = Band(start, end, mode, len(here), _mean(here), largest, usual, allowed)
            found.append(band)
    return found


def find_faults(found: Sequence[Band], index_topk: int, chunk: int | None) -> list[Finding]:
    """What the bands show."""
    alone = sorted((b for b in found if b.mode == ALONE_COLD), key=lambda band: band.start)
    if wrong := [band for band in alone if band.is_wrong]:
        if wrong[0].start == 0:
            return [Finding(Fault.EVERYWHERE, 0, wrong[0].text, BY)]
        first = _first_doubtful(alone, wrong[0])
        fault = onset(first.start, first.start + 1, index_topk, chunk)
        findings = [Finding(fault, first.start, wrong[0].text, BY)]
    else:
        findings = []
    right = {band.start for band in alone if not band.is_wrong}
    for fault, of_it in ((Fault.CACHED, _is_cached), (Fault.BATCH, _is_batch)):
        worse = [b for b in found if of_it(b.mode) and b.is_wrong and b.start in right]
        if worse and not (fault is Fault.BATCH and _cached_alone_too(worse, found)):
            findings.append(Finding(fault, worse[0].start, worse[0].text, BY))
    return findings


def _is_cached(mode: Mode) -> bool:
    return mode.cached and not mode.batch


def _is_batch(mode: Mode) -> bool:
    return mode.batch


def _cached_alone_too(worse: Sequence[Band], found: Sequence[Band]) -> bool:
    """Whether all that is wrong in a batch is cached, and wrong alone too once it is cached."""
    alone = {band.start for band in found if _is_cached(band.mode) and band.is_wrong}
    return all(band.mode.cached and band.start in alone for band in worse)


def _first_doubtful(alone: Sequence[Band], wrong: Band) -> Band:
    """Where a fault that grows with the position begins to show."""
    first = wrong
    for band in reversed(alone[: alone.index(wrong)]):
        if band.start == 0 or band.mean < _DOUBTFUL * band.usual:
            break
        first = band
    return first


def _is_fp32(errors: Errors) -> bool:
    """Whether a server computes in fp32, by what rounding alone can be off."""
    first = [error for at, error in errors if at == _AFTER_FIRST]
    return len(first) >= _ENOUGH_FIRST and max(first) <= _FP32


def _stretches(limits: Sequence[int]) -> list[tuple[int, int | None]]:
    return list(zip(limits, [*limits[1:], None], strict=True))


def _between(errors: Errors, start: int, end: int | None) -> Errors:
    return [(at, error) for at, error in errors if start <= at and (end is None or at < end)]


def _mean(errors: Errors) -> float:
    if not errors:
        return 0.0
    return sum(min(error, _CLIP) for _, error in errors) / len(errors)
