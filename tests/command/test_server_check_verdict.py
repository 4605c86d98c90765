"""The class of fault that `dsa verify --url` names, by right answers and by log-probabilities."""

import random
from collections.abc import Callable, Sequence

import pytest

from dsa_plugin.server_check import by_answers, by_logprobs
from dsa_plugin.server_check.by_answers import Answer
from dsa_plugin.server_check.by_logprobs import Band, bands
from dsa_plugin.server_check.faults import Fault
from dsa_plugin.server_check.grid import (
    ALONE_COLD,
    BATCH_CACHED,
    MODES,
    Mode,
    default_lengths,
    edges,
)
from dsa_plugin.server_check.statistics import fisher, sign_test

INDEX_TOPK, CHUNK, QUESTIONS = 64, 512, 8
LENGTHS = (48, 256, 700, 1400, 4096)
RUNS = 200
Rule = Callable[[int, Mode], float]
"""Tokens and way of asking -> the chance of a wrong answer, or the error in nats."""


def answered(chance: Rule, seed: int, questions: int) -> list[Answer]:
    draw = random.Random(seed)
    return [
        Answer(at, number, mode, at, None, "", right=draw.random() >= chance(at, mode))
        for at in LENGTHS
        for mode in MODES
        for number in range(questions)
    ]


def by_answers_of(chance: Rule, seed: int = 0, questions: int = QUESTIONS) -> list[Fault]:
    found = by_answers.find_faults(answered(chance, seed, questions), INDEX_TOPK, CHUNK)
    return [finding.fault for finding in found]


def when(is_wrong: Callable[[int, Mode], bool], wrong: float, else_: float = 0.0) -> Rule:
    return lambda at, mode: wrong if is_wrong(at, mode) else else_


PLANTED: list[tuple[Callable[[int, Mode], bool], Fault]] = [
    (lambda _at, _mode: True, Fault.EVERYWHERE),
    (lambda at, _mode: at > INDEX_TOPK, Fault.PAST_INDEX_TOPK),
    (lambda at, _mode: at > CHUNK, Fault.PAST_CHUNK),
    (lambda at, _mode: at > 1000, Fault.LONG_RANGE),
    (lambda at, mode: mode.cached and at > INDEX_TOPK, Fault.CACHED),
    (lambda at, mode: mode.cached and at > CHUNK, Fault.CACHED),
    (lambda _at, mode: mode.batch, Fault.BATCH),
    (lambda at, mode: mode.batch and at > CHUNK, Fault.BATCH),
    (lambda at, mode: mode == BATCH_CACHED and at > INDEX_TOPK, Fault.BATCH),
]


@pytest.mark.parametrize(("is_wrong", "fault"), PLANTED)
def test_answers_name_a_fault(is_wrong: Callable[[int, Mode], bool], fault: Fault) -> None:
    assert by_answers_of(when(is_wrong, 1.0)) == [fault]
    often = [by_answers_of(when(is_wrong, 0.85, 0.03), seed)[:1] for seed in range(RUNS)]
    assert often.count([fault]) > 0.9 * RUNS


def test_answers_that_get_worse_step_by_step_point_to_index_topk() -> None:
    """As with another RoPE style: content still finds what is near."""
    chances: dict[int, float] = dict(zip(LENGTHS, (0.0, 0.25, 0.5, 0.65, 0.8), strict=True))
    often = [
        by_answers_of(lambda at, _mode: chances[at], seed, 2 * QUESTIONS)[:1]
        for seed in range(RUNS)
    ]
    assert often.count([]) < 0.05 * RUNS
    assert often.count([Fault.PAST_INDEX_TOPK]) > 0.5 * RUNS


@pytest.mark.parametrize("loss", [0.0, 0.05, 0.1])
def test_an_imperfect_model_raises_no_alarm(loss: float) -> None:
    """It answers worse where a text is long, and another question each time it is asked."""
    chance: Rule = lambda at, _mode: loss * LENGTHS.index(at) / 2  # noqa: E731
    assert [by_answers_of(chance, seed) for seed in range(RUNS)].count([]) > 0.97 * RUNS


def test_two_faults_are_both_named() -> None:
    both = when(lambda at, mode: at > CHUNK or (mode.cached and at > INDEX_TOPK), 1.0)
    assert by_answers_of(both) == [Fault.PAST_CHUNK, Fault.CACHED]


