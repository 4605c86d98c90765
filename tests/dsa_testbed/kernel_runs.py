"""For tests that run Triton kernels: where, at which sizes, as which chip, and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from dsa_kernels.arch import Arch, arch_of, is_interpreting
from dsa_kernels.launch import Launch

DEVICE = torch.device("cpu" if is_interpreting() else "cuda")
# The form of an op, for the fixture `form`, that the mark `triton` chooses.
KERNEL = pytest.param("kernel", marks=pytest.mark.triton)

Result = TypeVar("Result")
Sizes = TypeVar("Sizes")


def unless_interpreted(full: Sizes, few: Sizes) -> Sizes:
    """Sizes of a test: a kernel's tile takes the interpreter tens of milliseconds."""
    return few if is_interpreting() else full


def drawn(examples: int, *, interpreted: int) -> settings:
    """Of a test whose data hypothesis draws; shrinking takes the interpreter minutes."""
    return settings(
        max_examples=unless_interpreted(examples, interpreted),
        deadline=None,
        phases=unless_interpreted(tuple(Phase), (Phase.generate,)),
        # The fixture `form` is the same for each example.
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


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
