"""Which kernels vLLM has for fp8 weights in blocks on a GPU, by its own selection, as JSON.

`python -P fp8_weights.py GPU`, in vLLM's environment. Only for GPUs below sm90: what needs the ops
of a CUDA build counts as missing here, and those are for newer ones.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.fused_moe.oracle import fp8 as experts
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8Dynamic128Sym,
    kFp8Static128BlockSym,
)
from vllm.platforms import current_platform

from dsa_plugin.hosts.vllm.probe.pretend import prepare, pretend
from dsa_plugin.planning.gpus import find_gpu
from dsa_plugin.probe.ask import Target


def linear_kernel() -> str:
    """The first that vLLM would take."""
    possible: Any = linear._POSSIBLE_FP8_BLOCK_KERNELS[current_platform._enum]
    return str(next(kernel.__name__ for kernel in possible if kernel.is_supported()[0]))


def expert_backend() -> str:
    """Likewise; of the order only GPUs from sm90 on ask the layer's configuration."""
    unasked: Any = None
    scheme = kFp8Static128BlockSym, kFp8Dynamic128Sym
    return next(
        str(backend.name)
        for backend in experts._get_priority_backends(unasked, *scheme)
        for kernel in experts.backend_to_kernel_cls(backend)
        if kernel._supports_current_device() and kernel._supports_quant_scheme(*scheme)
    )


if __name__ == "__main__":
    prepare()
    pretend(Target.of(find_gpu(sys.argv[1]), 8))
    print(json.dumps({"linear": linear_kernel(), "experts": expert_backend()}))
