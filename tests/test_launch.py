"""Launches as values: tables are complete, grids legal, and what ci/compile reads is what runs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

import dsa_kernels
from dsa_kernels.arch import ARCHS, Arch
from dsa_kernels.launch import Launch

KERNELS = sorted(
    f"{path.parent.name}.{path.stem}"
    for path in Path(dsa_kernels.__file__).parent.glob("*/*kernel.py")
)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_every_chip_has_every_configuration(kernel: str, arch: Arch) -> None:
    cases = list(import_module(f"dsa_kernels.{kernel}").compile_cases(arch))
    assert cases
    names = [name for name, _ in cases]
    assert len(set(names)) == len(names)
    for _, launch in cases:
        given = {**launch.arguments, **launch.config.blocks}
        assert set(given) == set(launch.kernel.arg_names)
        assert all(0 < size < 2**31 for size in launch.grid[:1])
        assert all(0 < size < 2**16 for size in launch.grid[1:])


def plan(rows: int, heads: int, k: int, arch: Arch) -> list[Launch]:
    from dsa_kernels.sparse_mla import kernel

    with torch.device("meta"):
        return kernel.plan(
            torch.empty(rows, heads, 576, dtype=torch.bfloat16),
            torch.empty(9, 64, 576, dtype=torch.bfloat16),
            torch.empty(rows, k, dtype=torch.int64),
            None,
            1.0,
            torch.empty(rows, heads, 512, dtype=torch.bfloat16),
            torch.empty(rows, heads),
            arch,
        )


@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_sparse_mla_fills_a_chip_with_few_rows(arch: Arch) -> None:
    """Parts are a power of two; with the blocks of heads they never exceed the chip."""
    for rows in (1, 3, 8, 100, 70_000):
        attend, *merge = plan(rows, 16, 2048, arch)
        programs, parts = attend.grid
        assert programs == rows
        assert parts & (parts - 1) == 0
        assert programs * parts <= max(arch.num_sms, programs)
        assert bool(merge) == (parts > 1) == (2 * rows <= arch.num_sms)
        for launch in merge:
            assert launch.arguments["SPLITS"] == parts
            assert launch.grid[0] == rows * 16


def test_sparse_mla_of_nothing_launches_nothing() -> None:
    assert plan(0, 16, 2048, ARCHS["sm90"]) == []
    assert plan(2, 0, 2048, ARCHS["sm90"]) == []
