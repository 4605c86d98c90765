"""What ci/compile holds against a compiled kernel, and how its table counts them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dsa_kernels.arch import ARCHS
from dsa_testbed.ttir import compile_script


@pytest.fixture
def script() -> Any:
    return compile_script()


def product(rows: int, dtype: str) -> str:
    """A line of Triton's IR."""
    return (
        f"  %s = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<{rows}x128x{dtype}> * "
        f"tensor<128x32x{dtype}> -> tensor<{rows}x32xf32> loc(#loc7)\n"
    )


@pytest.mark.parametrize(
    ("arch", "ttir", "expected"),
    [
        ("sm80", product(16, "bf16"), ("mma.sync", "")),
        ("sm90", product(64, "bf16"), ("wgmma", "")),
        ("sm90", product(32, "f8E4M3FN"), ("mma.sync", "32 rows")),
        ("sm100", product(16, "f16") + product(128, "f16"), ("tcgen05.mma", "")),
        ("sm120", product(128, "bf16"), ("mma.sync", "")),
        ("sm90", product(64, "f32"), ("", "fp32")),
        ("gfx942", product(16, "f32"), ("v_mfma", "")),
        ("sm100", "  tt.store %a, %b", ("", "")),
    ],
)
def test_expected_matrix(script: Any, arch: str, ttir: str, expected: tuple[str, str]) -> None:
    assert script.expected_matrix(ttir, ARCHS[arch]) == expected


def test_faults_and_table(script: Any) -> None:
    good = script.Compiled("sparse_mla", "a", "sm90", "", 128, 0, 1024, "wgmma", "", True)
    assert list(good.faults()) == []
    assert list(replace(good, spilled=8).faults()) == ["spills 8"]
    assert list(replace(good, has_matrix=False).faults()) == ["multiplies without wgmma"]
    (fault,) = replace(good, smem_bytes=1 << 20).faults()
    assert fault == "needs 1048576 bytes of shared memory; a block has 232448"

    rows = [
        good,
        replace(good, name="b", matrix="mma.sync", remark="32 rows"),
        replace(good, name="c", matrix="", remark="fp32"),
        replace(good, name="d", matrix="", remark=""),
        replace(good, name="e", arch="sm80", matrix="mma.sync"),
    ]
    table = script.table(rows)
    assert "| sm90 | 4 | wgmma | 1 | 1 | 1 | 1 |\n" in table
    assert "| sm80 | 1 | mma.sync | 1 | 0 | 0 | 0 |\n" in table
    assert "| sm90 | b |  | 128 | 1.0 | mma.sync, 32 rows |\n" in table
