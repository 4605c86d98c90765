"""The platform's class: device "cpu", gloo, no graphs, torch-native allocators."""

from __future__ import annotations

import os
import resource
from typing import Any

from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

# Bytes that SGLang may plan with; it takes a share of them for the KV cache.
_DEFAULT_MEMORY = 4 << 30


class CpuTorchPlatform(SRTPlatform):
    """Torch on a CPU. `DSA_TEST_SGLANG_MEMORY` sets how many bytes it says to have."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device(self, device_id: int | None = 0) -> str:
        return "cpu"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(os.environ.get("DSA_TEST_SGLANG_MEMORY", _DEFAULT_MEMORY))

    def get_current_memory_usage(self, device: Any = None) -> float:
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_paged_allocator_cls(self) -> type:
        """SGLang's own: the default since 0.5.22; before, it needs TRITON_INTERPRET=1."""
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        allocator: type = PagedTokenToKVPoolAllocator
        return allocator

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in ("EAGLE", "NEXTN")

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Called once, while the launcher resolves its arguments."""
        from dsa_sglang_cpu.workarounds import capability_of_no_gpu

        capability_of_no_gpu()

    def init_backend(self) -> None:
        """Called by each worker before it builds a model."""
        from dsa_sglang_cpu.workarounds import apply

        apply()
