"""How far what was served is from fp64, and whether rounding explains it.

The ops' eager forms round as the specification does. What is served may be `FACTOR` times as far
from fp64 as they are; a selected key may score so much less than the last that fp64 selects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_plugin.verification.eager import Eager
from dsa_plugin.verification.exact import Exact
from dsa_plugin.verification.reference import Maths
from dsa_plugin.verification.serving import Served

FACTOR = 3.0
STEPS = ("index keys", "latents", "selection", "attention")


@dataclass(frozen=True)
class Measured:
    """A relative error, the worst of all rows or tokens, and what rounding explains.

    NaN counts as infinite, and rounding does not explain it, even where it is in the weights.
    """

    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains it."""
        return self.error <= self.allowed and math.isfinite(self.error)


@dataclass(frozen=True)
class Selection:
    """What R rows selected.

    Attributes:
        mask: [R, L] bool.
        invalid: indices that are out of the request, or named twice.
        lacking: keys fewer than a row has to select, the most of all rows.
        margin: [R, 1], how far scores may be apart and still change places; None without scores.
    """

    mask: Tensor
    invalid: int
    lacking: int
    margin: Tensor | None

    @classmethod
    def of(cls, indices: Tensor, rows: Tensor, length: int, margin: Tensor | None) -> Selection:
        """Of topk_indices [R, index_topk], -1 padded, of rows at positions [R]."""
        inside = (indices >= 0) & (indices < length)
        mask = torch.zeros(len(indices), length + 1, dtype=torch.bool, device=indices.device)
        mask.scatter_(1, torch.where(inside, indices, length).long(), True)
        mask = mask[:, :length]
        named = mask.sum(1)
        wanted = (rows + 1).clamp(max=indices.shape[1])
        outside = int((~inside & (indices != -1)).sum())
        repeated = int((inside.sum(1) - named).sum())
        return cls(mask, outside + repeated, int((wanted - named).max()), margin)

    def misplaced(self, scores: Tensor, index_topk: int, use: Tensor | None = None) -> Tensor:
        """[R, L] bool: keys selected or left out against their scores, by more than the margin.

        Args:
            scores: [R, L] fp64.
            index_topk: keys that a row selects.
            use: [L] bool, keys that count; the best of them are then those that were selected.
        """
        assert self.margin is not None
        if use is None:
            last = scores.topk(min(index_topk, scores.shape[1]), -1).values[:, -1:]
            over, under = scores > last + self.margin, scores < last - self.margin
        else:
            scores = scores.masked_fill(~use, -torch.inf)
            last = scores.masked_fill(~self.mask, torch.inf).masked_fill(~use, torch.inf)
            over = (scores > last.amin(1, keepdim=True) + self.margin) & use
            under = torch.zeros_like(over)
        return (over & ~self.mask) | (under & self.mask)

    def indices(self) -> Tensor:
        """[R, most of a row] int64: the positions of each row's mask in order, then -1."""
        position = torch.arange(self.mask.shape[1], device=self.mask.device)
        beyond = self.mask.shape[1]
        ordered = position.where(self.mask, beyond).sort(1).values
        ordered = ordered[:, : max(1, int(self.mask.sum(1).max()))]
        return ordered.masked_fill(ordered == beyond, -1)


@dataclass(frozen=True)
class Cell:
    """One layer at one length with one kind of cache.

    Attributes:
        layer, length: which.
        caches: dtype of both: the model's or "fp8".
        source: the layer whose indexer selects.
        true_input: whether the layer read its own input, and not that of a lower layer.
        agreement: the share of fp64's selection that was selected; None where nothing was scored.
        misplaced: keys selected or left out against their scores, of all rows.
        keys, latents, out: errors of both caches and of the result.
        mistakes: what a wrong result comes from, as far as it is known.
    """

    layer: int
    length: int
    caches: str
    source: int
    true_input: bool
    agreement: float | None
    misplaced: int
    keys: Measured | None
    latents: Measured
    out: Measured
    mistakes: tuple[str, ...] = ()

    @property
    def errors(self) -> dict[str, Measured]:
        """By step, but for the selection."""
        steps = {"index keys": self.keys, "latents": self.latents, "attention": self.out}
        return {name: measured for name, measured in steps.items() if measured is not None}

    @property
    def wrong(self) -> tuple[str, ...]:
        """The steps that are off."""
        off = {name for name, measured in self.errors.items() if not measured.ok}
        off |= {"selection"} if self.misplaced else set()
        return tuple(step for step in STEPS if step in off)


def relative(found: Tensor, truth: Tensor) -> Tensor:
    """[T] L2 error of each of T vectors, of any shape, relative to the truth's; NaN is infinite."""
    found, truth = found.double().flatten(1), truth.flatten(1)
    size = truth.norm(dim=1).clamp(min=1e-300)
    error: Tensor = (found - truth).norm(dim=1) / size
    return error.nan_to_num(torch.inf, torch.inf)


def measured(found: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> Measured:
    """The error of what was found beside the eager form's."""
    # Where the eager form happens to be exact, one rounding is what may be expected.
    allowed = max(FACTOR * float(relative(eager, truth).max()), torch.finfo(dtype).eps)
    return Measured(float(relative(found, truth).max()), allowed)


def margin_of(eager: Eager, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1]: two scores may each be off by FACTOR times the eager form's worst error."""
    assert eager.scores is not None
    seen = truth > -torch.inf
    off = (eager.scores.double() - truth).masked_fill(~seen, 0).abs().amax(1, keepdim=True)
    size = truth.masked_fill(~seen, 0).abs().amax(1, keepdim=True)
    return 2 * FACTOR * torch.maximum(off, size * torch.finfo(dtype).eps * 2**-3)


def agreement(selection: Selection, scores: Tensor, index_topk: int) -> float:
    """The mean share of fp64's selection that was selected."""
    best = scores.topk(min(index_topk, scores.shape[1]), -1).indices
    right = selection.mask.gather(1, best) & (scores.gather(1, best) > -torch.inf)
    return float((right.sum(1) / (scores > -torch.inf).sum(1).clamp(max=index_topk)).mean())


def caches(
    exact: Exact, served: Served, eager: Eager, maths: Maths, *, fp8: bool, dtype: torch.dtype
) -> tuple[Measured | None, Measured]:
    """Errors of index keys, where there are any, and latents."""
    keys = None
    if served.keys is not None and eager.keys is not None:
        keys = measured(served.keys, eager.keys, exact.keys(maths, fp8=fp8), dtype)
    return keys, measured(served.latents, eager.latents, exact.latents(maths), dtype)
