"""What a verification found: one line each, with what would help."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["wrong", "note"]


@dataclass(frozen=True)
class Finding:
    """Something that a user has to know.

    Attributes:
        level: "wrong" makes the verdict; a "note" is for information.
        where: a file, a tensor, layers, or a key of config.json.
        what: what is there, and what would be right.
        remedy: what would help.
    """

    level: Level
    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f". {self.remedy[:1].upper()}{self.remedy[1:]}" if self.remedy else ""
        return f"{self.where}: {self.what}{remedy}"


def layers_text(layers: Iterable[int]) -> str:
    """Layers as ranges: 0-2,6."""
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and parts[-1][-1] == layer - 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ",".join("-".join(str(end) for end in part) for part in parts)


def of_layers(found: Sequence[tuple[int, Finding]]) -> list[Finding]:
    """One finding for all layers that it is true of; `*` in its place stands for them."""
    layers: dict[Finding, list[int]] = {}
    for layer, finding in found:
        layers.setdefault(finding, []).append(layer)
    return [
        Finding(f.level, f.where.replace("*", f"{{{layers_text(ls)}}}"), f.what, f.remedy)
        for f, ls in layers.items()
    ]
