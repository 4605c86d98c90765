"""What torch says of a GPU that this machine lacks, for code of a host or of ours that asks it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from dsa_kernels.arch import ARCHS
from dsa_plugin.probe.ask import Target


def replace_torch(target: Target) -> None:
    """Let torch describe the target for the rest of this process; cannot be undone."""
    major, minor = target.capability
    arch = ARCHS.get(target.arch)
    properties = SimpleNamespace(
        name=target.device,
        major=major,
        minor=minor,
        total_memory=target.memory_bytes,
        gcnArchName=target.arch,
        multi_processor_count=arch.num_sms if arch else 0,
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
