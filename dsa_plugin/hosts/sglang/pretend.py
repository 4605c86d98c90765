"""SGLang as it would be on a GPU that this machine lacks: its own code, other answers of torch.

What: replaces what torch says of the device, and makes SGLang ask again. Why: as for vLLM
(`dsa_plugin.hosts.vllm.pretend`). All that resolution imports is imported before, on the platform
that this machine has, since some modules load kernels as they are imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt import arg_groups
from sglang.srt.platforms import current_platform
from sglang.srt.platforms.cuda import CudaSRTPlatform
from sglang.srt.platforms.rocm import RocmSRTPlatform
from sglang.srt.utils import common

from dsa_plugin.ask_host import Target


def prepare() -> None:
    """Import what resolution imports, once, before this process has children that pretend."""
    for module in pkgutil.walk_packages(arg_groups.__path__, arg_groups.__name__ + "."):
        importlib.import_module(module.name)


def pretend(target: Target) -> None:
    """Let the rest of this process take the machine for the target's; cannot be undone."""
    if target == Target.here():
        return
    _replace_torch(target)
    mib = target.memory_bytes / (1 << 20)
    probes: Any = common
    # They run nvidia-smi and rocminfo.
    probes.get_nvgpu_memory_capacity = probes.get_amdgpu_memory_capacity = lambda: mib
    current_platform.__class__ = RocmSRTPlatform if target.is_rocm else CudaSRTPlatform
    for probe in list(vars(common).values()):
        if hasattr(probe, "cache_clear"):
            probe.cache_clear()


def _replace_torch(target: Target) -> None:
    major, minor = target.capability
    properties = SimpleNamespace(
        name=target.device,
        major=major,
        minor=minor,
        total_memory=target.memory_bytes,
        gcnArchName=target.arch,
    )
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: target.count
    cuda.get_device_name = lambda *_: target.device
    cuda.get_device_capability = lambda *_: (major, minor)
    cuda.get_device_properties = lambda *_: properties
    cuda.mem_get_info = lambda *_: (target.memory_bytes, target.memory_bytes)
    version: Any = torch.version
    # Any release: what is asked is which of the two there is.
    version.hip, version.cuda = ("7.0", None) if target.is_rocm else (None, "13.0")
