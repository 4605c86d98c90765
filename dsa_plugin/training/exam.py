"""Exams: one document, and at its end one question at a time, whose facts lie at chosen depths."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsa_plugin.training.documents import check_kinds
from dsa_plugin.training.draws import Draws
from dsa_plugin.training.facts import KINDS, MAKERS, Item, Source, fact_tokens, question_text
from dsa_plugin.training.keys import Keys
from dsa_plugin.training.prose import ProseReader

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Question:
    """What follows the exam's text in a prompt (`ask`, ends with "Answer:"), and what is right.

    `graded` is the part of `answer` that only the text tells. The last fact that the answer rests
    on lies at `depth`: 0 is the start of the text, 1 its end.
    """

    kind: str
    ask: str
    answer: str
    graded: str
    depth: float


@dataclass(frozen=True)
class Exam:
    text: str
    questions: tuple[Question, ...]


def make_exam(
    seed: int,
    tokens: int,
    kinds: Sequence[str] = KINDS,
    depths: Sequence[float] = DEPTHS,
    density: float = 0.3,
    held_out: bool = True,
) -> Exam:
    """A text of about `tokens` tokens and a question of each kind at each depth.

    `density` is the share of facts in the text; beyond those of the questions they are of the same
    kinds and near their keys, and nobody asks for them.
    """
    check_kinds(dict.fromkeys(kinds, 1.0))
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths {list(depths)}; each is a share of the text, from 0 to 1")
    draws = Draws(seed)
    keys = Keys(draws, int(tokens * density / 6) + 8 * len(kinds) * len(depths), held_out)
    asked, unasked = Source(draws, keys.take), Source(draws, keys.take_unasked)
    unasked.homes = asked.homes
    questions = [(MAKERS[kind](asked), depth) for kind in kinds for depth in depths]
    placed = [fact for item, depth in questions for fact in _placed(draws, item, depth)]
    told = sum(fact_tokens(sentence) for _, sentence in placed)
    if told > 0.9 * tokens:
        raise ValueError(
            f"{len(questions)} questions need {told} tokens of facts, too many for {tokens}; "
            "ask for fewer kinds or depths, or for more tokens"
        )
    while told < density * tokens:
        extra = _placed(draws, MAKERS[draws.pick(kinds)](unasked), draws.random())
        placed += extra
        told += sum(fact_tokens(sentence) for _, sentence in extra)
    return Exam(_text(draws, sorted(placed), tokens), tuple(_question(*q) for q in questions))


def graded_right(question: Question, completion: str) -> bool:
    """Whether the first line of `completion` ends as the answer does from its graded part on."""
    line = completion.strip().split("\n", 1)[0].rstrip()
    return f" {line}".endswith(question.answer[question.answer.rindex(question.graded) :])


def _placed(draws: Draws, item: Item, depth: float) -> list[tuple[float, str]]:
    """The facts of `item` with their depths: the last at `depth`, the others before it."""
    before = sorted(draws.random() * depth for _ in item.facts[1:])
    return list(zip([*before, depth], item.facts, strict=True))


def _text(draws: Draws, placed: list[tuple[float, str]], tokens: int) -> str:
    """`placed` at their depths among prose; its opening is cut short to make `tokens` in all."""
    reader = ProseReader(draws)
    room: float = tokens - 1 - sum(fact_tokens(sentence) for _, sentence in placed)
    pieces: list[str] = []
    used = 0.0
    for depth, sentence in [*placed, (1.0, "")]:
        while used < depth * tokens:
            prose = [s for s in reader.run() if s.tokens <= room]
            if not prose:
                break
            pieces.append(prose[0].text)
            used += prose[0].tokens
            room -= prose[0].tokens
        pieces.append(sentence)
        used += fact_tokens(sentence)
    opening = reader.words(room)
    return " ".join(piece for piece in [opening, *pieces] if piece) + "\n"


def _question(item: Item, depth: float) -> Question:
    start, end = item.graded
    return Question(
        kind=item.kind,
        ask=question_text(item.ask),
        answer=f" {item.answer}",
        graded=item.answer[start:end],
        depth=depth,
    )
