"""Launch configurations: `base` has every key of every op, a chip's module what that chip changes.

A key is what the op's kernel.py calls its shape key. Every change names its source. Where two
versions of Triton make different code of a kernel, a chip's BY_TRITON has what one of them changes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is compiled for one architecture and shape.

    Attributes:
        blocks: tile sizes, by the names of the kernel's constexpr parameters.
        num_warps: warps a block.
        num_stages: depth of the pipeline of loads.
        options: of one backend only, such as AMD's waves_per_eu.
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    options: Mapping[str, int] = field(default_factory=dict)

    @property
    def compile_options(self) -> dict[str, int]:
        """What Triton calls options: all but the blocks."""
        # Multiply-adds fuse: the default will change with Triton 3.10.
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
            **self.options,
        }


@dataclass(frozen=True)
class Source:
    """What chose a change.

    Attributes:
        data: file that shows it, from the repository's root.
        gpu: what it was measured on, as `data` calls it; "": not measured.
        triton: version it was measured with.
        inferred: `gpu` is another chip, whose times this one is taken to share: it has the
            instruction that multiplies there, and the registers and shared memory.
    """

    data: str
    gpu: str = ""
    triton: str = ""
    inferred: bool = False


# Not measured: registers, spills and shared memory of the compiled kernel chose it.
COMPILED = Source("docs/compile_matrix.md")

H100_SWEEP = Source(
    "benchmarks/results/h100-sweep.json", gpu="NVIDIA H100 80GB HBM3", triton="3.6.0"
)
# Of chips that multiply by mma.sync, as an H100 does for tiles of up to 32 heads. Its warps share
# the latents of a step, eight each, so a BLOCK_K of less than eight a warp repeats products.
INFERRED = replace(H100_SWEEP, inferred=True)

# By op and shape key.
Configs: TypeAlias = Mapping[str, Mapping[Hashable, LaunchConfig]]
Changes: TypeAlias = Mapping[str, Mapping[Hashable, tuple[LaunchConfig, Source]]]
# By major and minor version, such as "3.6"; these come before CHANGES.
ChangesByTriton: TypeAlias = Mapping[str, Changes]
