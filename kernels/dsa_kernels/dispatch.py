"""Kernel or reference: decided once for each device, by DSA_KERNELS."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

from dsa_kernels.arch import arch_of, is_interpreting

_logger = logging.getLogger(__name__)

MODES = ("auto", "triton", "torch")


@cache
def use_triton(device: torch.device) -> bool:
    """Whether ops run their Triton kernel on a device, or else the eager reference.

    DSA_KERNELS=triton and torch say so. auto, the default: Triton on GPUs, and on a CPU under
    TRITON_INTERPRET=1. A GPU that no kernel is for gets the reference, and a warning.

    Raises:
        ValueError: DSA_KERNELS has another value, or is triton where that cannot run.
    """
    mode = os.environ.get("DSA_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"DSA_KERNELS={mode!r}; allowed: {', '.join(MODES)}")
    wanted = device.type == "cuda" or is_interpreting()
    if mode == "torch" or (mode == "auto" and not wanted):
        return False
    try:
        if find_spec("triton") is None:
            raise ValueError(f"triton is not installed, so no kernel runs on {device}")
        arch_of(device)
    except ValueError as refusal:
        if mode == "triton":
            raise ValueError(f"DSA_KERNELS=triton: {refusal}") from None
        _logger.warning("%s; running the slow eager reference", refusal)
        return False
    return True
