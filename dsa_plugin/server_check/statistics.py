"""Exact tests of counts that are small."""

from __future__ import annotations

from math import comb, log


def fisher(right_before: int, wrong_before: int, right_after: int, wrong_after: int) -> float:
    """Probability that at least so many of all wrong ones fall after, were both as good.

    Fisher's exact test, one-sided.
    """
    after, wrong = right_after + wrong_after, wrong_before + wrong_after
    total = right_before + wrong_before + after
    ways = sum(
        comb(wrong, count) * comb(total - wrong, after - count)
        for count in range(wrong_after, min(after, wrong) + 1)
    )
    return ways / comb(total, after)


def sign_test(worse: int, better: int) -> float:
    """Probability that so many or more of worse + better pairs fall on one side by even chance."""
    pairs = worse + better
    ways = sum(comb(pairs, count) for count in range(worse, pairs + 1))
    return ways / float(2**pairs)


def log_likelihood(right: int, wrong: int) -> float:
    """Of so many right and wrong ones, in nats, at their own rate."""
    total = right + wrong
    return sum(count * log(count / total) for count in (right, wrong) if count)
