"""Seeded documents that teach retrieval: prose with facts strewn in, and questions about them."""

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from dsa_plugin.training.draws import Draws
from dsa_plugin.training.facts import KINDS, MAKERS, Item, Source, fact_tokens, question_text
from dsa_plugin.training.keys import Keys
from dsa_plugin.training.prose import ProseReader

# Of the items that a document begins, the share that is never asked.
UNASKED = 0.2
UNASKED_HELD_OUT = 0.5
# Of the documents, the share that asks only at its end, as a chat does.
ASK_AT_END = 0.3
NEW_PARAGRAPH = 0.08
# Documents are written this much too short, since their length is an estimate and few should be too
# long: who cuts those loses the answers at their end.
MARGIN = 0.015

Span = tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """Character spans of one answer in its document's text.

    The answer runs from the space after "Answer:" to its full stop; the graded part is what only
    the facts tell. `sources` are the facts it rests on. A copy (a, s, n) says that text[a:a + n] is
    to be read at text[s:s + n].
    """

    kind: str
    start: int
    end: int
    graded_start: int
    graded_end: int
    sources: tuple[Span, ...]
    copies: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Document:
    text: str
    answers: tuple[Answer, ...]


def make_document(
    seed: int,
    tokens: int,
    mix: Mapping[str, float],
    held_out: bool = False,
    density: float = 0.5,
    likeness: float = 1.0,
) -> Document:
    """A document of about `tokens` tokens, the same for the same arguments everywhere.

    Its length is within 4 % from 1,024 tokens on; of shorter ones it is the less sure the more
    prose they hold.
    `mix` weighs the kinds of questions against one another; `density` is the share of the text that
    is facts and questions, the rest is prose. With `likeness` 1 the keys are made of as few words
    as can be, so that each shares words with many others; with 0 of all words. With `held_out` the
    questions are about the eighth of the keys that no document without it holds.
    """
    check_kinds(mix)
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it is a share above 0 and up to 1, such as 0.5")
    if not 0 <= likeness <= 1:
        raise ValueError(f"likeness is {likeness}; it is a share from 0 to 1")
    if tokens < 64:
        raise ValueError(
            f"a document of {tokens} tokens holds no fact and question; ask for 64 or more"
        )
    writer = _Writer(Draws(seed), tokens, mix, held_out, density, likeness)
    writer.write()
    return writer.document()


def check_kinds(mix: Mapping[str, float]) -> None:
    """Raise ValueError unless `mix` weighs at least one kind, and none but those there are."""
    unknown = sorted(set(mix) - set(KINDS))
    if unknown:
        raise ValueError(f"unknown kinds of question {unknown}; there are {', '.join(KINDS)}")
    if min(mix.values(), default=0) < 0 or sum(mix.values()) <= 0:
        raise ValueError(f"weights {dict(mix)}; none may be negative and one must be above 0")


@dataclass(frozen=True)
class _Piece:
    """A stretch of text: of `item` fact number `fact`, its question if that is None, or prose."""

    text: str
    item: Item | None = None
    fact: int | None = None

    @property
    def is_question(self) -> bool:
        return self.item is not None and self.fact is None


