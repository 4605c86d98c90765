"""Launch configurations: `base` has every key of every op, a chip's module what that chip changes.

A key is what the op's kernel.py calls its shape key. Every change names its source.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from dsa_kernels.launch import LaunchConfig


@dataclass(frozen=True)
class Source:
    """What chose a change.

    Attributes:
        data: file that shows it, from the repository's root.
        gpu: what it was measured on, as `data` calls it; "": not measured.
        triton: version it was measured with.
    """

    data: str
    gpu: str = ""
    triton: str = ""


# Not measured: registers, spills and shared memory of the compiled kernel chose it.
COMPILED = Source("docs/compile_matrix.md")

# By op and shape key.
Configs: TypeAlias = Mapping[str, Mapping[Hashable, LaunchConfig]]
Changes: TypeAlias = Mapping[str, Mapping[Hashable, tuple[LaunchConfig, Source]]]
