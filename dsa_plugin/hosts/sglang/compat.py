"""What differs between SGLang 0.5.20 and 0.5.23: one function each.

Every function says what, why, the upstream place and when to remove it.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.interface import SRTPlatform
from torch import Tensor


def native_path(model_type: str) -> str | None:
    """The host's own DSA path on this device, in words; None where it has none.

    Source: arg_groups/overrides.py, _dsa_split_backend_resolution, and what its choices run on:
    flashmla and fa3 (sm90), trtllm (sm100), flashinfer_sparse_mla (sm120, GLM), triton (ROCm).
    Asked while arguments are resolved, where the host itself reads the device's capability.
    """
    import torch
    from sglang.srt.platforms import current_platform

    if torch.version.hip is not None:
        return "SGLang has native DSA kernels for ROCm"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major in (9, 10) or (major == 12 and model_type == "glm_moe_dsa"):
            return f"SGLang has native DSA kernels for sm{major}{minor}"
        return None
    if current_platform.is_npu() or current_platform.is_xpu():
        return f"SGLang's own path is kept on {current_platform.device_name}"
    return None


def attn_tp_context() -> Any:
    """The host's context in which a layer finds the latents of its inputs.

    It lay in layers/communicator.py in 0.5.20. Remove the second import with that release.
    """
    try:
        from sglang.srt.layers.layer_boundary.adapters.attention import get_attn_tp_context
    except ImportError:
        from sglang.srt.layers.communicator import (  # pyright: ignore[reportMissingImports]
            get_attn_tp_context,
        )
    return get_attn_tp_context()


def record_selection(layer: int, topk_indices: Tensor) -> None:
    """Have the host return a layer's selection with the answer, where it was asked to.

    It lies elsewhere, or is not there, in early releases, which then lack the flag too. Remove the
    second branch with 0.5.20.
    """
    try:
        from sglang.srt.state_capturer.indexer_topk import maybe_capture_indexer_topk
    except ImportError:
        return
    maybe_capture_indexer_topk(layer, topk_indices)


_ASKED = "get_kv_pool_cls" if hasattr(SRTPlatform, "get_kv_pool_cls") else "get_dsa_kv_pool_cls"
POOL_HOOK = f"sglang.srt.platforms.interface.SRTPlatform.{_ASKED}"
"""The method by which a platform is asked for the class of the DSA cache pool.

The second name is that of 0.5.20 and 0.5.21. Remove it with them.
"""


def attention_tp_size(view: Any) -> int:
    """Ranks that divide the heads of one attention among them.

    Since 0.5.22 resolution moves the width of data-parallel attention from dp_size to attn_dp_size,
    before it asks us (arg_groups/parallel_hook.py). Remove the second branch with 0.5.21.
    """
    if hasattr(view, "attn_dp_size"):
        width = view.attn_dp_size
    else:
        width = view.dp_size if view.enable_dp_attention else 1
    size: int = view.tp_size // width
    return size


def has_pool_hook() -> bool:
    """Whether this platform is asked: every one since 0.5.22, before only an out-of-tree one.

    Remove with 0.5.21.
    """
    from sglang.srt.platforms import current_platform

    return _ASKED == "get_kv_pool_cls" or current_platform.is_out_of_tree()
