"""What of SGLang's settings the plugin does not serve, each with what would work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dsa_kernels.dims import INDEX_PAGE
from dsa_plugin.config import DSAConfig
from dsa_plugin.hosts.sglang.compat import attention_tp_size, has_pool_hook

# Field of the arguments -> why not.
_FEATURES = {
    "enable_prefill_cp": "each rank keeps whole contexts; use more tensor or data parallelism",
    "enable_dsa_cache_layer_split": "each rank keeps the caches of all of its layers",
    "enable_kv_cache_sharding": "each rank keeps whole contexts",
    "enable_hisparse": "the plugin selects from what lies on the device",
    "enable_two_batch_overlap": "the host does not hand selections on between overlapped batches",
    "enable_pdmux": "prefill and decode share one set of metadata",
    "enable_lora": "adapters of kv_b_proj do not reach the absorbed weights",
    "lora_paths": "adapters of kv_b_proj do not reach the absorbed weights",
    "enable_cp_decode_attn_tp": "the absorbed weights are not sharded again for decode",
    "enable_nvidia_megakernel": "it runs whole layers, attention included",
    "enable_amd_monokernel": "it runs whole layers, attention included",
    "enable_torch_compile": "the plugin's attention is not compiled",
    "enable_multi_layer_eagle": "the draft is the model's own MTP layer",
    "enable_deterministic_inference": "how attention splits a row's sum depends on the batch",
    "rl_on_policy_target": "it wants deterministic inference, and how attention splits a row's sum "
    "depends on the batch",
    "enable_unified_memory": "caches lie in the host's pool of 64-token pages",
    "enable_page_major_kv_layout": "caches lie in the host's pool of 64-token pages",
}
# Settings of the host's own DSA kernels, and what they are where nobody asked.
_HOST_KERNELS = {
    "dsa_prefill_backend": None,
    "dsa_decode_backend": None,
    "dsa_topk_backend": "sgl-kernel",
    "dsa_paged_mqa_logits_backend": "auto",
}
# Features that keep a copy of the caches elsewhere.
_OFFLOADS = (
    "enable_hierarchical_cache",
    "enable_unified_cache_external_linker",
    "enable_lmcache",
    "enable_flexkv",
)
_UNTRIED = (
    "SGLang copies caches by kernels of its GPU builds, which were not run with the plugin; drop "
    "the flag, or set DSA_PLUGIN=off where SGLang has DSA kernels of its own"
)
_SPECULATIVE = (None, "NEXTN", "EAGLE")
_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def unsupported(
    view: Any,
    raw: Mapping[str, Any],
    config: DSAConfig,
    *,
    model_dtype: torch.dtype,
    index_cache_fp8: bool,
) -> list[str]:
    """Every reason against serving the model so; empty if there is none.

    Args:
        view: the arguments as resolved so far.
        raw: the arguments as the user gave them.
        config: the model's numbers.
        model_dtype: of activations.
        index_cache_fp8: whether index keys are cached in fp8.
    """
    return [
        *(
            f"{_flag(field)}: {why}; drop the flag"
            for field, why in _FEATURES.items()
            if getattr(view, field, False)
        ),
        *_parallelism(view, config),
        *_speculative(raw),
        *_recording(view, raw),
        *_caches(view, raw, model_dtype, index_cache_fp8),
        *(
            f"{_flag(field)} {raw[field]}: it chooses among SGLang's own kernels; drop the flag, "
            "or set DSA_PLUGIN=off to use them"
            for field, unset in _HOST_KERNELS.items()
            if raw.get(field, unset) != unset
        ),
    ]


def _parallelism(view: Any, config: DSAConfig) -> list[str]:
    reasons = [
        f"{_flag(field)} {size}: each rank keeps whole contexts; use {_flag(field)} 1 and more "
        "tensor or data parallelism"
        for field in ("dcp_size", "attn_cp_size")
        if (size := getattr(view, field, 1) or 1) > 1
    ]
    return reasons + config.tensor_parallel_faults(attention_tp_size(view))


def _speculative(raw: Mapping[str, Any]) -> list[str]:
    reasons = []
    algorithm, topk = raw["speculative_algorithm"], raw["speculative_eagle_topk"]
    if algorithm not in _SPECULATIVE:
        reasons.append(
            f"--speculative-algorithm {algorithm}: the plugin drafts with the model's own MTP "
            "layer; use NEXTN or EAGLE"
        )
    if topk not in (None, 1):
        reasons.append(
            f"--speculative-eagle-topk {topk}: a row sees every position before its own, so drafts "
            "must be chains; use --speculative-eagle-topk 1"
        )
    return reasons


def _recording(view: Any, raw: Mapping[str, Any]) -> list[str]:
    """What the host's recorder of selections, one of a rank's own layers and rows, leaves out."""
    if not getattr(view, "enable_return_indexer_topk", False):
        return []
    ranks = attention_tp_size(view)
    reasons = {
        f"with {ranks} ranks to an attention: the host records on ranks of their own alone; use "
        "--enable-dp-attention with --dp as large as --tp": ranks > 1,
        f"with --pp-size {view.pp_size}: the last stage would return its own layers' alone; use "
        "--pp-size 1": view.pp_size > 1,
        "with --speculative-algorithm: a draft's selection would take layer 0's place; drop one": (
            raw["speculative_algorithm"] is not None
        ),
    }
    return [f"--enable-return-indexer-topk {why}" for why, holds in reasons.items() if holds]


def _caches(
    view: Any, raw: Mapping[str, Any], model_dtype: torch.dtype, index_cache_fp8: bool
) -> list[str]:
    reasons = []
    dtype = raw["kv_cache_dtype"]
    if dtype not in ("auto", "fp8_e4m3") and _DTYPES.get(dtype) != model_dtype:
        reasons.append(
            f"--kv-cache-dtype {dtype} with a {model_dtype} model: the latent cache is kept in the "
            "model's dtype (auto) or in 656 bytes a token (fp8_e4m3); choose one of these"
        )
    if raw["page_size"] not in (None, INDEX_PAGE):
        reasons.append(
            f"--page-size {raw['page_size']}: pages hold {INDEX_PAGE} tokens; drop the flag"
        )
    if not index_cache_fp8 and not has_pool_hook():
        reasons.append(
            "DSA_INDEX_CACHE_DTYPE=model: this SGLang has no hook for the cache pool; use fp8, or "
            "SGLang 0.5.22 or later"
        )
    reasons += [f"{_flag(field)}: {_UNTRIED}" for field in _OFFLOADS if getattr(view, field, False)]
    if view.disaggregation_mode != "null":
        reasons.append(f"--disaggregation-mode {view.disaggregation_mode}: {_UNTRIED}")
    return reasons


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
