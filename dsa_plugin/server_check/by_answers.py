"""Faults by which questions are answered right, and no longer so in another way of asking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsa_plugin.server_check.faults import Fault, Finding, onset
from dsa_plugin.server_check.grid import (
    ALONE_CACHED,
    ALONE_COLD,
    BATCH_CACHED,
    BATCH_COLD,
    Mode,
)
from dsa_plugin.server_check.settings import MIN_QUESTIONS
from dsa_plugin.server_check.statistics import fisher, log_likelihood, sign_test

BY = "answers"
# Chances of a false alarm, each of one test.
_LENGTH_CHANCE, _PAIR_CHANCE = 1e-3, 4e-3
# A model may well answer a little worse where a text is long.
_LOSS, _LONG_RANGE_LOSS = 0.3, 0.5
_LEAST_SHARE = 0.5
# Nats by which another cut has to explain the answers better than one at a known threshold.
_CLEARLY_BETTER = 5.0


@dataclass(frozen=True)
class Answer:
    """A question as it was answered.

    Attributes:
        length: tokens asked for.
        number: of the question among those of its length.
        mode: how it was asked.
        tokens: of the prompt, as counted by the server, or `length` where it does not count.
        cached_tokens: of them, from the prefix cache; None: the server does not say.
        completion: what the model said.
        right: whether that is what the text says.
    """

    length: int
    number: int
    mode: Mode
    tokens: int
    cached_tokens: int | None
    completion: str
    right: bool


@dataclass(frozen=True)
class _Count:
    """Answers to requests of one length, up to `tokens`."""

    tokens: int
    right: int
    wrong: int


def find_faults(answers: Sequence[Answer], index_topk: int, chunk: int | None) -> list[Finding]:
    """What the answers show; nothing where the model answers too few short questions."""
    counts = _alone_cold(answers)
    if not answers_short_questions(answers):
        right, asked = counts[0].right, counts[0].right + counts[0].wrong
        evidence = f"{right} of {asked} questions of {counts[0].tokens:,} tokens right, alone, cold"
        return [Finding(Fault.EVERYWHERE, counts[0].tokens, evidence, BY)]
    found = [_by_length(counts, index_topk, chunk), *_by_mode(answers)]
    return [finding for finding in found if finding is not None]


def answers_short_questions(answers: Sequence[Answer]) -> bool:
    """Whether most of the shortest questions are answered right, so that others can be judged."""
    counts = _alone_cold(answers)
    if not counts or counts[0].right + counts[0].wrong < MIN_QUESTIONS:
        return True
    return counts[0].right > _LEAST_SHARE * (counts[0].right + counts[0].wrong)


def _alone_cold(answers: Sequence[Answer]) -> list[_Count]:
    """By length, the shortest first."""
    asked = [answer for answer in answers if answer.mode == ALONE_COLD]
    counts = []
    for length in sorted({answer.length for answer in asked}):
        here = [answer for answer in asked if answer.length == length]
        right = sum(answer.right for answer in here)
        counts.append(_Count(max(a.tokens for a in here), right, len(here) - right))
    return counts


def _by_length(counts: Sequence[_Count], index_topk: int, chunk: int | None) -> Finding | None:
    """Right up to a length and wrong from another on, by the cut that explains most."""
    cuts = [_Cut(counts, at) for at in range(1, len(counts))]
    if not any(cut.is_significant() for cut in cuts):
        return None

    def fault(cut: _Cut) -> Fault:
        return onset(counts[cut.at - 1].tokens, counts[cut.at].tokens, index_topk, chunk)

    best = max(cuts, key=lambda cut: cut.likelihood)
    # Answers that get worse step by step fit a later cut a little better.
    near = [cut for cut in cuts if cut.likelihood > best.likelihood - _CLEARLY_BETTER]
    if fault(best) is Fault.LONG_RANGE and best.loss < _LONG_RANGE_LOSS:
        near = [cut for cut in cuts if cut.is_significant()]
    known = [cut for cut in near if fault(cut) is not Fault.LONG_RANGE and cut.loss >= _LOSS]
    cut = known[0] if known else best
    if fault(cut) is Fault.LONG_RANGE and cut.loss < _LONG_RANGE_LOSS:
        return None
    return Finding(fault(cut), counts[cut.at].tokens, cut.text(), BY)


class _Cut:
    """Answers to shorter and to longer requests."""

    def __init__(self, counts: Sequence[_Count], at: int) -> None:
        self.at = at
        self._before = _total(counts[:at])
        self._after = _total(counts[at:])
        self._tokens = (counts[at - 1].tokens, counts[at].tokens)
        self.likelihood = log_likelihood(*self._before) + log_likelihood(*self._after)
        self.loss = _share(self._before) - _share(self._after)

    def is_significant(self) -> bool:
        chance = fisher(*self._before, *self._after)
        return chance <= _LENGTH_CHANCE and self.loss >= _LOSS

    def text(self) -> str:
        (right, wrong), (right_after, wrong_after) = self._before, self._after
        return (
            f"{right} of {right + wrong} questions right up to {self._tokens[0]:,} tokens, "
            f"{right_after} of {right_after + wrong_after} from {self._tokens[1]:,} on"
        )


def _total(counts: Sequence[_Count]) -> tuple[int, int]:
    return sum(count.right for count in counts), sum(count.wrong for count in counts)


def _share(count: tuple[int, int]) -> float:
    return count[0] / sum(count)


def _by_mode(answers: Sequence[Answer]) -> Iterator[Finding | None]:
    by_mode: dict[Mode, dict[tuple[int, int], Answer]] = {}
    for answer in answers:
        by_mode.setdefault(answer.mode, {})[answer.length, answer.number] = answer

    def pairs(*modes: tuple[Mode, Mode]) -> list[tuple[Answer, Answer]]:
        return [
            (answer, others[key])
            for one, other in modes
            for others in [by_mode.get(other, {})]
            for key, answer in by_mode.get(one, {}).items()
            if key in others
        ]

    yield _worse(Fault.CACHED, pairs((ALONE_COLD, ALONE_CACHED)), lambda a: a.mode.name)
    yield _worse(
        Fault.BATCH,
        pairs((ALONE_COLD, BATCH_COLD), (ALONE_CACHED, BATCH_CACHED)),
        lambda a: a.mode.name,
    )


def _worse(
    fault: Fault, pairs: Sequence[tuple[Answer, Answer]], name: Callable[[Answer], str]
) -> Finding | None:
    """A finding where the second of each pair is wrong more often than chance allows."""
    lost = [second for first, second in pairs if first.right and not second.right]
    if not lost:
        return None
    shortest = min(lost, key=lambda answer: answer.length)
    there = [
        (first, second)
        for first, second in pairs
        if first.length >= shortest.length and (first.right or second.right)
    ]
    won = sum(second.right and not first.right for first, second in there)
    loss = (len(lost) - won) / len(there)
    if loss < _LOSS or sign_test(len(lost), won) > _PAIR_CHANCE:
        return None
    where = " and ".join(sorted({name(answer) for answer in lost}))
    evidence = (
        f"{len(lost)} of {sum(first.right for first, _ in there)} questions that were right "
        f"became wrong {where}; {won} the other way round"
    )
    return Finding(fault, shortest.tokens, evidence, BY)
