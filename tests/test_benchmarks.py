"""The benchmark scripts run, on tiny shapes, and say what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(*arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernels.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": interpret},
    )


@pytest.mark.triton
def test_dry_run(tmp_path: Path) -> None:
    done = run("--dry-run", "--out", str(tmp_path), "--peers", str(tmp_path), interpret="1")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["op"] for row in result["rows"]} >= {"sparse_mla"}
    for row in result["rows"]:
        assert row["us"] > 0
        assert row["roofline_fraction"] > 0
        assert row["peers"]
        for peer in row["peers"].values():
            assert "absent" in peer or peer["agrees"]
    assert result["versions"]["torch"]
    assert "FlashMLA absent (ModuleNotFoundError" in done.stdout


def test_without_a_gpu_it_says_what_would_work() -> None:
    done = run(interpret="0")
    assert done.returncode == 2
    assert "--dry-run with TRITON_INTERPRET=1" in done.stderr
