"""Cells added up: recall by what a table or figure groups it by, and perplexity."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar

from dsa_plugin.evaluation.results import Answer, Cell

Key = TypeVar("Key", bound=Hashable)


class Recall(NamedTuple):
    """Answers, and how many of them were right."""

    right: int
    asked: int

    @property
    def points(self) -> float:
        """Of a hundred."""
        return 100 * self.right / self.asked


def recall(cells: Iterable[Cell], group: Callable[[Cell, Answer], Key]) -> dict[Key, Recall]:
    """Recall of each group of answers, in the order in which they were first met."""
    asked: Counter[Key] = Counter()
    right: Counter[Key] = Counter()
    for cell in cells:
        for answer in cell.answers:
            key = group(cell, answer)
            asked[key] += 1
            right[key] += answer.right
    return {key: Recall(right[key], number) for key, number in asked.items()}


def perplexity(cells: Iterable[Cell], group: Callable[[Cell], Key]) -> dict[Key, float]:
    """exp of the mean negative log-likelihood of a token, of each group of cells that has any."""
    nll: dict[Key, float] = {}
    tokens: Counter[Key] = Counter()
    for cell in cells:
        if cell.nll is not None:
            key = group(cell)
            nll[key] = nll.get(key, 0.0) + cell.nll
            tokens[key] += cell.nll_tokens
    return {key: math.exp(nats / tokens[key]) for key, nats in nll.items()}
