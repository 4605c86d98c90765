"""A test's processes told that their CPU has no AVX-512, as most laptops' have not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_SITE = Path(__file__).parent / "avx2"


def force_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """In those that the test starts from here on; not in its own."""
    monkeypatch.setenv("PYTHONPATH", str(_SITE), prepend=os.pathsep)
