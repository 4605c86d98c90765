"""Which texts and questions a run asks about, and which prose it reads for perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsa_plugin.training.exam import DEPTHS, Exam, make_exam
from dsa_plugin.training.facts import KINDS
from dsa_plugin.training.prose import held_out_prose

STOP = "\n"
SHORTEST = 256
# A text may be 3 % longer than it is asked for; a question and its answer take fewer tokens.
_TEXT_SHARE, _QUESTION = 0.97, 48
_CHARACTERS_A_TOKEN = 3


@dataclass(frozen=True)
class Paper:
    """One text, its questions, and the prose read beside it.

    Attributes:
        length: tokens, at most, of the text with a question and its answer; of a tokenizer like
            that of `dsa_plugin.training`.
        document: its number among the texts of that length.
        exam: text and questions, one of each kind and depth.
        prose: held out of training, shorter.
    """

    length: int
    document: int
    exam: Exam
    prose: str


def papers(
    seed: int, lengths: Sequence[int], kinds: Sequence[str], questions: int
) -> Iterator[Paper]:
    """Texts until each kind has been asked `questions` times at each length.

    Raises:
        ValueError: a length, a kind or the number is not allowed.
    """
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"--kinds {', '.join(kinds)}; allowed: some of {', '.join(KINDS)}")
    if not lengths or min(lengths) < SHORTEST:
        raise ValueError(f"--lengths {list(lengths)}; allowed: tokens, each at least {SHORTEST}")
    if questions < 1:
        raise ValueError(f"--questions {questions}; allowed: an integer >= 1")
    for length in lengths:
        for document, start in enumerate(range(0, questions, len(DEPTHS))):
            depths = DEPTHS[: questions - start]
            tokens = int(_TEXT_SHARE * length) - _QUESTION
            exam = make_exam(seed + document, tokens, kinds, depths)
            yield Paper(length, document, exam, passage(length, document))


def passage(length: int, document: int) -> str:
    """Held-out prose of fewer than `length` tokens; from elsewhere for each document."""
    prose, characters = held_out_prose(), _CHARACTERS_A_TOKEN * length
    last = max(0, len(prose) - characters)
    start = document * characters % (last + 1)
    return prose[start : start + characters]
