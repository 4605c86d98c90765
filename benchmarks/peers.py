"""Kernels of other libraries, read at run time out of folders that are named on the command line.

A folder holds a package `vllm` or `sglang`: an unzipped wheel, or the site-packages of an
environment. Packages above the wanted module are not run, as they would import all of a host;
what the module itself takes from its host is replaced by `_SUBSTITUTES`.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Peers:
    """Where other libraries lie; each method returns a str, the reason, where it finds none."""

    folders: tuple[Path, ...]

    def module(self, name: str) -> Any | str:
        """A module, such as "vllm.third_party.deep_gemm"."""
        package = name.partition(".")[0]
        found = [folder for folder in self.folders if (folder / package).is_dir()]
        if not found:
            return f"no folder of --peers has {package}"
        parts = name.split(".")
        for depth in range(1, len(parts)):
            parent = ".".join(parts[:depth])
            if parent not in sys.modules:
                stub = types.ModuleType(parent)
                stub.__path__ = [str(folder.joinpath(*parts[:depth])) for folder in found]
                sys.modules[parent] = stub
        for substitute, contents in _SUBSTITUTES.items():
            if substitute not in sys.modules:
                sys.modules[substitute] = types.ModuleType(substitute)
                vars(sys.modules[substitute]).update(contents)
        try:
            return import_module(name)
        except Exception as failure:  # noqa: BLE001 (whatever loading a foreign library raises)
            return f"{type(failure).__name__}: {failure}"

    def versions(self) -> dict[str, str]:
        """Of the packages that the folders hold, where they say it."""
        found = importlib.metadata.distributions(path=[str(folder) for folder in self.folders])
        return {each.name: each.version for each in found if each.name in ("vllm", "sglang")}

    def operators(self, library: str) -> Any | str:
        """torch.ops._C with what a shared library, such as "vllm/_C.abi3.so", registers there."""
        found = [path for folder in self.folders if (path := folder / library).exists()]
        if not found:
            return f"no folder of --peers has {library}"
        try:
            torch.ops.load_library(str(found[0]))
        except Exception as failure:  # noqa: BLE001
            return f"{type(failure).__name__}: {failure}"
        return torch.ops._C


def runs(
    library: Any | str, call: Callable[..., Tensor], copies: Iterable[tuple[Any, ...]]
) -> list[Run] | str:
    """`call(library, *inputs)` of each copy of the inputs, or why there is no library."""
    if isinstance(library, str):
        return library
    return [partial(call, library, *inputs) for inputs in copies]


def _core_count(device: int = 0) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _is_gfx95() -> bool:
    return "gfx95" in getattr(torch.cuda.get_device_properties(0), "gcnArchName", "")


_SUBSTITUTES: dict[str, dict[str, Any]] = {
    "vllm.triton_utils": {
        "triton": triton,
        "tl": tl,
        "LOG2E": 1.4426950408889634,
        "LOGE2": 0.6931471805599453,
    },
    "sglang.kernels.ops.quantization.fp8_kernel": {"is_fp8_fnuz": lambda: False},
    "sglang.srt.utils": {
        "get_device_core_count": _core_count,
        "is_gfx95_supported": _is_gfx95,
    },
}
