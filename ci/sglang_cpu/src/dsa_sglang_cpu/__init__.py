"""An out-of-tree SGLang platform: torch on a CPU, without CUDA and without sgl_kernel.

Test support. SGLang's own CPU engine needs kernels (sgl_kernel) that no package index has a CPU
build of; a platform plugin goes round them. https://docs.sglang.io/docs/platforms/plugin
"""

from __future__ import annotations


def activate() -> str:
    """The platform's class, by its dotted name: SGLang imports it when it needs it."""
    return "dsa_sglang_cpu.platform.CpuTorchPlatform"
