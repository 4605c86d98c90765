"""The committed demo checkpoint answers over its top-k, and not with another indexer's RoPE."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from dsa_plugin.training import indexer
from dsa_plugin.training.measure import measure
from dsa_plugin.training.rope import rotate_interleaved

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
LEARNED = ("single", "several", "chain", "quote", "latest", "third")


def share_right() -> float:
    """Of held-out answers of the learned kinds, about a text of 2048 tokens, over the top-k."""
    (measured,) = measure(DEMO, [2048], tokens=2048)
    right = sum(measured["exact_topk"][k] * n for k, n in _asked(measured).items())
    return float(right / sum(_asked(measured).values()))


def _asked(measured: dict[str, dict[str, int]]) -> dict[str, int]:
    return {kind: n for kind, n in measured["answers"].items() if kind in LEARNED}


def test_it_answers_over_the_top_k() -> None:
    assert share_right() > 0.8


@pytest.mark.parametrize("rotate", [rotate_interleaved, lambda x, _cos, _sin: x])
def test_it_shows_a_wrong_rope_of_the_indexer(
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer, "rotate_half_split", rotate)
    assert share_right() < 0.5
