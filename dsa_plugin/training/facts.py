"""What a document tells and asks: one function a kind of question.

A fact is one sentence with a key, "the <adjective> <noun>". An answer says the fact again word for
word, so the model finds it by its key and copies what follows.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dsa_plugin.training.draws import Draws
from dsa_plugin.training.lexicon import NAMES, NOTE_WORDS, PLACES

COUNTS = (1, 4)
NOTE_LENGTHS = (6, 12)
LIST_LENGTHS = (4, 6)

_WORD = re.compile(r"[A-Za-z]+|\d|[^\w\s]")


@dataclass(frozen=True)
class Copy:
    """`length` characters at `start` of the answer stand at `fact_start` of fact number `fact`."""

    start: int
    fact: int
    fact_start: int
    length: int


@dataclass(frozen=True)
class Item:
    """Facts, and one question about them.

    The facts stand in the order in which the text must hold them. `graded` is the span of `answer`
    that only the facts tell, with its leading space. `support` numbers the facts that the answer
    rests on: for `latest` the last one only.
    """

    kind: str
    facts: tuple[str, ...]
    ask: str
    answer: str
    graded: tuple[int, int]
    copies: tuple[Copy, ...]
    support: tuple[int, ...]


class Source:
    """Where a kind gets its words: keys that no other item of the document has, names, homes."""

    def __init__(self, draws: Draws, take_key: Callable[[], str]) -> None:
        self.draws = draws
        self.key = take_key
        self.homes: dict[str, str] = {}

    def name(self) -> str:
        return self.draws.pick(NAMES)

    def home_of(self, name: str) -> str:
        """The town of `name`, one and the same in the whole document."""
        return self.homes.setdefault(name, self.draws.pick(PLACES))


@dataclass(frozen=True)
class _Fact:
    """A sentence up to what it tells, and what it tells (with a leading space).

    `asked` and `key` make its question: "<asked> the <key>?"
    """

    before: str
    told: str
    asked: str = ""
    key: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.before}{self.told}."


def single(source: Source) -> Item:
    """One fact, asked for by its key."""
    fact = _plain_fact(source)
    return _restated("single", (fact,), f"{fact.asked} the {fact.key}?")


def several(source: Source) -> Item:
    """Two or three facts of one form in one question."""
    form = source.draws.pick((_keeper, _price, _town))
    facts = tuple(form(source) for _ in range(source.draws.between(2, 3)))
    keys = " and the ".join(fact.key for fact in facts)
    return _restated("several", facts, f"{facts[0].asked} the {keys}?")


def chain(source: Source) -> Item:
    """Two hops: who has the key, and where that person's home is. Either fact may come first."""
    key, name = source.key(), source.name()
    keeper = _Fact(f"The {key} is with", f" {name}")
    home = _Fact(f"The home of {name} is", f" {source.home_of(name)}")
    ask = f"where is the home of whoever has the {key}?"
    return _restated("chain", (keeper, home), ask, backwards=source.draws.random() < 0.5)


def count(source: Source) -> Item:
    """How often a sentence stands in the text."""
    key, times = source.key(), source.draws.between(*COUNTS)
    before = f"The {key} was seen"
    unit = "time" if times == 1 else "times"
    return Item(
        kind="count",
        facts=(f"{before}.",) * times,
        ask=f"how often was the {key} seen?",
        answer=f"{before} {times} {unit}.",
        graded=(len(before), len(before) + len(f" {times}")),
        copies=(),
        support=tuple(range(times)),
    )


def quote(source: Source) -> Item:
    """A passage of 6 to 12 words, verbatim."""
    key = source.key()
    words = source.draws.sample(NOTE_WORDS, source.draws.between(*NOTE_LENGTHS))
    fact = _Fact(f"The {key} reads", f" {' '.join(words)}")
    return _restated("quote", (fact,), f"what does the {key} read?")


def latest(source: Source) -> Item:
    """Two or three facts with one key, of which the last in the text holds."""
    key = source.key()
    towns = source.draws.sample(PLACES, source.draws.between(2, 3))
    facts = tuple(_Fact(f"The {key} went to", f" {town}") for town in towns)
    item = _restated("latest", facts[-1:], f"where did the {key} go last?")
    last = len(facts) - 1
    return Item(
        kind=item.kind,
        facts=tuple(fact.sentence for fact in facts),
        ask=item.ask,
        answer=item.answer,
        graded=item.graded,
        copies=tuple(Copy(copy.start, last, copy.fact_start, copy.length) for copy in item.copies),
        support=(last,),
    )


def third(source: Source) -> Item:
    """The third name of a list under its heading."""
    key = source.key()
    names = source.draws.sample(NAMES, source.draws.between(*LIST_LENGTHS))
    heading = f"List of the {key}"
    before = f"Third of the {key} is"
    told = f" {names[2]}"
    return Item(
        kind="third",
        facts=(f"{heading} {' '.join(names)}.",),
        ask=f"who is third of the {key}?",
        answer=f"{before}{told}.",
        graded=(len(before), len(before) + len(told)),
        copies=(Copy(len(before), 0, len(f"{heading} {names[0]} {names[1]}"), len(told)),),
        support=(0,),
    )


MAKERS: dict[str, Callable[[Source], Item]] = {
    "single": single,
    "several": several,
    "chain": chain,
    "count": count,
    "quote": quote,
    "latest": latest,
    "third": third,
}
KINDS = tuple(MAKERS)


def question_text(ask: str) -> str:
    """A question as documents have it, up to where its answer begins with a space."""
    return f"Question: {ask}\nAnswer:"


def fact_tokens(text: str) -> int:
    """The tokens of a fact, question or answer: each of its words, digits and marks is one."""
    return len(_WORD.findall(text))


def _keeper(source: Source) -> _Fact:
    key = source.key()
    return _Fact(f"The {key} is with", f" {source.name()}", "who has", key)


def _price(source: Source) -> _Fact:
    key = source.key()
    return _Fact(f"The {key} cost", f" {source.draws.between(100, 999)}", "what price had", key)


def _town(source: Source) -> _Fact:
    key = source.key()
    return _Fact(f"The {key} lies in", f" {source.draws.pick(PLACES)}", "where lies", key)


def _plain_fact(source: Source) -> _Fact:
    return source.draws.pick((_keeper, _price, _town))(source)


def _restated(kind: str, facts: tuple[_Fact, ...], ask: str, backwards: bool = False) -> Item:
    """The item whose answer says `facts` again; its text holds them last first if `backwards`."""
    answer, copies, places = "", [], []
    order = facts[::-1] if backwards else facts
    for fact in facts:
        answer += " " * bool(answer)
        told = len(answer) + len(fact.before)
        copies.append(Copy(told, order.index(fact), len(fact.before), len(fact.told)))
        places.append((told, told + len(fact.told)))
        answer += fact.sentence
    return Item(
        kind=kind,
        facts=tuple(fact.sentence for fact in order),
        ask=ask,
        answer=answer,
        graded=(places[0][0], places[-1][1]),
        copies=tuple(copies),
        support=tuple(range(len(facts))),
    )
