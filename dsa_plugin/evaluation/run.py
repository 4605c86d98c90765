"""Have a model under each variant answer every question, keeping each cell as it is done."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from dsa_plugin.evaluation.exams import STOP, Paper
from dsa_plugin.evaluation.results import Answer, Cell
from dsa_plugin.evaluation.variants import Variant
from dsa_plugin.training.exam import graded_right


class Model(Protocol):
    """What answers."""

    @abstractmethod
    def complete(self, text: str, asks: Sequence[str], max_tokens: int, stop: str) -> list[str]:
        """What it says after `text + ask`, for each ask, up to `stop`; greedy."""

    @abstractmethod
    def token_logprobs(self, text: str) -> list[float]:
        """Log-probability of each token of a text but the first."""


Under = Callable[[Variant], AbstractContextManager[Model]]
"""The model, selecting by a variant."""


def cells(
    under: Under,
    work: Sequence[tuple[Variant, Sequence[Paper]]],
    max_gen_toks: int,
    *,
    perplexity: bool,
) -> Iterator[Cell]:
    """Each paper's cell as it is done; a variant that has none to do is not started."""
    for variant, papers in work:
        if not papers:
            continue
        with under(variant) as model:
            for paper in papers:
                yield _cell(model, variant, paper, max_gen_toks, perplexity=perplexity)


def _cell(
    model: Model, variant: Variant, paper: Paper, max_gen_toks: int, *, perplexity: bool
) -> Cell:
    start = time.monotonic()
    questions = paper.exam.questions
    asks = [question.ask for question in questions]
    completions = model.complete(paper.exam.text, asks, max_gen_toks, STOP)
    logprobs = model.token_logprobs(paper.prose) if perplexity else []
    return Cell(
        variant=variant.name,
        length=paper.length,
        document=paper.document,
        answers=[
            Answer(
                kind=question.kind,
                depth=question.depth,
                expected=question.graded,
                completion=completion,
                right=graded_right(question, completion),
            )
            for question, completion in zip(questions, completions, strict=True)
        ],
        nll=-sum(logprobs) if logprobs else None,
        nll_tokens=len(logprobs),
        seconds=round(time.monotonic() - start, 1),
    )