def errors(size: Rule, seed: int = 0) -> dict[Mode, list[tuple[int, float]]]:
    """A prompt of 1,400 tokens, asked alone and cold; else eight answers of 10 at each length."""
    draw = random.Random(seed)

    def error(at: int, mode: Mode) -> float:
        return size(at, mode) * draw.expovariate(1)

    found = {
        mode: [
            (at + token, error(at + token, mode))
            for at in (50, 256, 700, 1400)
            for token in range(80)
            if not (at == 50 and token > 12)
        ]
        for mode in MODES
    }
    found[ALONE_COLD] += [(at, error(at, ALONE_COLD)) for at in range(1, 1400)]
    return found


def judged(size: Rule, seed: int = 0) -> list[Fault]:
    """By errors; bf16's rounding is 0.03."""
    rounding = [(at, 0.03 * random.Random(at).expovariate(1)) for at in range(1400)]
    limits = edges((48, 256, 700, 1400), INDEX_TOPK, CHUNK)
    found = bands(errors(size, seed), rounding, INDEX_TOPK, limits)
    return [f.fault for f in by_logprobs.find_faults(found, INDEX_TOPK, CHUNK)]


@pytest.mark.parametrize(("noise", "wrong"), [(1e-6, 2e-3), (0.03, 0.2)])
@pytest.mark.parametrize(("is_wrong", "fault"), PLANTED)
def test_log_probabilities_name_a_fault(
    is_wrong: Callable[[int, Mode], bool], fault: Fault, noise: float, wrong: float
) -> None:
    if fault is Fault.EVERYWHERE:
        wrong = 0.4
    assert judged(when(is_wrong, wrong, noise)) == [fault]


def test_a_fault_that_grows_with_the_position_points_to_index_topk() -> None:
    def grows(at: int, _mode: Mode) -> float:
        return 0.03 * (1 + (at > INDEX_TOPK) * at / 350)

    assert judged(grows) == [Fault.PAST_INDEX_TOPK]


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-5, 0.01, 0.03, 0.05])
def test_rounding_raises_no_alarm(noise: float) -> None:
    for seed in range(5):
        assert judged(lambda _at, _mode: noise, seed) == []


def test_a_band_of_few_tokens_says_nothing() -> None:
    few = {mode: those[:4] for mode, those in errors(lambda _at, _mode: 0.4).items()}
    found = bands(few, [(1, 0.03)], INDEX_TOPK, [INDEX_TOPK])
    assert found
    assert not any(band.is_wrong for band in found)


def test_the_first_band_is_judged_by_bf16_alone() -> None:
    [band, *_] = bands({ALONE_COLD: [(at, 0.05) for at in range(60)]}, [(1, 0.03)], 64, [64])
    assert isinstance(band, Band)
    assert band.mean == pytest.approx(0.05)
    assert band.usual == pytest.approx(0.05)
    assert band.allowed > 0.09


@pytest.mark.parametrize(
    ("first", "times", "wrong"), [(1e-6, 3, True), (1e-6, 2, False), (0.01, 3, False)]
)
def test_what_the_first_token_does_not_show_is_no_rounding(
    first: float, times: int, wrong: bool
) -> None:
    """It attends to itself alone, whatever is wrong with attention."""
    off = [(1, first)] * times + [(at, 0.05) for at in range(2, 60)]
    [band, *_] = bands({ALONE_COLD: off}, [(1, 0.03)], 64, [64])
    assert band.is_wrong == wrong


@pytest.mark.parametrize(
    ("table", "chance"), [((8, 0, 0, 8), 1 / 12870), ((8, 0, 8, 0), 1.0), ((1, 1, 1, 1), 5 / 6)]
)
def test_fisher(table: Sequence[int], chance: float) -> None:
    assert fisher(*table) == pytest.approx(chance)


def test_sign_test() -> None:
    assert sign_test(8, 0) == 1 / 256
    assert sign_test(0, 0) == 1
    assert sign_test(3, 1) == 5 / 16


@pytest.mark.parametrize("index_topk", [64, 512, 2048])
@pytest.mark.parametrize("chunk", [None, 256, 2048, 8192])
def test_lengths_lie_on_both_sides_of_each_threshold(index_topk: int, chunk: int | None) -> None:
    lengths = default_lengths(index_topk, chunk)
    assert lengths == sorted(set(lengths))
    assert lengths[0] < index_topk < lengths[1]
    assert lengths[-2:] == [32768, 131072]
    if chunk is not None and chunk > index_topk:
        assert any(index_topk < length < chunk for length in lengths)
        assert any(chunk < length <= 2 * chunk for length in lengths)
