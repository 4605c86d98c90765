"""The ways of choosing tokens that are compared, and what each does to a model's index_topk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a variant is there to show."""

    MODEL = "the model"
    BUDGET = "another budget or rule"
    BUG = "a bug of an indexer"


@dataclass(frozen=True)
class Variant:
    """One way of choosing the tokens that a row attends to.

    Attributes:
        name: on the command line and in results.
        kind: what it shows.
        text: what it changes.
        by_flag: whether another index_topk is all of it, which hosts take as a flag.
    """

    name: str
    kind: Kind
    text: str
    by_flag: bool = False

    def index_topk(self, index_topk: int, context: int) -> int:
        """Tokens that a row selects.

        Args:
            index_topk: the model's own.
            context: tokens of the longest request.

        Raises:
            ValueError: nothing would be left.
        """
        found = {
            "dense": max(context, index_topk),
            "topk_half": index_topk // 2,
            "topk_quarter": index_topk // 4,
            "topk_minus_one": index_topk - 1,
        }.get(self.name, index_topk)
        if found < 1:
            raise ValueError(f"{self.name} of a model with index_topk {index_topk} selects nothing")
        return found


_ALL = (
    Variant("dense", Kind.MODEL, "every visible token: dense attention", by_flag=True),
    Variant("dsa", Kind.MODEL, "the model as it is", by_flag=True),
    Variant("topk_half", Kind.BUDGET, "half of index_topk", by_flag=True),
    Variant("topk_quarter", Kind.BUDGET, "a quarter of index_topk", by_flag=True),
    Variant("window", Kind.BUDGET, "the last index_topk tokens, whatever they say"),
    Variant("random", Kind.BUDGET, "index_topk visible tokens at random"),
    Variant("topk_minus_one", Kind.BUG, "index_topk - 1", by_flag=True),
    Variant("indexer_rope_style", Kind.BUG, "the indexer rotates pairs for halves, or the reverse"),
    Variant("hadamard_one_side", Kind.BUG, "index keys are rotated by Hadamard's matrix alone"),
    Variant(
        "stale_index_page",
        Kind.BUG,
        "one page in four of index keys was never rewritten: it holds the page before",
    ),
    Variant(
        "shared_selection_lost",
        Kind.BUG,
        "layers that share a selection choose at random, as by an indexer without weights",
    ),
)
VARIANTS = {variant.name: variant for variant in _ALL}


def find_variants(names: Iterable[str]) -> list[Variant]:
    """Variants by name, each once.

    Raises:
        ValueError: one is not known, or there is none.
    """
    wanted = list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in VARIANTS]:
        raise ValueError(f"no variant {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    if not wanted:
        raise ValueError(f"no variant is named; known: {', '.join(VARIANTS)}")
    return [VARIANTS[name] for name in wanted]
