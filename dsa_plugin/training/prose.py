"""The prose between the facts: two novels in the public domain, see prose/README.md."""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from dsa_plugin.training.draws import Draws

BOOKS = ("the_time_machine.txt", "the_wind_in_the_willows.txt")
HELD_OUT_SHARE = 0.08
# A word this frequent is one token of a vocabulary that was made from this prose; of a rarer one a
# token covers about so many letters.
FREQUENT = 16
LETTERS_A_TOKEN = 3
# Sentences that are read on end.
RUN = (1, 4)

_SENTENCE_END = re.compile(r"(?<=[.!?])(?=[\"' ]*\s+[\"']?[A-Z])|(?<=[.!?][\"'])(?=\s+[\"']?[A-Z])")
_PIECE = re.compile(r"[A-Za-z]+|\d|[^\w\s]")


@dataclass(frozen=True)
class Sentence:
    """A sentence, and about how many tokens it has with a space before it."""

    text: str
    tokens: float


def training_prose() -> str:
    """What documents draw from, one paragraph a line."""
    return "\n".join(_paragraphs()[0])


def held_out_prose() -> str:
    """The end of each book, for perplexity; no document holds any of it."""
    return "\n".join(_paragraphs()[1])


@cache
def sentences() -> tuple[Sentence, ...]:
    """The training prose sentence by sentence, in order."""
    return tuple(
        Sentence(text.strip(), prose_tokens(text))
        for paragraph in _paragraphs()[0]
        for text in _SENTENCE_END.split(paragraph)
        if text.strip()
    )


def prose_tokens(text: str) -> float:
    """About how many tokens a piece of prose has; within 3 % for a few sentences."""
    # Whole numbers, since Python 3.12 rounds a sum of floats otherwise than 3.11.
    return sum(_piece_letters(piece) for piece in _PIECE.findall(text)) / LETTERS_A_TOKEN


class ProseReader:
    """Reads on from random places of the training prose."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._sentences = sentences()

    def run(self) -> list[Sentence]:
        """One to four sentences that follow one another."""
        length = self._draws.between(*RUN)
        start = self._draws.below(len(self._sentences) - length)
        return list(self._sentences[start : start + length])

    def words(self, tokens: float) -> str:
        """Prose of about `tokens` tokens that ends with a whole word."""
        words: list[str] = []
        place = self._draws.below(len(self._sentences) - 1000)
        while tokens >= 1:
            for word in self._sentences[place].text.split():
                tokens -= prose_tokens(word)
                if tokens < 0:
                    break
                words.append(word)
            place += 1
        return " ".join(words)


@cache
def _paragraphs() -> tuple[list[str], list[str]]:
    training, held_out = [], []
    for book in BOOKS:
        lines = (files("dsa_plugin.training") / "prose" / book).read_text("ascii").splitlines()
        first_held_out = int(len(lines) * (1 - HELD_OUT_SHARE))
        training += lines[:first_held_out]
        held_out += lines[first_held_out:]
    return training, held_out


@cache
def _frequencies() -> dict[str, int]:
    counts: dict[str, int] = {}
    for paragraph in _paragraphs()[0]:
        for piece in _PIECE.findall(paragraph):
            counts[piece] = counts.get(piece, 0) + 1
    return counts


@cache
def _piece_letters(piece: str) -> int:
    """The letters of a rare piece; as many as one token covers of any other."""
    is_frequent = _frequencies().get(piece, 0) >= FREQUENT
    return LETTERS_A_TOKEN if is_frequent else max(LETTERS_A_TOKEN, len(piece))
