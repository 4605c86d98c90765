"""The next token of each request, from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest, the smaller id among equals.
        top_p: drawn from are the likeliest whose probabilities reach this sum.
        seed: of the draws; a prompt's own are the same in whatever batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; allowed: 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; allowed: more than 0, at most 1")


class Sampler:
    """Draws for requests of these numbers, which are added to the seed."""

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        self.sampling = sampling
        self._generators = [
            torch.Generator().manual_seed(sampling.seed + number) for number in numbers
        ]

    def draw(self, logits: Tensor, requests: Sequence[int]) -> Tensor:
        """Tokens [n] int64 on the logits' device; logits [n, vocab] fp32 are of `requests`."""
        if not self.sampling.temperature:
            return logits.argmax(-1)
        # On the CPU: the same seed then draws the same everywhere.
        probabilities = (logits.cpu().double() / self.sampling.temperature).softmax(-1)
        drawn = [
            torch.multinomial(nucleus(row, self.sampling.top_p), 1, generator=self._generators[r])
            for row, r in zip(probabilities, requests, strict=True)
        ]
        return torch.cat(drawn).to(logits.device)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """[vocab] with zeros but at the likeliest tokens whose sum first reaches top_p."""
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.where(before < top_p, ordered, 0)
    return torch.zeros_like(probabilities).scatter(0, tokens, kept)
