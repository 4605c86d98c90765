"""For tests of Triton kernels: where they run, which of them ran, as which chip, and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch

from dsa_kernels.arch import Arch, arch_of, is_interpreting
from dsa_kernels.dispatch import use_triton
from dsa_kernels.launch import Launch

DEVICE = torch.device("cpu" if is_interpreting() else "cuda")

Result = TypeVar("Result")

# torch notes its constructors when a device is first a context: before a test replaces one of them.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that the test launched; a test that launches none tests nothing.

    What the test creates lies on a GPU, or, under Triton's interpreter, on the CPU.
    """
    assert use_triton(DEVICE)
    names: list[str] = []
    run = Launch.run

    def recorded(launch: Launch) -> None:
        names.append(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", recorded)
    with torch.device(DEVICE):
        yield names
    assert names


def stand_for(monkeypatch: pytest.MonkeyPatch, kernel: Any, arch: Arch) -> None:
    """The interpreter stands for another chip in the module `kernel`, a GPU for its own kind."""
    if not is_interpreting() and arch.name != arch_of(DEVICE).name:
        pytest.skip(f"this GPU is no {arch.name}")
    monkeypatch.setattr(kernel, "arch_of", lambda _device: arch)


def captured(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Result]
) -> tuple[Result, Callable[[], None]]:
    """What a call returned, and a function that runs its launches once more, as a CUDA graph does.

    On a GPU it is a CUDA graph.
    """
    if DEVICE.type == "cuda":
        call()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return result, graph.replay
    launches: list[Launch] = []
    run = Launch.run

    def noted(launch: Launch) -> None:
        launches.append(launch)
        run(launch)

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", noted)
        result = call()

    def replay() -> None:
        for launch in launches:
            launch.run()

    return result, replay
