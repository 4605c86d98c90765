"""Training documents and exams: a reader that shares no code with their writer finds answers."""

import hashlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsa_plugin.training.documents import Document, make_document
from dsa_plugin.training.draws import Draws
from dsa_plugin.training.exam import Question, graded_right, make_exam
from dsa_plugin.training.facts import KINDS
from dsa_plugin.training.lexicon import ADJECTIVES, NOUNS, held_out_key
from dsa_plugin.training.prose import held_out_prose, training_prose

ALL = dict.fromkeys(KINDS, 1.0)
KEY = r"(\w+ \w+)"
# A question, and what each of its keys is looked up by.
FORMS = (
    (r"who has (the .*)\?", r"The {} is with (\w+)\."),
    (r"what price had (the .*)\?", r"The {} cost (\d+)\."),
    (r"where lies (the .*)\?", r"The {} lies in (\w+)\."),
    (r"what does (the .*) read\?", r"The {} reads ([\w ]+)\."),
)


def read(text: str, ask: str) -> str:
    """What the facts of `text` answer to `ask`; fails where they contradict one another."""
    told = "\n".join(
        line for line in text.splitlines() if not line.startswith(("Question: ", "Answer: "))
    )
    for question, fact in FORMS:
        if found := re.fullmatch(question, ask):
            keys = found[1].removeprefix("the ").split(" and the ")
            return " ".join(_sole(told, fact.format(key)).group() for key in keys)
    if found := re.fullmatch(rf"where is the home of whoever has the {KEY}\?", ask):
        keeper = _sole(told, rf"The {found[1]} is with (\w+)\.")
        home = _sole(told, rf"The home of {keeper[1]} is (\w+)\.")
        return f"{keeper.group()} {home.group()}"
    if found := re.fullmatch(rf"how often was the {KEY} seen\?", ask):
        mark = f"The {found[1]} was seen"
        times = told.count(f"{mark}.")
        return f"{mark} {times} {'time' if times == 1 else 'times'}."
    if found := re.fullmatch(rf"where did the {KEY} go last\?", ask):
        *_, last = re.finditer(rf"The {found[1]} went to \w+\.", told)
        return last.group()
    if found := re.fullmatch(rf"who is third of the {KEY}\?", ask):
        names = _sole(told, rf"List of the {found[1]} ([\w ]+)\.")[1].split()
        return f"Third of the {found[1]} is {names[2]}."
    raise AssertionError(f"no such question: {ask}")


def _sole(text: str, pattern: str) -> re.Match[str]:
    found = list(re.finditer(pattern, text))
    assert found
    assert len({match.group() for match in found}) == 1, found
    return found[0]


def asked(document: Document) -> list[tuple[str, str]]:
    """The text before each question, and the question."""
    found = []
    for answer in document.answers:
        before, ask = document.text[: answer.start].rsplit("Question: ", 1)
        found.append((before, ask.removesuffix("\nAnswer:")))
    return found


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_text_before_them(kind: str, held_out: bool) -> None:
    answers = 0
    for seed in range(6):
        document = make_document(seed, 1024, {kind: 1.0}, held_out, density=0.8)
        for answer, (before, ask) in zip(document.answers, asked(document), strict=True):
            assert answer.kind == kind
            assert document.text[answer.start : answer.end] == f" {read(before, ask)}"
            assert document.text[answer.end] == "\n"
        answers += len(document.answers)
    assert answers > 15


def test_the_examples_of_the_documentation_are_right() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/training_data.md").read_text("utf-8")
    examples = re.findall(r"`(\w+)`: [^`]*?\n\n((?:    .*\n)+)", page)
    assert [kind for kind, _ in examples] == list(KINDS)
    for _, block in examples:
        facts, question, answer = (line.strip() for line in block.splitlines())
        ask = question.removeprefix("Question: ")
        assert answer == f"Answer: {read(facts, ask)}"


