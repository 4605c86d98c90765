"""What a verification says: facts, findings, and a cell a layer, length and kind of cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsa_plugin.verification.compare import STEPS, Cell
from dsa_plugin.verification.findings import Finding, layers_text
from dsa_plugin.verification.recall import Recall


@dataclass(frozen=True)
class Report:
    """Of one checkpoint.

    Attributes:
        checkpoint: its folder, or its name on the Hub.
        facts: what is in use: RoPE, sharing, scale, quantisation.
        findings: what is wrong, and notes; those of cells too.
        cells: what was computed; none of headers alone.
        recalls: what the selected keys hold.
        inputs: what was read, and on which device; empty where nothing was.
    """

    checkpoint: str
    facts: Mapping[str, str]
    findings: tuple[Finding, ...]
    cells: tuple[Cell, ...] = ()
    recalls: tuple[Recall, ...] = ()
    inputs: str = ""

    @property
    def wrong(self) -> bool:
        """Whether anything is."""
        return any(finding.level == "wrong" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it: numbers that are not finite are null."""
        cells = [asdict(cell) | {"wrong": cell.wrong} for cell in self.cells]
        found: dict[str, Any] = _finite(asdict(self) | {"wrong": self.wrong, "cells": cells})
        return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell_findings(cells: Sequence[Cell]) -> list[Finding]:
    """One for each set of mistakes, with the worst of its cells."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        if cell.wrong:
            groups.setdefault(cell.mistakes, []).append(cell)
    return [_finding(mistakes, group) for mistakes, group in groups.items()]


def _finding(mistakes: tuple[str, ...], cells: Sequence[Cell]) -> Finding:
    lengths = sorted({cell.length for cell in cells})
    span = f"{lengths[0]:,}" + (f" to {lengths[-1]:,}" if len(lengths) > 1 else "")
    caches = " and ".join(sorted({cell.caches for cell in cells}))
    parts = [
        text
        for name in STEPS
        if (of := [cell for cell in cells if name in cell.wrong]) and (text := _figures(name, of))
    ]
    named = "; ".join(mistakes) or "no known mistake gives these numbers"
    return Finding(
        "wrong",
        f"layers {layers_text(cell.layer for cell in cells)}, {span} tokens, {caches} caches",
        f"{named} ({', '.join(parts)})",
        "docs/verify.md says what each mistake comes from",
    )


def _figures(step: str, cells: Sequence[Cell]) -> str:
    if step == "selection":
        worst = max(cells, key=lambda cell: cell.misplaced)
        share = "" if worst.agreement is None else f"{worst.agreement:.1%} as in fp64, "
        return f"selection {share}{worst.misplaced} keys out of order"
    errors = [cell.errors[step] for cell in cells]
    worst_error = max(errors, key=lambda measured: measured.error)
    return f"{step} off by {worst_error.error:.2g}, rounding explains {worst_error.allowed:.2g}"