class _Writer:
    """Writes one document from its start to its end, keeping account of its tokens."""

    def __init__(
        self,
        draws: Draws,
        tokens: int,
        mix: Mapping[str, float],
        held_out: bool,
        density: float,
        likeness: float,
    ) -> None:
        self._draws = draws
        self._left = tokens * (1 - MARGIN)
        self._tokens = tokens
        self._prose_share = 1 - density
        self._prose = 0.0
        self._kinds = [kind for kind in KINDS if mix.get(kind, 0) > 0]
        self._weights = list(accumulate(mix[kind] for kind in self._kinds))
        self._unasked_share = UNASKED_HELD_OUT if held_out else UNASKED
        keys = Keys(draws, int(tokens * density / 12) + 8, held_out, likeness)
        self._asked_source = Source(draws, keys.take)
        self._unasked_source = Source(draws, keys.take_unasked)
        self._unasked_source.homes = self._asked_source.homes
        self._reader = ProseReader(draws)
        self._ask_at_end = draws.random() < ASK_AT_END
        # Items some of whose facts are still to be told: [item, next fact, whether to ask].
        self._open: list[tuple[Item, int, bool]] = []
        self._open_items = 2 + int(tokens * density / 400)
        self._pending: list[Item] = []
        self._pending_tokens = 0
        self._pieces: list[_Piece] = []

    def write(self) -> None:
        while self._step():
            pass
        self._pieces.insert(0, _Piece(self._reader.words(self._left)))

    def _step(self) -> bool:
        """Write a piece or a run of prose; False if the next one would be too long."""
        if self._pending and self._pending_tokens >= self._left - 16:
            return self._ask()
        used = self._tokens - self._left + self._pending_tokens
        if self._prose < self._prose_share * used * (0.6 + 0.8 * self._draws.random()):
            return self._tell_prose()
        progress = 1 - self._left / self._tokens
        if self._pending and not self._ask_at_end and self._draws.random() < 0.1 + 0.75 * progress:
            return self._ask()
        return self._tell_fact()

    def _tell_prose(self) -> bool:
        for sentence in self._reader.run():
            if sentence.tokens + self._pending_tokens > self._left:
                return self._ask() if self._pending else False
            self._put(_Piece(sentence.text), sentence.tokens)
            self._prose += sentence.tokens
        return True

    def _tell_fact(self) -> bool:
        while len(self._open) < self._open_items:
            self._open.append(self._new_item())
        place = self._draws.below(len(self._open))
        item, fact, asked = self._open[place]
        cost = fact_tokens(item.facts[fact])
        if cost > self._left:
            return False
        self._put(_Piece(item.facts[fact], item, fact), cost)
        if fact + 1 < len(item.facts):
            self._open[place] = (item, fact + 1, asked)
            return True
        self._open.pop(place)
        if asked:
            self._pending.append(item)
            self._pending_tokens += _question_tokens(item)
        return True

    def _ask(self) -> bool:
        item = self._pending.pop(self._draws.below(len(self._pending)))
        cost = _question_tokens(item)
        self._pending_tokens -= cost
        if cost <= self._left:
            self._put(_Piece(question_text(item.ask) + " " + item.answer, item), cost)
        return True

    def _put(self, piece: _Piece, tokens: float) -> None:
        self._pieces.append(piece)
        self._left -= tokens

    def _new_item(self) -> tuple[Item, int, bool]:
        asked = self._draws.random() >= self._unasked_share
        kind = self._kinds[bisect(self._weights, self._draws.random() * self._weights[-1])]
        return MAKERS[kind](self._asked_source if asked else self._unasked_source), 0, asked

    def document(self) -> Document:
        text: list[str] = []
        length = 0
        told: dict[int, list[int]] = {}
        answers: list[Answer] = []
        at_line_start = True
        for piece in self._pieces:
            if not piece.text:
                continue
            if length:
                line = piece.is_question or at_line_start or self._new_paragraph()
                text.append("\n" if line else " ")
                length += 1
            if piece.item is not None and piece.fact is not None:
                told.setdefault(id(piece.item), []).append(length)
            elif piece.item is not None:
                answers.append(_answer(piece.item, length, told[id(piece.item)]))
            at_line_start = piece.is_question
            text.append(piece.text)
            length += len(piece.text)
        return Document("".join(text) + "\n", tuple(answers))

    def _new_paragraph(self) -> bool:
        return self._draws.random() < NEW_PARAGRAPH


def _question_tokens(item: Item) -> int:
    """With the line break before it or after it; most often questions share them."""
    return fact_tokens(question_text(item.ask)) + fact_tokens(item.answer) + 3


def _answer(item: Item, start: int, facts: list[int]) -> Answer:
    """The spans of an answer whose question starts at `start`, its facts at `facts`."""
    start += len(question_text(item.ask))
    first = start + 1
    return Answer(
        kind=item.kind,
        start=start,
        end=first + len(item.answer),
        graded_start=first + item.graded[0],
        graded_end=first + item.graded[1],
        sources=tuple((facts[n], facts[n] + len(item.facts[n])) for n in item.support),
        copies=tuple(
            (first + copy.start, facts[copy.fact] + copy.fact_start, copy.length)
            for copy in item.copies
        ),
    )