def test_spans_point_at_what_they_say() -> None:
    kinds = set()
    for seed in range(20):
        document = make_document(seed, 1024, ALL)
        text = document.text
        for answer in document.answers:
            kinds.add(answer.kind)
            graded = text[answer.graded_start : answer.graded_end]
            assert answer.start < answer.graded_start < answer.graded_end < answer.end
            assert graded.startswith(" ")
            facts = [text[start:end] for start, end in answer.sources]
            assert facts
            assert all(re.fullmatch(r"(The|List) [\w ,:]+\.", fact) for fact in facts)
            for start, source, length in answer.copies:
                assert answer.graded_start <= start < start + length <= answer.graded_end
                assert text[start : start + length] == text[source : source + length]
                assert any(a <= source < source + length <= b for a, b in answer.sources)
            copied = "".join(text[a : a + n] for a, _, n in answer.copies)
            if answer.kind == "count":
                assert int(graded) == len(facts)
            elif answer.kind in ("quote", " latest", "third"):
                assert copied == graded
    assert kinds == set(KINDS)


def test_the_sources_of_latest_are_its_last_fact() -> None:
    document = make_document(1, 2048, {"latest": 1.0})
    for answer in document.answers:
        [(start, end)] = answer.sources
        key = re.match(rf"The {KEY}", document.text[start:end])
        assert key
        told = [match.start() for match in re.finditer(f"{key[0]} went to", document.text)]
        assert [place for place in told if place < answer.start][-1] == start
        assert start > told[0]


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_each_key_is_asked_once_and_told_near_others(density: float) -> None:
    document = make_document(3, 8192, {"single": 1.0}, density=density)
    keys = [ask.split("the ")[1] for _, ask in asked(document)]
    assert len(set(keys)) == len(keys) > 20
    for place in (0, 1):
        shared = [key.split()[place] for key in keys]
        assert len(set(shared)) < len(shared) / 2


def test_likeness_tells_how_few_words_make_the_keys() -> None:
    words = []
    for likeness in (0.0, 0.5, 1.0):
        document = make_document(3, 1024, {"single": 1.0}, density=1.0, likeness=likeness)
        words.append({word for key in facts_keys(document.text) for word in key})
    assert len(words[0]) > 1.15 * len(words[1])
    assert len(words[1]) > 1.15 * len(words[2])


def facts_keys(text: str) -> set[tuple[str, str]]:
    """The keys of all facts of a text, also of those that nobody asks for."""
    verbs = "is with|cost|lies in|reads|went to|was seen"
    pairs = set(re.findall(rf"The (\w+) (\w+) (?:{verbs})\b", text))
    return pairs | set(re.findall(r"(?:List|Third) of the (\w+) (\w+)\b", text))


def test_held_out_keys_are_in_no_training_document() -> None:
    eighth = {pair for pair in itertools.product(ADJECTIVES, NOUNS) if held_out_key(*pair)}
    assert 0.11 < len(eighth) / (len(ADJECTIVES) * len(NOUNS)) < 0.14
    seen: set[tuple[str, str]] = set()
    asked_keys: set[tuple[str, str]] = set()
    for seed in range(30):
        seen |= facts_keys(make_document(seed, 2048, ALL, density=1.0).text)
        held_out = make_document(seed, 2048, ALL, held_out=True, density=1.0)
        for answer in held_out.answers:
            asked_keys |= facts_keys(held_out.text[answer.start : answer.end])
        assert len(facts_keys(held_out.text) - eighth) > 10  # told, near those asked for
    assert len(seen) > 1500
    assert not seen & eighth
    assert len(asked_keys) > 200
    assert asked_keys <= eighth
    assert held_out_prose() not in training_prose()


