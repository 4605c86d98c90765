"""What dsa_recall.yaml calls: lm-evaluation-harness asks dsa eval's questions and grades by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dsa_plugin.evaluation.exams import papers
from dsa_plugin.training.exam import Question, graded_right
from dsa_plugin.training.facts import KINDS


def load(lengths: Sequence[int], questions: int, seed: int, **_metadata: Any) -> Any:
    """A data set with a row for each question; the arguments are the task's metadata."""
    from datasets import Dataset, DatasetDict  # type: ignore[import-not-found]

    return DatasetDict(test=Dataset.from_list(rows(lengths, questions, seed)))


def rows(lengths: Sequence[int], questions: int, seed: int) -> list[dict[str, Any]]:
    """The questions, each with its prompt."""
    return [
        {"prompt": paper.exam.text + question.ask, "length": paper.length}
        | dataclasses.asdict(question)
        for paper in papers(seed, lengths, KINDS, questions)
        for question in paper.exam.questions
    ]


def grade(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the completion is right."""
    fields = [field.name for field in dataclasses.fields(Question)]
    question = Question(**{name: doc[name] for name in fields})
    return {"recall": float(graded_right(question, results[0]))}
