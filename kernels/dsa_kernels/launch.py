"""Kernel launches as values: chosen by tables, the same to run and to compile without a GPU.

Nothing is tuned while serving: an autotuner would run candidates inside a request, and choose
differently on each rank.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from dsa_kernels.arch import Arch
from dsa_kernels.tuning import COMPILED, Changes, ChangesByTriton, LaunchConfig, Source
from dsa_kernels.tuning.base import BASE


@cache
def launch_config(
    op: str, arch: Arch, shape_key: Hashable, triton_version: str | None = None
) -> LaunchConfig:
    """What `dsa_kernels.tuning` has for an op's kernel on a chip: the chip's own, or the base.

    The chip's own may hold for one version of Triton alone.

    Args:
        op: folder of the op, such as "sparse_mla".
        arch: which chip.
        shape_key: as the op's kernel.py defines it.
        triton_version: with which it is launched; None: the installed.

    Raises:
        KeyError: the base lacks the entry: a defect, which tests of every architecture find.
    """
    changed = _changed(op, arch, shape_key, triton_version or _installed_triton())
    return changed[0] if changed else BASE[op][shape_key]


def launch_source(op: str, arch: Arch, shape_key: Hashable) -> Source:
    """What chose `launch_config`'s, with the installed Triton."""
    if changed := _changed(op, arch, shape_key, _installed_triton()):
        return changed[1]
    return COMPILED


def _changed(
    op: str, arch: Arch, shape_key: Hashable, triton_version: str
) -> tuple[LaunchConfig, Source] | None:
    """The chip's own; None: the base."""
    chip = import_module(f"dsa_kernels.tuning.{arch.name}")
    by_triton: ChangesByTriton = getattr(chip, "BY_TRITON", {})
    changes: Changes = chip.CHANGES
    major_minor = ".".join(triton_version.split(".")[:2])
    for table in (by_triton.get(major_minor, {}), changes):
        changed = table.get(op, {}).get(shape_key)
        if changed is not None:
            return changed
    return None


def _installed_triton() -> str:
    import triton

    return str(triton.__version__)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `run` does it, ci/compile compiles it without a GPU.

    Attributes:
        kernel: the @triton.jit function.
        grid: blocks in each dimension; from shapes only, so that CUDA graphs can capture it.
        arguments: every parameter of the kernel but the blocks, by name. Tensors may be on the
            meta device if the launch is never run.
        config: the compiled variant.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    config: LaunchConfig

    def run(self) -> None:
        """Enqueue on the current stream."""
        self.kernel[self.grid](
            **self.arguments, **self.config.blocks, **self.config.compile_options
        )


def strides(name: str, tensor: Tensor | None, dims: str) -> dict[str, int]:
    """A tensor's strides as a kernel's arguments: <name>_<dim>, a letter a dimension; of None, 0.

    The letters: t a token or its row, r a request, h a head, s a part, k a selected one, n a key,
    p a position, b a block, d a value. Not a tuple a tensor: Triton 3.9 specialises its elements
    whatever do_not_specialize says, and a block table's row stride changes from batch to batch.
    """
    steps = (0,) * len(dims) if tensor is None else tensor.stride()
    return {f"{name}_{dim}": step for dim, step in zip(dims, steps, strict=False)}


def check_near_heads(**tensors: Tensor) -> None:
    """Refuse heads, dimension 1, that int32 does not reach from the first: kernels multiply in it.

    In int64 the largest of these kernels spill. Dense rows of a model's heads end far within.

    Raises:
        ValueError: says which tensor.
    """
    for name, tensor in tensors.items():
        heads, step = tensor.shape[1], tensor.stride(1)
        if heads * step >= 2**31:
            raise ValueError(
                f"{name}: {heads} heads {step} values apart; a row's heads must lie within 2^31 "
                "values: store them row by row, or take fewer rows a call"
            )
