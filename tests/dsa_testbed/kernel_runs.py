"""For tests that run Triton kernels: where, at which sizes, as which chip, and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
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


def check_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter refuses an address outside the memory of a launch's tensors, as a GPU may.

    A GPU faults only where nothing is mapped, and then takes the rest of the process with it.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    memory: list[range] = []
    run = Launch.run
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted(launch: Launch) -> None:
        tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        memory[:] = [range(one.data_ptr(), one.data_ptr() + one.nbytes()) for one in storages]
        run(launch)

    def check(pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        address = pointers.data[mask.data].astype(np.uint64)
        outside = np.ones(address.shape, bool)
        for one in memory:
            outside &= (address < one.start) | (address + np.uint64(size) > one.stop)
        if outside.any():
            raise AssertionError(f"{outside.sum()} addresses outside of every tensor of the launch")

    def checked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(builder, pointers, mask, *rest)

    def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    monkeypatch.setattr(Launch, "run", noted)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)


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


def small_blocks(monkeypatch: pytest.MonkeyPatch, kernel: Any, **blocks: int) -> None:
    """Launch the kernels of the module `kernel` with these blocks, where they have them."""
    configured = kernel.launch_config

    def small(*args: Any) -> Any:
        config = configured(*args)
        own = {name: size for name, size in blocks.items() if name in config.blocks}
        return replace(config, blocks={**config.blocks, **own})

    monkeypatch.setattr(kernel, "launch_config", small)
