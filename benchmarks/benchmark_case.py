"""What an op's cases give to kernels.py."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Tensor]
L2_BYTES = 200 << 20  # several times any chip's second-level cache


@dataclass(frozen=True)
class Scale:
    """Where and how large.

    Attributes:
        device: of all tensors.
        tiny: shapes for a CPU under Triton's interpreter.
        peers: folder of an unzipped vLLM CUDA wheel, or None.
    """

    device: torch.device
    tiny: bool
    peers: Path | None

    def copies(self, nbytes: int) -> int:
        """How many copies of inputs of that size make every call find a cold cache."""
        return 1 if self.tiny else max(1, min(32, L2_BYTES // nbytes))


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op, name: what the row is called.
        flops, bytes: the least work, from which the roofline's time follows.
        runs: the op on each copy of the inputs, returning what is compared.
        peers: the same of another library, or why it is absent.
        tolerance: root mean square of a peer's difference, relative to our result's.
    """

    op: str
    name: str
    flops: int
    bytes: int
    runs: list[Run]
    peers: dict[str, list[Run] | str]
    tolerance: float


def peer_module(scale: Scale, name: str) -> Any | str:
    """A module of the peers' wheel, such as "vllm.third_party.deep_gemm", or why there is none.

    The package `vllm` itself is never run: it would want all of its dependencies.
    """
    if scale.peers is None:
        return "no --peers"
    if "vllm" not in sys.modules:
        package = types.ModuleType("vllm")
        package.__path__ = [str(scale.peers / "vllm")]
        sys.modules["vllm"] = package
    try:
        return import_module(name)
    except Exception as failure:  # noqa: BLE001 (whatever loading a foreign library raises)
        return f"{type(failure).__name__}: {failure}"
