"""Fixtures of the ops' tests: which form of an op runs, and which kernels a test launched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dsa_kernels.cache_write.api
import dsa_kernels.indexer_logits.api
import dsa_kernels.invariants.api
import dsa_kernels.sparse_mla.api
import dsa_kernels.topk_select.api
from dsa_kernels.dispatch import use_triton
from dsa_kernels.launch import Launch
from dsa_testbed.kernel_runs import DEVICE, KERNEL, check_addresses, small_blocks

APIS = [
    dsa_kernels.cache_write.api,
    dsa_kernels.indexer_logits.api,
    dsa_kernels.invariants.api,
    dsa_kernels.sparse_mla.api,
    dsa_kernels.topk_select.api,
]

# torch notes its constructors when a device is first a context: before a test replaces one of them.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(params=["reference", "cpu", KERNEL])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every op in one form: its specification, what a CPU runs instead, or its Triton kernel.

    A test that uses it states what holds of all forms, and runs on each.
    """
    name: str = request.param
    if name == "kernel":
        request.getfixturevalue("kernels_run")
        return name
    for api in APIS:
        monkeypatch.setattr(api, "use_triton", lambda _device: False)
        if name == "reference" and hasattr(api, "cpu"):
            monkeypatch.setattr(api, "cpu", api.reference)
    return name


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that the test launched; a test that launches none tests nothing.

    What the test creates lies on a GPU, or, under Triton's interpreter, on the CPU.
    """
    assert use_triton(DEVICE)
    if DEVICE.type == "cpu":
        check_addresses(monkeypatch)
    names: list[str] = []
    run = Launch.run

    def recorded(launch: Launch) -> None:
        names.append(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", recorded)
    with torch.device(DEVICE):
        yield names
    assert names


@pytest.fixture
def small_check_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels of the checks: of each loop some turns, the last of them not full."""
    from dsa_kernels.invariants import kernel

    small_blocks(monkeypatch, kernel, BLOCK_TOKENS=4, BLOCK_HEADS=2, BLOCK_COLUMNS=4)
