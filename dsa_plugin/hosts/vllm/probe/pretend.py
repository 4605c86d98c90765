"""vLLM as it would be on a GPU that this machine lacks: its own code, asked on its own platform.

What: gives the platform object, which every module of vLLM holds, the class of another platform,
and answers its questions about the device. Why: what runs where is decided by dozens of functions
that ask this object; a table typed from them would be wrong with the next release. Modules are
imported before, on the platform that this machine has, since some load kernels on import; those
that are compiled, and come later, are stood in for.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from dsa_plugin.hosts.replaced_names import replaced_names
from dsa_plugin.hosts.vllm.registration import OUR_MODEL
from dsa_plugin.probe.ask import Target
from dsa_plugin.probe.extensions import stand_in_for_extensions
from dsa_plugin.probe.pretended_torch import replace_torch
from dsa_registry import all_entries

# Of a CUDA build alone; platforms/cuda.py imports it for the ops that it registers.
_KERNELS = "vllm._C_stable_libtorch"
_INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"


def prepare() -> None:
    """Import what configurations import, once, before this process has children that pretend."""
    get_quantization_config("fp8")  # imports every quantisation method
    # vLLM inspects a model's class in a process of its own so as not to initialise CUDA; here that
    # would only cost each child 15 s.
    registry._run_in_subprocess = lambda inspect: inspect()
    for name in (name for entry in all_entries() for name in entry.architectures):
        registry._try_inspect_model_cls(name, registry.ModelRegistry.models[name])
        registry._try_inspect_model_cls(name, registry._LazyRegisteredModel(*OUR_MODEL))


def pretend(target: Target) -> None:
    """Let the rest of this process take the machine for the target's; cannot be undone."""
    if target == Target.here():
        return
    stand_in_for_extensions("vllm")
    platform = _rocm(target) if target.is_rocm else _cuda(target)
    current_platform.__class__ = platform


def pretend_build(target: Target) -> None:
    """Let what vLLM's GPU builds bring, and this one lacks, be taken for there.

    What: FlashInfer's and DeepGEMM's presence, FlashAttention's modules, torch's answers. Why: the
    question is what a GPU refuses, not what a CPU build has left out. After the configuration was
    made, which would else use them.
    """
    if target == Target.here():
        return
    from vllm.utils import deep_gemm, flashinfer

    replace_torch(target)
    for name in ("_vllm_fa2_C", "_vllm_fa3_C"):
        name = f"vllm.vllm_flash_attn.{name}"
        sys.modules.setdefault(name, ModuleType(name))
    for name in (name for name in vars(flashinfer) if name.startswith("has_")):
        setattr(flashinfer, name, lambda *_: True)
    for module in (deep_gemm, importlib.import_module(_INDEXER)):
        vars(module)["has_deep_gemm"] = lambda: True
    empty = torch.empty
    # It allocates a workspace on the device as it is imported.
    with replaced_names(torch, empty=lambda *a, **k: empty(*a, **{**k, "device": "meta"})):
        importlib.import_module("vllm.v1.attention.backends.mla.cutlass_mla")


def _device(base: type, target: Target) -> type:
    capability = DeviceCapability(*target.capability)
    answers: dict[str, Any] = {
        "get_device_capability": lambda device_id=0: capability,
        "get_device_name": lambda device_id=0: target.device,
        "get_device_total_memory": lambda device_id=0: target.memory_bytes,
        "is_fully_connected": lambda device_ids: True,
        "device_count": lambda: target.count,
        "validate_environ": lambda *_: None,
    }
    return type(base.__name__, (base,), {k: staticmethod(v) for k, v in answers.items()})


def _cuda(target: Target) -> type:
    sys.modules.setdefault(_KERNELS, ModuleType(_KERNELS))
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    return _device(NonNvmlCudaPlatform, target)


def _rocm(target: Target) -> type:
    properties = SimpleNamespace(gcnArchName=target.arch)
    torch.cuda.get_device_properties = lambda *_: properties  # type: ignore[assignment]
    # It reads the architecture as it is imported.
    rocm = importlib.reload(importlib.import_module("vllm.platforms.rocm"))
    return _device(rocm.RocmPlatform, target)
