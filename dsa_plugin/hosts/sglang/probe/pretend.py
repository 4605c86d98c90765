"""SGLang as it would be on a GPU that this machine lacks: its own code, other answers of torch.

What: replaces what torch says of the device, and makes SGLang ask again. Why: as for vLLM
(`dsa_plugin.hosts.vllm.probe.pretend`). All that resolution imports is imported before, on the
platform that this machine has, since some modules load kernels as they are imported.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

from sglang.srt import arg_groups
from sglang.srt.platforms import current_platform
from sglang.srt.platforms.cuda import CudaSRTPlatform
from sglang.srt.platforms.rocm import RocmSRTPlatform
from sglang.srt.utils import common

from dsa_plugin.probe.ask import Target
from dsa_plugin.probe.extensions import stand_in_for_extensions
from dsa_plugin.probe.pretended_torch import replace_torch


def prepare() -> None:
    """Import what resolution imports, once, before this process has children that pretend."""
    for module in pkgutil.walk_packages(arg_groups.__path__, arg_groups.__name__ + "."):
        importlib.import_module(module.name)


def pretend(target: Target) -> None:
    """Let the rest of this process take the machine for the target's; cannot be undone."""
    if target == Target.here():
        return
    stand_in_for_extensions("sglang")
    # Its kernels' package opens a library by the GPU that it sees; taken for absent, as on a CPU.
    modules: dict[str, Any] = sys.modules
    modules.setdefault("sgl_kernel", None)
    replace_torch(target)
    mib = target.memory_bytes / (1 << 20)
    probes: Any = common
    # They run nvidia-smi and rocminfo.
    probes.get_nvgpu_memory_capacity = probes.get_amdgpu_memory_capacity = lambda: mib
    current_platform.__class__ = RocmSRTPlatform if target.is_rocm else CudaSRTPlatform
    for probe in list(vars(common).values()):
        if hasattr(probe, "cache_clear"):
            probe.cache_clear()


def pretend_build(target: Target) -> None:
    """Let DeepGEMM, which SGLang's GPU builds bring, be taken for there; nothing calls it."""
    if target != Target.here():
        sys.modules.setdefault("deep_gemm", _AnyModule("deep_gemm"))


class _AnyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: None