def test_the_same_seed_gives_the_same_text_in_any_process() -> None:
    script = (
        "import hashlib, sys; from dsa_plugin.training.documents import make_document\n"
        "text = make_document(5, 4096, {'single': 1, 'quote': 2}).text\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    mine = make_document(5, 4096, {"quote": 2, "single": 1}).text
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        theirs = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, check=True
        )
        assert theirs.stdout.decode().strip() == hashlib.sha256(mine.encode()).hexdigest()
    assert make_document(6, 4096, {"single": 1, "quote": 2}).text != mine


def test_draws_are_those_of_any_python() -> None:
    """The sequence of `random()` is promised; these came from CPython 3.11 to 3.13."""
    draws = Draws(2024)
    assert [draws.below(1000) for _ in range(6)] == [470, 728, 303, 887, 410, 716]
    assert draws.sample("abcdef", 4) == ["b", "c", "f", "e"]


def test_kinds_come_as_their_mix_says() -> None:
    mix = {"single": 3.0, "latest": 1.0, "count": 0.0}
    kinds = [answer.kind for seed in range(20) for answer in make_document(seed, 2048, mix).answers]
    assert set(kinds) == {"single", "latest"}
    assert 1.8 < kinds.count("single") / kinds.count("latest") < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1024, {"needle": 1.0}), "needle.*there are single"),
        ((1, 1024, {}), "one must be above 0"),
        ((1, 32, ALL), "64 or more"),
        ((1, 1024, ALL, False, 1.5), "up to 1"),
        ((1, 1024, ALL, False, 1.0, -0.5), "from 0 to 1"),
        ((1, 10**6, ALL, False, 1.0), "no keys are left"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_document(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_exams_are_answered_by_their_text(kind: str) -> None:
    for seed in range(4):
        exam = make_exam(seed, 4096, [kind])
        assert [question.depth for question in exam.questions] == [0.1, 0.3, 0.5, 0.7, 0.9]
        for question in exam.questions:
            ask = question.ask.removeprefix("Question: ").removesuffix("\nAnswer:")
            assert question.answer == f" {read(exam.text, ask)}"
            assert question.graded in question.answer
            assert facts_keys(question.answer) <= {
                pair for pair in itertools.product(ADJECTIVES, NOUNS) if held_out_key(*pair)
            }


def test_the_fact_lies_at_its_depth() -> None:
    for seed in range(4):
        exam = make_exam(seed, 8192, ["single", "latest"])
        for question in exam.questions:
            found = exam.text.index(question.answer.strip()) / len(exam.text)
            assert abs(found - question.depth) < 0.05


def test_too_many_questions_for_an_exam_are_refused() -> None:
    with pytest.raises(ValueError, match="ask for fewer kinds or depths"):
        make_exam(1, 256, KINDS)
    with pytest.raises(ValueError, match="from 0 to 1"):
        make_exam(1, 1024, KINDS, depths=[10, 50])


GRADED = [
    (" The old key cost 473.", " 473", "The old key cost 473.\nThe", True),
    (" The old key cost 473.", " 473", " The old key cost 47.", False),
    (" The old key cost 473.", " 473", " The old key cost 1473.", False),
    (" The old key is with Ada.", " Ada", " It is with Ada.", True),
    (" The old key is with Ada.", " Ada", " It is with Nora.\n It is with Ada.", False),
    (" The old key was seen 3 times.", " 3", " The old key was seen 13 times.", False),
    (" The old key was seen 3 times.", " 3", " The old key was seen 3 times.", True),
    (" The old key reads hill sun.", " hill sun", " The old key reads sun hill.", False),
    (" The old key reads hill sun.", " hill sun", " The old key reads hill sun sun.", False),
    (" The old key is with Ada.", " Ada", "", False),
    (" The old key is with Ada.", " Ada", " The old key is with Ada. Or Nora.", False),
]


@pytest.mark.parametrize(("answer", "graded", "completion", "right"), GRADED)
def test_grading(answer: str, graded: str, completion: str, right: bool) -> None:
    question = Question("single", "", answer, graded, 0.5)
    assert graded_right(question, completion) == right
