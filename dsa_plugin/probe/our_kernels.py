"""What runs each op on a device where the plugin serves, as the ops' own dispatch says."""

from __future__ import annotations

from importlib.util import find_spec
from typing import get_args

import torch

from dsa_kernels.arch import arch_of
from dsa_kernels.dispatch import use_triton
from dsa_plugin.env import Env
from dsa_plugin.probe.host_kernel import Op


def our_kernels(*, fp8_latents: bool) -> dict[Op, str]:
    """What runs each op on this process's device, with latents in fp8 or in the model's dtype.

    Raises:
        ValueError: DSA_KERNELS asks for what cannot run here, or a variable is wrong.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fp8_keys = Env.load().index_cache_is_fp8(device.type)
    reads_fp8: dict[Op, bool] = {
        "cache_write": fp8_latents or fp8_keys,
        "indexer_logits": fp8_keys,
        "topk_select": False,
        "sparse_mla": fp8_latents,
    }
    return {op: _runs(op, device, fp8=reads_fp8[op]) for op in get_args(Op)}


def _runs(op: Op, device: torch.device, *, fp8: bool) -> str:
    if use_triton(device):
        arch = arch_of(device)
        by_integers = ", e4m3 by integers" if fp8 and not arch.has_e4m3 else ""
        return f"Triton for {arch.name}{by_integers}"
    has_own = device.type == "cpu" and find_spec(f"dsa_kernels.{op}.cpu") is not None
    return "torch, for CPUs" if has_own else "torch, reference"
