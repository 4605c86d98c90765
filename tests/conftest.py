"""Fixtures of every test: data that depends on a test's name only; memory that is never zero."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels run on a GPU, or under Triton's interpreter, chosen before Triton is imported."""
    kernels = [item for item in items if item.get_closest_marker("triton")]
    if not kernels or os.environ.get("TRITON_INTERPRET") == "1":
        return
    import torch

    if not torch.cuda.is_available():
        reason = "no GPU: run with TRITON_INTERPRET=1, as ci/test and `make unit` do"
        for item in kernels:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """End the session where a kernel's fault has ended the GPU's context.

    CUDA reports it at a later call, and from then on at every one: each further test would fail.
    """
    torch = sys.modules.get("torch")
    if item.get_closest_marker("triton") and torch and torch.cuda.is_available():
        faults = []
        for _ in range(2):
            try:
                torch.cuda.synchronize()
            except RuntimeError as fault:
                faults.append(fault)
        if len(faults) == 2:  # what is sticky is reported again
            pytest.exit(f"{item.nodeid} left the GPU unusable, so no test follows: {faults[1]}", 1)
    return (yield)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed from the test's id: neither the order nor the choice of tests changes their data."""
    value = int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "big")
    random.seed(value)
    if torch := sys.modules.get("torch"):  # tests that need no torch do not pay for importing it
        torch.manual_seed(value)
    return value


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors are full of NaN, or of garbage where the dtype has no NaN."""
    import torch

    from dsa_kernels import workspace

    def poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = create(*args, **kwargs)
            if tensor.requires_grad:  # torch.compile's own
                return tensor
            if tensor.is_floating_point() and tensor.itemsize > 1:
                return tensor.fill_(torch.nan)
            tensor.view(torch.uint8).fill_(0x7F) if tensor.dim() else tensor.fill_(0x7F)
            return tensor

        return wrapper

    workspace.release()
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
