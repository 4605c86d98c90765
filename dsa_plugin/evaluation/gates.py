"""What results have to show; each gate says where they do not."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dsa_plugin.evaluation.results import Cell, Key, Results, Setting
from dsa_plugin.evaluation.summary import recall

NLL_TOLERANCE = 1e-6
"""Of the prose's negative log-likelihood, relative. Two fp32 implementations differ by about 1e-8;
one selected token fewer of 64 makes 1e-4."""


@dataclass(frozen=True)
class Gates:
    """All gates of a run; None is none.

    Attributes:
        max_recall_loss: points of a hundred that DSA may recall less than dense, by kind.
        min_recall: points of a hundred that DSA needs, by kind and length.
        reference: results with the same answers and likelihoods.
    """

    max_recall_loss: float | None = None
    min_recall: float | None = None
    reference: Results | None = None

    def check(self, setting: Setting, keys: Collection[Key]) -> None:
        """Raises ValueError where a run of these cells could not be judged."""
        variants = {variant for variant, _, _ in keys}
        if self.max_recall_loss is not None and not {"dense", "dsa"} <= variants:
            raise ValueError("--max-recall-loss compares dsa with dense; --variants lacks one")
        if self.min_recall is not None and "dsa" not in variants:
            raise ValueError("--min-recall judges dsa, which --variants lacks")
        if self.reference is not None:
            _check_comparable(setting, keys, self.reference)

    def failures(self, results: Results) -> Iterator[str]:
        """Where results, which have all that `check` asked for, fall short."""
        if self.max_recall_loss is not None:
            yield from _below_dense(results, self.max_recall_loss)
        if self.min_recall is not None:
            yield from _below(results, self.min_recall)
        if self.reference is not None:
            known = {cell.key: cell for cell in self.reference.cells}
            for cell in results.cells:
                yield from _differences(cell, known[cell.key])


def _check_comparable(setting: Setting, keys: Collection[Key], reference: Results) -> None:
    for name in ("seed", "kinds", "max_gen_toks"):
        ours, theirs = getattr(setting, name), getattr(reference.setting, name)
        if ours != theirs:
            raise ValueError(f"--same-as: its {name} is {theirs!r}, here {ours!r}")
    known = {cell.key for cell in reference.cells}
    if missing := [key for key in keys if key not in known]:
        variant, length, document = missing[0]
        raise ValueError(f"--same-as: it has no {variant} at {length}, text {document}")


def _below_dense(results: Results, points: float) -> Iterator[str]:
    found = recall(results.cells, lambda cell, answer: (cell.variant, answer.kind))
    for kind in results.setting.kinds:
        dense, dsa = found["dense", kind], found["dsa", kind]
        if dense.points - dsa.points > points:
            yield (
                f"{kind}: dsa recalls {dsa.points:.1f} of 100, dense {dense.points:.1f}: "
                f"more than {points:g} less"
            )


def _below(results: Results, points: float) -> Iterator[str]:
    cells = [cell for cell in results.cells if cell.variant == "dsa"]
    found = recall(cells, lambda cell, answer: (answer.kind, cell.length))
    for (kind, length), here in found.items():
        if here.points < points:
            yield f"{kind} at {length}: dsa recalls {here.points:.1f} of 100, under {points:g}"


def _differences(cell: Cell, reference: Cell) -> Iterator[str]:
    where = f"{cell.variant} at {cell.length}, text {cell.document}"
    if len(cell.answers) != len(reference.answers):
        yield f"{where}: {len(cell.answers)} questions, not {len(reference.answers)}"
        return
    others = [
        (ours, theirs)
        for ours, theirs in zip(cell.answers, reference.answers, strict=True)
        if ours.completion != theirs.completion
    ]
    if others:
        ours, theirs = others[0]
        yield (
            f"{where}: {len(others)} of {len(cell.answers)} answers differ, first a "
            f"{ours.kind}: {ours.completion!r}, not {theirs.completion!r}"
        )
    if cell.nll is None or reference.nll is None:
        return
    if cell.nll_tokens != reference.nll_tokens:
        yield f"{where}: prose of {cell.nll_tokens} tokens, not {reference.nll_tokens}"
    elif abs(cell.nll - reference.nll) > NLL_TOLERANCE * reference.nll:
        mean, expected = (c / cell.nll_tokens for c in (cell.nll, reference.nll))
        yield f"{where}: {mean:.6f} nats a token of prose, not {expected:.6f}"
