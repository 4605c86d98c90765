"""A CPU without AVX-512, for every process with this folder in PYTHONPATH: vLLM asks torch."""

from typing import Any

import torch

cpu: Any = torch.cpu
cpu._is_avx512_supported = cpu._is_avx512_bf16_supported = lambda: False
