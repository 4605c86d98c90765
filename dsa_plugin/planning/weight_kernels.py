"""What the hosts multiply a checkpoint's weights in, where that is not their own precision.

fp8 in blocks of 128 x 128:
- vLLM 0.32 takes Marlin, which holds fp8 and multiplies in bf16, for linear layers below sm90: in
  _POSSIBLE_FP8_BLOCK_KERNELS of vllm/model_executor/kernels/linear/__init__.py it comes before
  Triton, and all before it are for sm90 and later. For experts it does so below sm89 only: in
  select_fp8_moe_backend of vllm/model_executor/layers/fused_moe/oracle/fp8.py Triton comes first,
  and takes fp8 from sm89 on.
- SGLang 0.5.23 takes Marlin for linear layers below sm89: can_auto_enable_marlin_fp8 of
  sglang/srt/layers/quantization/fp8_utils.py. Its experts run in Triton (create_moe_runner of
  fp8.py beside it), which has no e4m3 below sm89:
  https://github.com/sgl-project/sglang/issues/12887

4 or 8 bits, on any GPU: experts by Marlin, or on ROCm in vLLM alone by Triton:
vllm/model_executor/layers/fused_moe/oracle/int_wna16.py; AWQMarlinConfig of
sglang/srt/layers/quantization/awq/awq.py.
"""

from __future__ import annotations

from dsa_plugin.packed_weights import BITS
from dsa_plugin.planning.gpus import Gpu
from dsa_plugin.planning.model import WeightsDtype


def is_weight_only(gpu: Gpu, dtype: WeightsDtype, *, experts: bool) -> bool:
    """Whether vLLM holds fp8 weights, of experts or of linear layers, to multiply them in bf16."""
    return dtype == "fp8" and (gpu.fp8_tflops is None or (gpu.arch == "sm89" and not experts))


def weights_note(gpu: Gpu, dtype: WeightsDtype) -> str | None:
    """What to know of weights of this dtype on this GPU, in a line; None: nothing."""
    if is_weight_only(gpu, dtype, experts=True):
        return (
            f"{gpu.name} has no fp8 units: vLLM holds the weights in fp8 and multiplies in bf16 "
            "(Marlin), which the times assume; SGLang has no kernel for fp8 experts here, so take "
            "4-bit experts or bf16 with it"
        )
    if is_weight_only(gpu, dtype, experts=False):
        return (
            f"on {gpu.name} vLLM multiplies fp8 weights of linear layers in bf16 (Marlin) and of "
            "experts in fp8, which the times assume; SGLang multiplies both in fp8"
        )
    if bits := BITS.get(dtype):
        return (
            f"{bits}-bit experts are multiplied in bf16, by Marlin; on ROCm vLLM does so by Triton "
            "and SGLang has no kernel for them"
        )
    return None
