"""For tests of Triton kernels on a CPU: which kernels ran, and on which chip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsa_kernels.arch import Arch
from dsa_kernels.dispatch import use_triton
from dsa_kernels.launch import Launch


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that the test launched; a test that launches none tests nothing."""
    assert use_triton(torch.device("cpu"))
    names: list[str] = []
    run = Launch.run

    def recorded(launch: Launch) -> None:
        names.append(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", recorded)
    yield names
    assert names


def stand_for(monkeypatch: pytest.MonkeyPatch, kernel: Any, arch: Arch) -> None:
    """The interpreter stands for another chip in the module `kernel`."""
    monkeypatch.setattr(kernel, "arch_of", lambda _device: arch)
