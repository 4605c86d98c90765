"""Texts with one question each, whose answer stands in the text: exams, plainly graded."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from dsa_plugin.training.exam import DEPTHS, Question, make_exam

STOP = "\n"
MAX_TOKENS = 48
# A quote needs room for its words.
_KINDS, _QUOTES_FROM = ("single", "quote"), 128
_NONCE, _QUESTION = 8, 16
_TEXT_SHARE, _DENSITY = 0.97, 0.3
# Facts of a text at most: there are so many keys to tell them apart by.
_FACT_TOKENS = 6000


@dataclass(frozen=True)
class Prompt:
    """A text with its question, to be asked after a nonce.

    Attributes:
        length: tokens asked for; how many they are is for the server's tokenizer to say.
        number: among those of its length.
        text: the text and the question, ends with "Answer:".
        question: the question with what is right.
    """

    length: int
    number: int
    text: str
    question: Question


def make_prompts(seed: int, length: int, count: int) -> list[Prompt]:
    """Prompts of one length: a text each, the fact at another depth each time."""
    tokens = int(_TEXT_SHARE * length) - _NONCE - _QUESTION
    kinds = _KINDS if length >= _QUOTES_FROM else _KINDS[:1]
    prompts = []
    for number in range(count):
        depths = (DEPTHS[number % len(DEPTHS)],) if length >= _QUOTES_FROM else (0.5,)
        density = min(_DENSITY, _FACT_TOKENS / tokens)
        kind = kinds[number % len(kinds)]
        exam = make_exam(seed + 1000 * number + length, tokens, (kind,), depths, density)
        [question] = exam.questions
        prompts.append(Prompt(length, number, exam.text + question.ask, question))
    return prompts


def draw_nonce() -> str:
    """What no prompt began with before: a prompt after it is in no cache."""
    return f"{secrets.randbelow(1_000_000):06}. "


def is_right(question: Question, completion: str) -> bool:
    """Whether the first line says what only the text tells, in whatever sentence."""
    line = completion.strip().split("\n", 1)[0]
    wanted, said = (" ".join(text.lower().split()) for text in (question.graded, line))
    return wanted in said
