"""A kernel's fault ends the session, not each test after it; the GPU here is a fake one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
TESTS = """
import pytest, torch

pytestmark = pytest.mark.triton
faults = []
torch.cuda.is_available = lambda: True
torch.manual_seed = lambda _seed: None

def synchronize():
    if faults:
        fault = faults[0]
        if fault == "once":
            faults.clear()
        raise RuntimeError(f"CUDA error: {fault}")

torch.cuda.synchronize = synchronize

def test_good(): pass
def test_refused(): faults.append("once")
def test_faulty(): faults.append("an illegal memory access")
def test_next(): pass
"""


def test_the_session_ends_at_the_test_that_broke_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_gpu.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = triton\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "3 passed" in result.stdout
    said = result.stdout + result.stderr
    assert "test_gpu.py::test_faulty left the GPU unusable" in said
    assert "an illegal memory access" in said
