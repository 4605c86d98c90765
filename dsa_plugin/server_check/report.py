"""What a check found, as JSON and in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dsa_plugin.server_check.by_answers import Answer
from dsa_plugin.server_check.by_logprobs import Band
from dsa_plugin.server_check.faults import LIKELY_CAUSES, Finding
from dsa_plugin.server_check.grid import MODES, Mode

RIGHT, UNDECIDED, UNUSABLE = "right", "undecided", "server unusable"


@dataclass(kw_only=True)
class Report:
    """Attributes:
    url, model: whom was asked; model is as the server names it.
    index_topk, chunk, seed: of the check.
    findings: faults, those that explain others first.
    answers, bands: what they rest on.
    notes: what could not be confirmed or was left out.
    problem: why the server cannot be checked, or no verdict is had.
    unusable: whether `problem` is the server's.
    seconds: that it took.
    """

    url: str
    model: str | None = None
    index_topk: int | None = None
    chunk: int | None = None
    seed: int = 0
    findings: Sequence[Finding] = ()
    answers: list[Answer] = field(default_factory=list)
    bands: Sequence[Band] = ()
    notes: list[str] = field(default_factory=list)
    problem: str | None = None
    unusable: bool = False
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """right, undecided, server unusable, or the class of the first finding."""
        if self.findings:
            return str(self.findings[0].fault)
        if self.problem is not None:
            return UNUSABLE if self.unusable else UNDECIDED
        return RIGHT

    @property
    def exit_code(self) -> int:
        """0 where the server is right, 1 where it is wrong, 2 where that is not known."""
        if self.findings:
            return 1
        return 0 if self.verdict == RIGHT else 2

    def cells(self) -> list[dict[str, Any]]:
        """Right answers by length and way of asking."""
        lengths = sorted({answer.length for answer in self.answers})
        return [cell for at in lengths for mode in MODES if (cell := self._cell(at, mode))]

    def as_json(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        return {
            "verdict": self.verdict,
            "url": self.url,
            "model": self.model,
            "index_topk": self.index_topk,
            "chunk": self.chunk,
            "seed": self.seed,
            "findings": [
                dataclasses.asdict(finding) | {"likely": LIKELY_CAUSES[finding.fault]}
                for finding in self.findings
            ],
            "problem": self.problem,
            "notes": self.notes,
            "cells": self.cells(),
            "bands": [
                dataclasses.asdict(band) | {"mode": band.mode.name, "wrong": band.is_wrong}
                for band in self.bands
            ],
            "seconds": round(self.seconds, 1),
        }

    def _cell(self, length: int, mode: Mode) -> dict[str, Any] | None:
        here = [a for a in self.answers if (a.length, a.mode) == (length, mode)]
        if not here:
            return None
        return {
            "length": length,
            "mode": mode.name,
            "prompt_tokens": max(answer.tokens for answer in here),
            "cached_tokens": _largest([answer.cached_tokens for answer in here]),
            "right": sum(answer.right for answer in here),
            "asked": len(here),
            "wrong_answers": [answer.completion for answer in here if not answer.right],
        }


def _largest(counts: Sequence[int | None]) -> int | None:
    return max((count for count in counts if count is not None), default=None)
