"""What results have to show; each gate says where they do not."""

from __future__ import annotations

from collections.abc import Iterator

from dsa_plugin.evaluation.results import Cell, Results
from dsa_plugin.evaluation.summary import recall

NLL_TOLERANCE = 1e-6
"""Of the prose's negative log-likelihood, relative. Two fp32 implementations differ by about 1e-8;
one selected token fewer of 64 makes 1e-4."""


def below_dense(results: Results, points: float) -> Iterator[str]:
    """Kinds, over all lengths, of which DSA recalls over `points` of a hundred less than dense.

    Raises:
        ValueError: the results have not both.
    """
    found = recall(results.cells, lambda cell, answer: (cell.variant, answer.kind))
    for kind in results.setting.kinds:
        dense, dsa = (found.get((variant, kind)) for variant in ("dense", "dsa"))
        if dense is None or dsa is None:
            raise ValueError("--max-recall-loss compares dsa with dense; --variants lacks one")
        if dense.points - dsa.points > points:
            yield (
                f"{kind}: dsa recalls {dsa.points:.1f} of 100, dense {dense.points:.1f}: "
                f"more than {points:g} less"
            )


def below(results: Results, points: float) -> Iterator[str]:
    """Kinds and lengths of which DSA recalls under `points` of a hundred.

    Raises:
        ValueError: the results have no DSA.
    """
    cells = [cell for cell in results.cells if cell.variant == "dsa"]
    if not cells:
        raise ValueError("--min-recall judges dsa, which --variants lacks")
    found = recall(cells, lambda cell, answer: (answer.kind, cell.length))
    for (kind, length), here in found.items():
        if here.points < points:
            yield f"{kind} at {length}: dsa recalls {here.points:.1f} of 100, under {points:g}"


def other_than(results: Results, reference: Results) -> Iterator[str]:
    """Cells with another answer than the reference's, or another likelihood of the same prose.

    Raises:
        ValueError: the reference was asked otherwise, or lacks a cell.
    """
    for name in ("seed", "kinds", "max_gen_toks"):
        ours, theirs = getattr(results.setting, name), getattr(reference.setting, name)
        if ours != theirs:
            raise ValueError(f"--same-as: its {name} is {theirs!r}, here {ours!r}")
    known = {cell.key: cell for cell in reference.cells}
    for cell in results.cells:
        if cell.key not in known:
            raise ValueError(
                f"--same-as: it has no {cell.variant} at {cell.length}, text {cell.document}"
            )
        yield from _differences(cell, known[cell.key])


def _differences(cell: Cell, reference: Cell) -> Iterator[str]:
    where = f"{cell.variant} at {cell.length}, text {cell.document}"
    if len(cell.answers) != len(reference.answers):
        raise ValueError(f"--same-as: {where}: it has {len(reference.answers)} questions")
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
